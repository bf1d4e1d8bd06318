"""DeepSpeed behind a small wrapper: settings to its dict, gradients of a whole step, slices by name and range.

The only file that imports deepspeed. A `Slice` is what one rank owns of one parameter: a range of the flattened
parameter and views of the fp32 weight and of AdamW's two moments, whatever the ZeRO stage. Checkpoint and EMA know
slices only, so both re-shard without a conversion.

Three traps of DeepSpeed 0.19 shape this file:
- `bf16.enabled` turns every parameter, A_log too, to bfloat16 inside forward; its `torch_autocast` section does not.
- Gradients are averaged over ranks; the loss here is a share of a global sum, so it is scaled by the world size first.
- Gradients are put in a bucket in the order in which backward reaches them, and reduced as one flat tensor: two ranks
  whose graphs differ (images on one, video on the other) would add up different parameters, without an error.
  `coalesce_grad_reduction` reduces once a step in the fixed order of the groups, for the price of full local gradients.
"""

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from m4v_dist.config.training_settings import TrainerSettings
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer.optimizer import ParameterGroup, is_frozen, parameter_groups

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Slice:
    """What this rank owns of one parameter.

    Args:
        name: the parameter's name in the model.
        start: first element of the flattened parameter that is owned.
        num_elements: elements of the whole parameter.
        weight: flat view of the fp32 weight, elements start .. start + len.
        exp_avg: flat view of AdamW's first moment; None for a frozen parameter.
        exp_avg_sq: flat view of AdamW's second moment; None for a frozen parameter.
    """

    name: str
    start: int
    num_elements: int
    weight: Tensor
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None


