"""Which source and record each slot of a step takes: pure numbers, no torch, no file.

A step has S slots in S/G sync groups. The source of a group is drawn by weight from a counter: (seed, step, group)
alone. A group of a video source shares one record (its members train different units of it); every slot of any other
group takes a record of its own. The records of a source are walked in a new order each epoch (`permutation.py`: no
table, so a walk of ten million records begins and resumes like one of ten); a cursor says how far. So the plan of a
step depends on the seed and the cursors, never on a rank, a world size or a call count, and over an epoch no record is
repeated or skipped.
"""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.permutation import NUM_ROUNDS, Permutation

ORDER_VERSION = 2
"""Raised whenever equal settings and cursors come to mean other records, so that no old cursor is taken for a new one.

1: rows sorted by a hash of each; 2: `permutation.py`, captions drawn, the reserve by length."""

Draw = Callable[..., int]
"""Hash of its parts to 63 bits: `m4v_dist.batch.derive_seed`, passed in because its file brings torch."""

_DRAW_RANGE = 2.0**63


@dataclass(frozen=True)
class Cursor:
    """How far a walk has come: `position` records of epoch `epoch` are taken."""

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True)
class Walk:
    """The records of one source that a curriculum stage may take.

    Args:
        name: of the cursor: the source and its buckets, so that a stage of other buckets walks by itself.
        num_rows: records, > 0.
        shares_record: whether a sync group takes one record together.
    """

    name: str
    num_rows: int
    shares_record: bool


@dataclass(frozen=True)
class Pick:
    """What one slot takes: `row` counts in its walk, 0-based; `group` and `member` place it in the step."""

    source: str
    row: int
    group: int
    member: int


class Mixture:
    """Plans steps of one curriculum stage.

    Args:
        seed: of the run.
        draw: see `Draw`.
        weights: share of each source, > 0; need not sum to 1.
        walks: one per source of `weights`.
        num_groups: sync groups of a step.
        group_size: G.
    """

    def __init__(
        self,
        seed: int,
        draw: Draw,
        *,
        weights: Mapping[str, float],
        walks: Mapping[str, Walk],
        num_groups: int,
        group_size: int,
    ) -> None:
        assert set(weights) == set(walks), "each weight has its walk"
        self._seed = seed
        self._draw = draw
        self._weights = dict(sorted(weights.items()))
        self._walks = dict(walks)
        self._num_groups = num_groups
        self._group_size = group_size

    def plan(self, step: int, cursors: Mapping[str, Cursor]) -> tuple[list[Pick], dict[str, Cursor]]:
        """Choose the records of one step.

        Args:
            step: global step.
            cursors: where each walk stands before it; a walk that is missing starts.

        Returns:
            one pick per slot, in slot order; and the cursors after the step.
        """
        after = dict(cursors)
        taken: list[tuple[str, int, Cursor]] = []
        for group in range(self._num_groups):
            source = self._source_of(step, group)
            walk = self._walks[source]
            count = 1 if walk.shares_record else self._group_size
            taken += [(source, group, place) for place in _take(walk, count, after)]
        picks: list[Pick] = []
        for (source, group, _), row in zip(taken, self._rows(taken), strict=True):
            if self._walks[source].shares_record:
                picks += [Pick(source, row, group, member) for member in range(self._group_size)]
            else:
                picks.append(Pick(source, row, group, len(picks) % self._group_size))
        return picks, after

    def _source_of(self, step: int, group: int) -> str:
        threshold = self._draw(self._seed, "source", step, group) / _DRAW_RANGE * sum(self._weights.values())
        for source, weight in self._weights.items():
            threshold -= weight
            if threshold < 0:
                return source
        return source  # the draw rounded up to 1

    def _rows(self, taken: Sequence[tuple[str, int, Cursor]]) -> list[int]:
        """The row at each place; those of one walk and epoch together, since numpy is quick with many."""
        together: dict[tuple[str, int], list[int]] = {}
        for number, (source, _, place) in enumerate(taken):
            together.setdefault((source, place.epoch), []).append(number)
        rows = [0] * len(taken)
        for (source, epoch), numbers in together.items():
            positions = np.array([taken[number][2].position for number in numbers])
            found = self._order(self._walks[source], epoch).places(positions)
            for number, row in zip(numbers, found.tolist(), strict=True):
                rows[number] = row
        return rows

    def _order(self, walk: Walk, epoch: int) -> Permutation:
        """Order of an epoch, equal on every machine."""
        keys = [self._draw(self._seed, "order", walk.name, epoch, number) for number in range(NUM_ROUNDS)]
        return Permutation(walk.num_rows, keys)


def _take(walk: Walk, count: int, cursors: dict[str, Cursor]) -> list[Cursor]:
    """Take the next places of a walk, each an epoch and a position in it; moves its cursor."""
    places = []
    cursor = cursors.get(walk.name, Cursor())
    for _ in range(count):
        if cursor.position == walk.num_rows:
            cursor = Cursor(cursor.epoch + 1, 0)
        places.append(cursor)
        cursor = Cursor(cursor.epoch, cursor.position + 1)
    cursors[walk.name] = cursor
    return places


def num_micro_batches(num_slots: int, world_size: int, micro_batch_slots: int) -> int:
    """Micro-batches of a step on each rank: the fewest that hold all slots, on any number of ranks."""
    return math.ceil(num_slots / (world_size * micro_batch_slots))


def spread_slots(num_tokens: Sequence[int], num_ranks: int, num_micro_batches: int) -> list[list[list[int]]]:
    """Spread slots over ranks and their micro-batches, so that ranks have about equal tokens in all.

    `pack_slots` makes the micro-batches; they go round the ranks from the fullest to the emptiest and back, so that a
    rank with a full one has an empty one too. The n-th micro-batches of all ranks are about equal among themselves.

    Args:
        num_tokens: of each slot.
        num_ranks: data-parallel ranks.
        num_micro_batches: of each rank.

    Returns:
        for each rank, for each of its micro-batches, slot numbers, ascending.
    """
    bins = pack_slots(num_tokens, num_ranks * num_micro_batches)
    bins.sort(key=lambda members: (-sum(num_tokens[slot] for slot in members), members))
    rows = [bins[at : at + num_ranks] for at in range(0, len(bins), num_ranks)]
    turned = [row if number % 2 == 0 else row[::-1] for number, row in enumerate(rows)]
    return [list(micro_batches) for micro_batches in zip(*turned, strict=True)]


def pack_slots(num_tokens: Sequence[int], num_bins: int) -> list[list[int]]:
    """Spread slots over bins of about equal tokens, and of equal count where their number allows it.

    Largest first into the bin with the fewest tokens that still has room; ties go to the lower number, so that all
    ranks get the same answer. Where the bins do not divide the slots, a bin may stay short, or empty.

    Args:
        num_tokens: of each slot.
        num_bins: ranks times micro-batches.

    Returns:
        slot numbers of each bin, ascending; at most slots / bins of them, rounded up.
    """
    room = math.ceil(len(num_tokens) / num_bins)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    # (tokens, bin) of those that have room; a list of equal loads is a heap.
    open_bins = [(0, number) for number in range(num_bins)]
    for slot in sorted(range(len(num_tokens)), key=lambda slot: (-num_tokens[slot], slot)):
        load, target = open_bins[0]
        bins[target].append(slot)
        if len(bins[target]) < room:
            heapq.heapreplace(open_bins, (load + num_tokens[slot], target))
        else:
            heapq.heappop(open_bins)
    return [sorted(members) for members in bins]
