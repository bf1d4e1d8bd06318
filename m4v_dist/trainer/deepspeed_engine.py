"""DeepSpeed behind a small wrapper: settings to its dict, gradients of a whole step.

The only file that imports deepspeed. What a rank owns of each parameter: `zero_slices.py`.

Three traps of DeepSpeed 0.19 shape this file:
- `bf16.enabled` turns every parameter, A_log too, to bfloat16 inside forward; its `torch_autocast` section does not.
- Gradients are averaged over ranks; the loss here is a share of a global sum, so it is scaled by the world size first.
- Gradients are put in a bucket in the order in which backward reaches them, and reduced as one flat tensor: two ranks
  whose graphs differ (images on one, video on the other) would add up different parameters, without an error.
  `coalesce_grad_reduction` reduces once a step in the fixed order of the groups, for the price of full local gradients:
  4 bytes a parameter on every rank. `reduce_gradients = "per_micro_batch"` saves them; the order in which gradients
  come is then compared over ranks in each step.
"""

import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from m4v_dist.config.training_settings import TrainerSettings
from m4v_dist.errors import ConfigError
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer.compiled_blocks import compile_blocks
from m4v_dist.trainer.optimizer import ParameterGroup, is_frozen, parameter_groups
from m4v_dist.trainer.zero_slices import Slice, ZeroSlices

logger = logging.getLogger(__name__)


def deepspeed_config(settings: TrainerSettings, *, micro_batch_slots: int, mesh: Mesh) -> dict[str, Any]:
    """Translate settings to DeepSpeed's dict.

    Gradient accumulation is 1 here: one `ZeroEngine.accumulate()` block is one step, however many micro-batches it has.
    """
    has_gpu = mesh.device.type == "cuda"
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_slots,
        "gradient_accumulation_steps": 1,
        "train_batch_size": micro_batch_slots * mesh.world_size,
        "gradient_clipping": settings.max_grad_norm,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": settings.zero_stage,
            "overlap_comm": False,
            # It would replace torch.nn.functional.linear for the whole process, by one that adds its bias in place to
            # what selective recompute keeps.
            "memory_efficient_linear": False,
            "zero_hpz_partition_size": settings.hpz_partition_size,
        },
    }
    if settings.offload == "optimizer":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": has_gpu}
        # Else it insists on its own AdamW for CPUs, which needs a compiler at start; torch has a fused one too.
        config["zero_force_ds_cpu_optimizer"] = False
    if settings.precision == "bfloat16":
        # No "safe" modules: a module on that list has its gradients reduced in bfloat16 too.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config


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


def partition(part: nn.Module, settings: TrainerSettings, mesh: Mesh) -> None:
    """Under ZeRO 3: leave each rank its share of a part's parameters, and free the rest (collective).

    Rank 0's values count. A model that is built part by part so takes, at any time, its own share and the largest part
    whole. Parameters stay float32. Under ZeRO 1 and 2 nothing happens: each rank holds all weights.
    """
    if settings.zero_stage < 3:
        return
    prepare_process(mesh)
    import deepspeed

    if settings.hpz_partition_size > 1 and deepspeed.utils.groups._get_zero_param_intra_parallel_group() is None:
        # Each part asks for the groups, and asking twice would die.
        deepspeed.utils.groups._create_zero_param_parallel_group(settings.hpz_partition_size)
    # Without a dtype of its own it takes the config's, float32; one that is given it takes for another (0.19.8).
    deepspeed.zero.Init(
        module=part,
        config_dict_or_path=deepspeed_config(settings, micro_batch_slots=1, mesh=mesh),
        zero_param_parallel_group=deepspeed.utils.groups._get_zero_param_intra_parallel_group(),
    )