def deepspeed_config(settings: TrainerSettings, *, micro_batch_slots: int, world_size: int) -> dict[str, Any]:
    """Translate settings to DeepSpeed's dict.

    Gradient accumulation is 1 here: one `ZeroEngine.accumulate()` block is one step, however many micro-batches it has.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_slots,
        "gradient_accumulation_steps": 1,
        "train_batch_size": micro_batch_slots * world_size,
        "gradient_clipping": settings.max_grad_norm,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": settings.zero_stage, "overlap_comm": False},
    }
    if settings.precision == "bfloat16":
        # No "safe" modules: a module on that list has its gradients reduced in bfloat16 too.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config


def model_state_bytes(num_parameters: int, zero_stage: int, world_size: int) -> int:
    """Estimate what one rank holds besides activations: float32 weights, gradients, master, moments and average.

    Gradients count in full at every stage, because they are reduced once a step.
    """
    share = num_parameters / world_size
    weights = share if zero_stage == 3 else num_parameters
    return round(4 * (weights + num_parameters + 4 * share))


def prepare_process(mesh: Mesh) -> None:
    """Make DeepSpeed use the process group that is up; must come before any `ZeroEngine` (collective)."""
    if mesh.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if mesh.device.type == "cpu":
        # DeepSpeed compiles its shared-memory all-reduce at start, and dies where there is no compiler; gloo does the
        # same work. `__compatible_ops__` is what it asks before it builds.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if mesh.device.type == "cuda" else "gloo", verbose=False)
    for noisy in ("DeepSpeed", "deepspeed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class ZeroEngine:
    """A model under ZeRO 1, 2 or 3 with AdamW.

    Building one is collective and takes the model over: its parameters are moved into DeepSpeed's buffers.

    Args:
        model: float32 parameters, on any device.
        settings: optimizer, clipping, ZeRO stage, precision.
        freeze: parameter sets that do not train as long as this engine lives.
        micro_batch_slots: slots of one forward.
        mesh: rank facts.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainerSettings,
        *,
        freeze: tuple[str, ...],
        micro_batch_slots: int,
        mesh: Mesh,
    ) -> None:
        prepare_process(mesh)
        import deepspeed

        self.mesh = mesh
        self.zero_stage = settings.zero_stage
        for name, parameter in model.named_parameters():
            # DeepSpeed never moves a parameter that is unfrozen later, so this holds for the engine's whole life.
            parameter.requires_grad_(not is_frozen(name, freeze))
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.groups: tuple[ParameterGroup, ...] = parameter_groups(model.named_parameters(), freeze)
        parameters = dict(model.named_parameters())
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": [parameters[name] for name in group.parameter_names],
                    "weight_decay": settings.weight_decay if group.decays else 0.0,
                    "name": group.name,
                }
                for group in self.groups
            ],
            lr=0.0,
            betas=settings.betas,
            eps=settings.epsilon,
        )
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(settings, micro_batch_slots=micro_batch_slots, world_size=mesh.world_size),
            dist_init_required=False,
        )
        self._parameters = dict(self._engine.module.named_parameters())
        self._create_moments()

    @property
    def model(self) -> nn.Module:
        """What to call for a forward: DeepSpeed's module, which gathers and casts."""
        return self._engine

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Collect the gradients of one step; on leaving the block they are reduced over ranks, once (collective)."""
        with self._engine.coalesce_grad_reduction():
            yield
            self._fill_missing_gradients()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, this micro-batch's share of the global loss; sums over ranks and micro-batches.

        Args:
            loss: scalar; sum over this micro-batch's slots of weight * loss / S.
        """
        self._engine.backward(loss * self.mesh.world_size, scale_wrt_gas=False)

    def step(self, lr: float) -> float | None:
        """Clip and move the weights (collective).

        Returns:
            The gradient's global norm before clipping, or None if it was not finite: then no rank moved anything.
        """
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._engine.step()
        if not self._engine.was_step_applied():
            return None
        return float(self._engine.get_global_grad_norm())

    def discard(self) -> None:
        """Drop this step's gradients on all ranks; weights and moments stay as they are (collective)."""
        # A NaN in the reduced gradients walks DeepSpeed's own way of skipping a step, at each stage: the global norm
        # is agreed by all ranks, and an invalid one returns before the optimizer.
        for gradients in self._zero.averaged_gradients.values():
            for gradient in gradients or ():
                gradient.fill_(math.nan)
        norm = self.step(lr=0.0)
        assert norm is None, "a step with NaN gradients moved the weights"

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation."""
        self._engine.train(mode)

    def replicas(self) -> dict[str, Tensor]:
        """Parameters of which every rank holds a whole copy, the same on all; none under ZeRO 3."""
        if self.zero_stage == 3:
            return {}
        return {name: parameter.data for name, parameter in self._parameters.items()}

    def slices(self) -> list[Slice]:
        """This rank's slices, in model order; over all ranks they cover each parameter exactly once."""
        found = (self._slice(name, parameter) for name, parameter in self._parameters.items())
        return [item for item in found if item is not None and len(item.weight)]

    def slices_to_load(self) -> list[Slice]:
        """The same, but with frozen parameters whole where every rank holds them whole (ZeRO 1 and 2)."""
        if self.zero_stage == 3:
            return self.slices()
        whole = {
            name: Slice(name, 0, parameter.numel(), parameter.data.view(-1))
            for name, parameter in self._parameters.items()
            if not parameter.requires_grad
        }
        return [item for item in self.slices() if item.name not in whole] + list(whole.values())

    @torch.no_grad()
    def publish(self) -> None:
        """After slices were written to: bring the fp32 weights into the model's own parameters (collective)."""
        if self.zero_stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for number in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)
        self._zero.invalidate_secondary_tensor()

    def optimizer_steps(self) -> dict[str, int]:
        """AdamW's step counter of each group."""
        flats = zip(self.groups, self._flat_weights_by_group(), strict=True)
        return {group.name: int(self._moments(members[0])["step"].item()) for group, members in flats}

    def set_optimizer_steps(self, steps: Mapping[str, int]) -> None:
        """Set the step counters; a group that was not saved (it was frozen) keeps 0."""
        for group, members in zip(self.groups, self._flat_weights_by_group(), strict=True):
            for flat in members:
                self._moments(flat)["step"].fill_(float(steps.get(group.name, 0)))

    def close(self) -> None:
        """Take the hooks off and drop the buffers, so that another engine can be built."""
        self._engine.destroy()

    # ---- what differs between the ZeRO stages

    def _flat_weights_by_group(self) -> list[list[Tensor]]:
        """The flat fp32 tensors that AdamW moves on this rank, for each group."""
        if self.zero_stage < 3:
            return [[flat] for flat in self._zero.single_partition_of_fp32_groups]
        by_group: list[list[Tensor]] = [[] for _ in self.groups]
        for number, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
            by_group[self._zero.sub_group_to_group_id[number]].append(flat)
        return by_group

    def _moments(self, flat: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._zero.optimizer.state[flat]
        return state

    def _create_moments(self) -> None:
        """Create AdamW's state as its first step would, so that a checkpoint of step 0 and a load have a target."""
        for members in self._flat_weights_by_group():
            for flat in members:
                self._moments(flat).update(
                    step=torch.tensor(0.0), exp_avg=torch.zeros_like(flat), exp_avg_sq=torch.zeros_like(flat)
                )

    def _slice(self, name: str, parameter: nn.Parameter) -> Slice | None:
        if not parameter.requires_grad:
            return self._frozen_slice(name, parameter)
        if self.zero_stage < 3:
            return self._fragment(name, parameter)
        return self._partition(name, parameter)

    def _fragment(self, name: str, parameter: nn.Parameter) -> Slice | None:
        """ZeRO 1 and 2: the parameter's part in this rank's share of its group's flat fp32 tensor."""
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
        at, length = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        start = mapping.lp_fragment_address.start
        return self._views(Slice(name, start, parameter.numel(), flat.data), flat, at, length)

    def _partition(self, name: str, parameter: nn.Parameter) -> Slice:
        """ZeRO 3: rank r holds elements r p .. (r + 1) p of the parameter, the last rank with padding."""
        number, at, padded = self._zero.grad_position[self._zero.get_param_id(parameter)]
        flat = self._zero.fp32_partitioned_groups_flat[number]
        start = self.mesh.rank * padded
        size = parameter.ds_numel  # type: ignore[attr-defined]
        return self._views(Slice(name, start, size, flat.data), flat, at, max(0, min(padded, size - start)))

    def _views(self, whole: Slice, flat: Tensor, at: int, length: int) -> Slice:
        moments = self._moments(flat)
        return replace(
            whole,
            weight=flat.data.narrow(0, at, length),
            exp_avg=moments["exp_avg"].narrow(0, at, length),
            exp_avg_sq=moments["exp_avg_sq"].narrow(0, at, length),
        )

    def _frozen_slice(self, name: str, parameter: nn.Parameter) -> Slice:
        """A frozen parameter: the partition of ZeRO 3, or an even share of what every rank holds whole."""
        if self.zero_stage == 3:
            flat, size = parameter.ds_tensor.data.view(-1), parameter.ds_numel  # type: ignore[attr-defined]
            start = self.mesh.rank * flat.numel()
            return Slice(name, start, size, flat.narrow(0, 0, max(0, min(flat.numel(), size - start))))
        flat = parameter.data.view(-1)
        share = math.ceil(flat.numel() / self.mesh.world_size)
        start = min(self.mesh.rank * share, flat.numel())
        return Slice(name, start, flat.numel(), flat[start : start + share])

    def _fill_missing_gradients(self) -> None:
        """Give a zero gradient to what this rank's graph did not touch, so that all ranks reduce the same list."""
        for name, parameter in self._parameters.items():
            if not parameter.requires_grad or parameter.grad is not None:
                continue
            zeros = torch.zeros(self.shapes[name], dtype=torch.float32, device=self.mesh.device)
            if parameter.data.shape == zeros.shape:
                parameter.grad = zeros
                continue
            # ZeRO 3 keeps an empty tensor where the parameter was, and torch wants a gradient of equal shape.
            empty = parameter.data
            parameter.data = zeros
            parameter.grad = torch.zeros_like(zeros)
            parameter.data = empty
