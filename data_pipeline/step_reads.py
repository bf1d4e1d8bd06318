"""Which records a rank takes in a step, which of them others take too, and their reads begun."""

from collections.abc import Container, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from data_pipeline.loader_state import LoaderState
from data_pipeline.mixture import num_micro_batches, spread_slots
from data_pipeline.record_bytes import RecordBytes
from data_pipeline.record_reader import RecordReader
from data_pipeline.slot_plan import SlotPlanner, StagePlan
from m4v_dist.batch import Slot

Place = tuple[str, int]
"""A source, and the position of a record in its table."""


@dataclass(frozen=True)
class StepInFlight:
    """A step whose reads are under way.

    Args:
        step: its number.
        micro_batches: this rank's slots, fillers at the end.
        num_fillers: of each micro-batch.
        reads: of the records that they take, each once.
        shared: those of them that other ranks take too.
        token_imbalance: tokens of the rank that has the most over the mean of all ranks, minus 1; fillers count.
        after: the state after the step.
    """

    step: int
    micro_batches: tuple[tuple[Slot, ...], ...]
    num_fillers: tuple[int, ...]
    reads: Mapping[Place, "Future[RecordBytes]"]
    shared: frozenset[Place]
    token_imbalance: float
    after: LoaderState


class StepReads:
    """Begins the steps of one rank.

    Args:
        planner: of the run.
        records: reads them.
        rank, world_size: this process among the data-parallel ranks.
        is_sharing: whether ranks of a host share reads.
        has_twins: other ranks have this rank's very slots.
    """

    def __init__(
        self, planner: SlotPlanner, records: RecordReader, *, rank: int, world_size: int, is_sharing: bool,
        has_twins: bool,
    ) -> None:  # fmt: skip
        self._planner, self._records = planner, records
        self._rank, self._world_size = rank, world_size
        self._is_sharing, self._has_twins = is_sharing, has_twins

    def begin(self, stage: StagePlan, state: LoaderState, known_bad: Container[Place]) -> StepInFlight:
        """Plan a step and begin its reads.

        Args:
            stage: of the step.
            state: before it.
            known_bad: records that are not read, since they were found damaged.
        """
        slots, after = self._planner.plan(stage, state)
        num_micro = num_micro_batches(len(slots), self._world_size, stage.settings.micro_batch_slots)
        spread = spread_slots([slot.num_tokens for slot in slots], self._world_size, num_micro)
        size = -(-len(slots) // (self._world_size * num_micro))
        filler = min(slots, key=lambda slot: (slot.num_tokens, slot.index))
        mine = spread[self._rank]
        loads = [_num_tokens(slots, micro, size, filler) for micro in spread]
        micro_batches = tuple(
            (*(slots[index] for index in members), *[filler] * (size - len(members))) for members in mine
        )
        wanted = dict.fromkeys(place_of(slot) for members in micro_batches for slot in members)
        shared = self._shared_places(slots, spread, filler)
        reads = {
            place: self._records.start(*place, is_shared=place in shared) for place in wanted if place not in known_bad
        }
        self._records.count_saved(size * num_micro - len(wanted))
        return StepInFlight(
            state.next_step, micro_batches, tuple(size - len(members) for members in mine), reads, shared,
            max(loads) * len(loads) / sum(loads) - 1.0, after,
        )  # fmt: skip

    def _shared_places(self, slots: Sequence[Slot], spread: list[list[list[int]]], filler: Slot) -> frozenset[Place]:
        """The records of a step that more than one rank takes."""
        if not self._is_sharing:
            return frozenset()
        if self._has_twins:
            return frozenset(place_of(slot) for slot in slots)
        ranks: dict[Place, set[int]] = {}
        for rank, micro_batches in enumerate(spread):
            for members in micro_batches:
                for index in members:
                    ranks.setdefault(place_of(slots[index]), set()).add(rank)
        return frozenset(place for place, takers in ranks.items() if len(takers) > 1 or place == place_of(filler))


def place_of(slot: Slot) -> Place:
    """Where a slot's record stands."""
    return slot.source, slot.record


def _num_tokens(slots: Sequence[Slot], micro_batches: Sequence[Sequence[int]], size: int, filler: Slot) -> int:
    """Tokens of a rank's step."""
    num_fillers = sum(size - len(members) for members in micro_batches)
    return (
        sum(slots[index].num_tokens for members in micro_batches for index in members) + num_fillers * filler.num_tokens
    )
