"""What one rank owns under ZeRO 1, 2 or 3, by parameter name and range.

A `Slice` is a range of a flattened parameter with views of the fp32 weight and of AdamW's two moments, whatever the
ZeRO stage. Checkpoint and EMA know slices only, so both re-shard without a conversion. `deepspeed_engine.py` hands in
DeepSpeed's optimizer; where its buffers lie is read here alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from m4v_dist.parallel.mesh import Mesh


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


class ZeroSlices:
    """The slices of one engine.

    Args:
        zero: DeepSpeed's ZeRO optimizer.
        parameters: of the engine's module, in model order.
        mesh: rank facts.
        zero_stage: 1, 2 or 3.
    """

    def __init__(self, zero: Any, parameters: Mapping[str, nn.Parameter], mesh: Mesh, zero_stage: int) -> None:
        self._zero, self._parameters, self._mesh, self._zero_stage = zero, parameters, mesh, zero_stage

    def owned(self) -> list[Slice]:
        """This rank's slices, in model order; over all ranks they cover each parameter exactly once."""
        found = (self._slice(name, parameter) for name, parameter in self._parameters.items())
        return [item for item in found if item is not None and len(item.weight)]

    def to_load(self) -> list[Slice]:
        """The same, but with frozen parameters whole where every rank holds them whole (ZeRO 1 and 2)."""
        if self._zero_stage == 3:
            return self.owned()
        whole = {
            name: Slice(name, 0, parameter.numel(), parameter.data.view(-1))
            for name, parameter in self._parameters.items()
            if not parameter.requires_grad
        }
        return [item for item in self.owned() if item.name not in whole] + list(whole.values())

    def create_moments(self) -> None:
        """Create AdamW's state as its first step would, so that a checkpoint of step 0 and a load have a target."""
        for members in self._flat_weights_by_group():
            for flat in members:
                self._moments(flat).update(
                    step=torch.tensor(0.0), exp_avg=torch.zeros_like(flat), exp_avg_sq=torch.zeros_like(flat)
                )

    def steps(self) -> list[int]:
        """AdamW's step counter of each group."""
        return [int(self._moments(members[0])["step"].item()) for members in self._flat_weights_by_group()]

    def set_steps(self, steps: Sequence[int]) -> None:
        """Set the step counter of each group."""
        for count, members in zip(steps, self._flat_weights_by_group(), strict=True):
            for flat in members:
                self._moments(flat)["step"].fill_(float(count))

    def _flat_weights_by_group(self) -> list[list[Tensor]]:
        """The flat fp32 tensors that AdamW moves on this rank, for each group."""
        if self._zero_stage < 3:
            return [[flat] for flat in self._zero.single_partition_of_fp32_groups]
        by_group: dict[int, list[Tensor]] = {}
        for number, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
            by_group.setdefault(self._zero.sub_group_to_group_id[number], []).append(flat)
        return [by_group[number] for number in sorted(by_group)]

    def _moments(self, flat: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._zero.optimizer.state[flat]
        return state

    def _slice(self, name: str, parameter: nn.Parameter) -> Slice | None:
        if not parameter.requires_grad:
            return self._frozen_slice(name, parameter)
        if self._zero_stage < 3:
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
        start = self._mesh.rank * padded
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
        if self._zero_stage == 3:
            flat, size = parameter.ds_tensor.data.view(-1), parameter.ds_numel  # type: ignore[attr-defined]
            start = self._mesh.rank * flat.numel()
            return Slice(name, start, size, flat.narrow(0, 0, max(0, min(flat.numel(), size - start))))
        flat = parameter.data.view(-1)
        share = math.ceil(flat.numel() / self._mesh.world_size)
        start = min(self._mesh.rank * share, flat.numel())
        return Slice(name, start, flat.numel(), flat[start : start + share])