class ZeroEngine:
    """A model under ZeRO 1, 2 or 3 with AdamW.

    Building one is collective and takes the model over: its parameters are moved into DeepSpeed's buffers.

    Args:
        model: float32 parameters, on any device; whole, or under ZeRO 3 partitioned by `partition`.
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
        self.is_offloaded = settings.offload == "optimizer"
        self._prepare_blocks(model, settings)
        for name, parameter in model.named_parameters():
            # DeepSpeed never moves a parameter that is unfrozen later, so this holds for the engine's whole life.
            parameter.requires_grad_(not is_frozen(name, freeze))
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()
        }
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
            fused=True if self.is_offloaded else None,
        )
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(settings, micro_batch_slots=micro_batch_slots, mesh=mesh),
            dist_init_required=False,
        )
        self._parameters = dict(self._engine.module.named_parameters())
        # Which parameters' gradients came in this step, in order; None where the order does not matter.
        self._arrivals: list[int] | None = [] if settings.reduce_gradients == "per_micro_batch" else None
        self._num_left = 0
        self._note_arrivals()
        self._slices = ZeroSlices(self._zero, self._parameters, mesh, self.zero_stage)
        self._slices.create_moments()

    def _prepare_blocks(self, model: nn.Module, settings: TrainerSettings) -> None:
        """Under ZeRO 3: gather and release a block as one; and compile the blocks where that is asked for."""
        from deepspeed.utils import set_z3_leaf_module

        blocks: list[nn.Module] = getattr(model, "blocks", [])
        if settings.zero_stage == 3:
            for block in blocks:
                set_z3_leaf_module(block, True)
        if settings.compile == "blocks":
            if not blocks:
                raise ConfigError(f'trainer.compile="blocks", but a {type(model).__name__} has none; set it to "none".')
            compile_blocks(blocks)

    @property
    def model(self) -> nn.Module:
        """What to call for a forward: DeepSpeed's module, which gathers and casts."""
        return self._engine

    @contextmanager
    def accumulate(self, num_micro_batches: int = 1) -> Iterator[None]:
        """Collect the gradients of one step; on leaving the block they are reduced over ranks (collective).

        Args:
            num_micro_batches: how often `backward` will be called; read only where each of them reduces.

        Raises:
            RuntimeError: gradients were to be reduced per micro-batch, and came in another order on another rank.
        """
        if self._arrivals is None:
            with self._engine.coalesce_grad_reduction():
                yield
                self._fill_missing_gradients()
            return
        self._arrivals.clear()
        self._num_left = num_micro_batches
        yield
        assert self._num_left == 0, f"{self._num_left} of {num_micro_batches} micro-batches had no backward"
        digest = hashlib.blake2b(repr(self._arrivals).encode()).hexdigest()
        if len(set(self.mesh.gather(digest))) > 1:
            raise RuntimeError(
                "gradients came in another order on another rank, so different parameters were added up; the step is "
                'lost: set trainer.reduce_gradients="per_step".'
            )

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, this micro-batch's share of the global loss; sums over ranks and micro-batches.

        Args:
            loss: scalar; sum over this micro-batch's slots of weight * loss / S.
        """
        if self._arrivals is not None:
            self._num_left -= 1
            self._engine.set_gradient_accumulation_boundary(self._num_left == 0)
        self._engine.backward(loss * self.mesh.world_size, scale_wrt_gas=False)

    def step(self, lr: float, *, fresh_scale: float = 1.0) -> float | None:
        """Clip and move the weights (collective).

        Args:
            lr: learning rate of this step.
            fresh_scale: the rate of fresh parameters (`optimizer.parameter_set`) over that of the others.

        Returns:
            The gradient's global norm before clipping, or None if it was not finite: then no rank moved anything.
        """
        for of_optimizer, group in zip(self._zero.param_groups, self.groups, strict=True):
            of_optimizer["lr"] = lr * fresh_scale if group.is_fresh else lr
        self._engine.step()
        if not self._engine.was_step_applied():
            return None
        return float(self._engine.get_global_grad_norm())

    def discard(self) -> None:
        """Drop this step's gradients on all ranks; weights and moments stay as they are (collective)."""
        # A NaN in the reduced gradients walks DeepSpeed's own way of skipping a step, at each stage: the global norm
        # is agreed by all ranks, and an invalid one returns before the optimizer. With offload the gradients are on the
        # host by now, and the norm is put together from one number for each parameter.
        if self.is_offloaded:
            norms = self._zero.norm_for_param_grads
            norms.update(dict.fromkeys(norms, torch.tensor(math.nan)))
        else:
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
        return self._slices.owned()

    def slices_to_load(self) -> list[Slice]:
        """The same, but with frozen parameters whole where every rank holds them whole (ZeRO 1 and 2)."""
        return self._slices.to_load()

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
        # hpZ's copies; DeepSpeed's own way leaves out those of frozen parameters.
        for parameter in self._parameters.values():
            parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]

    def optimizer_steps(self) -> dict[str, int]:
        """AdamW's step counter of each group."""
        return {group.name: steps for group, steps in zip(self.groups, self._slices.steps(), strict=True)}

    def set_optimizer_steps(self, steps: Mapping[str, int]) -> None:
        """Set the step counter of each group."""
        self._slices.set_steps([steps[group.name] for group in self.groups])

    def close(self) -> None:
        """Take the hooks off and give the memory back, so that another engine can be built; what is left is empty."""
        self._engine.destroy()
        # DeepSpeed 0.19 frees nothing itself, and its own globals hold every engine of ZeRO 3 for ever: a run would
        # hold one more at each boundary of a curriculum stage.
        for parameter in self._parameters.values():
            parameter.grad = None
            parameter.data = torch.empty(0, device=self.mesh.device)
            parameter.__dict__.clear()
        for holder in (self._zero.optimizer, self._zero):
            holder.__dict__.clear()
        if self.mesh.device.type == "cuda":
            torch.cuda.empty_cache()

    def _note_arrivals(self) -> None:
        if self._arrivals is None:
            return
        for number, parameter in enumerate(self._parameters.values()):
            if parameter.requires_grad:
                parameter.register_hook(lambda _, number=number, seen=self._arrivals: seen.append(number))

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
