"""What the trainer asks of the parts that it is given: objective and loader (it imports neither)."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from m4v_dist.batch import LatentBatch


class ObjectiveOutput(Protocol):
    """What the objective returns for a micro-batch."""

    @property
    def loss(self) -> Tensor:
        """Scalar with gradient: sum over slots of weight * loss, divided by the slots of the global batch."""
        ...

    @property
    def slot_losses(self) -> Tensor:
        """[slots], detached: each slot's own loss, before its weight; what is read where a step is not finite."""
        ...

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """Name to [2]: sum and count over slots, so that ranks and micro-batches add up; always the same names."""
        ...


Objective = Callable[[nn.Module, LatentBatch], ObjectiveOutput]

Place = Callable[[str, nn.Module], None]
"""Is given a part's name in the model and the part with fresh weights; may fill it, and takes its memory over."""
BuildModel = Callable[[Place], nn.Module]
"""Builds the model, the same on every rank, and hands each of its parts on before the next one has memory."""

BatchFlops = Callable[[LatentBatch, tuple[str, ...]], tuple[float, float]]
"""FLOPs of a micro-batch's forward and backward under a freeze set: what the model needs, and with recompute and filler
slots."""


class StepBatch(Protocol):
    """This rank's micro-batches of one global step."""

    @property
    def step(self) -> int: ...

    @property
    def micro_batches(self) -> tuple[LatentBatch, ...]: ...


class Loader(Protocol):
    """One rank's loader."""

    def enter(self, curriculum_stage_index: int, step: int) -> None:
        """Go to a curriculum stage, to hand out `step` next."""
        ...

    def steps(self) -> Iterator[StepBatch]:
        """Steps of the stage, without end."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON after the last step handed out, the same on every rank."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of any world size."""
        ...

    def held_out(self) -> tuple[LatentBatch, ...]:
        """Fixed micro-batches, as many on each rank."""
        ...

    def close(self) -> None:
        """Stop reading ahead."""
        ...

    @property
    def samples_seen(self) -> Mapping[str, int]:
        """Slots handed out per source since the start of the run, on all ranks; part of the state."""
        ...

    @property
    def tokens_seen(self) -> Mapping[str, int]:
        """Their tokens, counted without a pyramid."""
        ...

    @property
    def num_bad_records(self) -> int:
        """Damaged records that this rank has met and replaced since it began."""
        ...

    @property
    def reads(self) -> Mapping[str, float]:
        """What this rank has read since it began, and how evenly the tokens of its last step lie, by name."""
        ...
