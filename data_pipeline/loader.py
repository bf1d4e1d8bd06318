"""Latent cache to micro-batches: planned alike on all ranks, read by each for itself, resumable anywhere.

Every rank plans all S slots of a step (numbers only) and reads its own records. The state is a small JSON, the same on
all ranks and for any number of them: cursors and counts after the last step that was handed out, however far the
prefetch thread has read. The state holds a digest of each source's index, so that it is refused by a cache with other
records. A record that reads back damaged is counted, named, and replaced from a reserve stream keyed (seed, step,
slot), so that no cursor moves; past a ceiling the run fails. The ceiling is each rank's own, over the slots that it
read itself: it is the same share of the data for any number of ranks.

Any number of ranks will do. All have equally many micro-batches of equally many slots, since a forward is collective
under ZeRO 3, each embedding of each column in it; where the slots do not suffice for all, the last places get a filler:
the shortest slot of the step once more, with weight 0, which no loss, gradient or count holds.

Legend: `c` channels, `t` latents in time, `h` `w` latent grid.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data_pipeline.cache_record import CacheRecord, CorruptRecordError
from data_pipeline.host_files import SharedReads
from data_pipeline.loader_state import LoaderState, require_fields, require_order
from data_pipeline.mixture import ORDER_VERSION
from data_pipeline.prefetcher import Prefetcher
from data_pipeline.record_bytes import RecordBytes
from data_pipeline.record_reader import RecordReader
from data_pipeline.slot_plan import SlotPlanner, StagePlan
from data_pipeline.step_reads import Place, StepInFlight, StepReads, place_of
from m4v_dist.batch import LatentBatch, Slot, TextFeatures
from m4v_dist.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_RESERVE_TRIES = 16


@dataclass(frozen=True)
class StepBatch:
    """This rank's micro-batches of one global step.

    Args:
        step: its number.
        micro_batches: as many on each rank.
        token_imbalance: tokens of the rank that has the most over the mean of all ranks, minus 1; fillers count.
    """

    step: int
    micro_batches: tuple[LatentBatch, ...]
    token_imbalance: float


class LatentLoader:
    """Plans and reads the slots of each step; see the module's docstring.

    Constructing reads nothing. `enter` a curriculum stage, then iterate `steps`.

    Args:
        planner: of the run, equal on all ranks; its cache is read.
        rank, world_size: this process among the data-parallel ranks.
        prefetch_steps: steps whose reads are begun ahead of the one that is handed out next, by a thread that also
            has that one ready; 0 reads when a step is asked for.
        reads_in_flight: reads of one rank at the same time.
        shared: where ranks of this host share what several of them take in a step; None: each reads for itself.
        has_twins: other ranks have this rank's very slots, those that cut their sequences with it.
        pin_memory: hand out page-locked tensors, so that copies to a GPU do not wait.
        held_out_slots: H; 0 for none.
        max_bad_fraction: slots of this rank whose record was damaged over all slots that this rank read; past it, and
            with more than one damaged record, the run fails.
    """

    def __init__(
        self,
        planner: SlotPlanner,
        *,
        rank: int,
        world_size: int,
        prefetch_steps: int = 2,
        reads_in_flight: int = 4,
        shared: SharedReads | None = None,
        has_twins: bool = False,
        pin_memory: bool = False,
        held_out_slots: int = 0,
        max_bad_fraction: float = 0.01,
    ) -> None:
        self._planner = planner
        self._cache = planner.cache
        self._digests = planner.digests()
        self._rank = rank
        self._world_size = world_size
        self._prefetch_steps = prefetch_steps
        self._records = RecordReader(planner.cache, reads_in_flight, shared)
        self._reads = StepReads(
            planner, self._records, rank=rank, world_size=world_size, is_sharing=shared is not None,
            has_twins=has_twins,
        )  # fmt: skip
        self._pin_memory = pin_memory
        self._held_out_slots = held_out_slots
        self._max_bad_fraction = max_bad_fraction
        self._state = LoaderState()
        self._stage: StagePlan | None = None
        self._prefetcher: Prefetcher[tuple[StepBatch, LoaderState]] | None = None
        self._wait_s = self._token_imbalance = 0.0
        self._bad: dict[Place, str] = {}
        self._num_slots_read = 0
        self._num_slots_replaced = 0

    # ---- where it stands

    def enter(self, curriculum_stage_index: int, step: int) -> None:
        """Go to a curriculum stage, to hand out `step` next.

        Raises:
            DataError: a source has too few records in the stage's buckets for one step.
            ConfigError: a bucket that the pyramid cannot divide; or `step` is not the one that the state is at.
        """
        self.close()
        if self._state.next_step != step:
            raise ConfigError(
                f"loader: asked for step {step}, but its state is before step {self._state.next_step}; "
                "load the loader state of the checkpoint that the trainer resumes from."
            )
        self._stage = self._planner.stage(curriculum_stage_index)

    def state_dict(self) -> dict[str, Any]:
        """State after the last step handed out, as JSON values; the same on every rank."""
        return {
            "order_version": ORDER_VERSION,
            **self._planner.identity,
            "index": self._digests,
            **self._state.to_json(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state, of any rank and world size; `enter` the stage of its next step afterwards.

        Raises:
            ConfigError: it belongs to another seed, batch or sync group, so the order of the data would change.
            DataError: its cursors are of another order of the records than this code walks; a field of it is missing;
                or the cache now holds other records of a source, so the cursors would point elsewhere.
        """
        self.close()
        require_order(state)
        require_fields(state, self.state_dict())
        for name, value in self._planner.identity.items():
            if state[name] != value:
                raise ConfigError(
                    f"loader: the checkpoint was made with {name}={state[name]}, the run has {value}; that would "
                    "repeat and skip records. Set it back, or start a new run folder."
                )
        self._require_same_records(state["index"])
        self._state = LoaderState.from_json(state)

    def _require_same_records(self, index: Mapping[str, str]) -> None:
        differing = [name for name in sorted(index) if self._digests.get(name) != index[name]]
        if differing:
            raise DataError(
                f"loader: the checkpoint was made with other records of {', '.join(differing)} than {self._cache.path} "
                "holds now (clips were added, dropped or made anew); that would repeat and skip records. Bring the "
                "cache back as it was, or start a new run folder."
            )

    @property
    def samples_seen(self) -> Mapping[str, int]:
        """Slots handed out per source since the start of the run, on all ranks; absent before the first."""
        return self._state.samples_seen

    @property
    def tokens_seen(self) -> Mapping[str, int]:
        """Tokens of `samples_seen`, as the records would have without a pyramid."""
        return self._state.tokens_seen

    @property
    def num_bad_records(self) -> int:
        """Damaged records that this rank met so far, each once, those read ahead too; other ranks meet others."""
        return len(self._bad)

    @property
    def bad_records(self) -> dict[str, str]:
        """The records of `num_bad_records`: `source/key` to error."""
        return {f"{source}/{self._cache.table(source).key(record)}": e for (source, record), e in self._bad.items()}

    @property
    def reads(self) -> dict[str, float]:
        """What this rank has read so far (see `ReadCounts`), `wait_s`: how long steps were waited for, and the
        `token_imbalance` of the last one (see `StepBatch`)."""
        return {**self._records.counts, "wait_s": self._wait_s, "token_imbalance": self._token_imbalance}

    def close(self) -> None:
        """Stop reading ahead; nothing that was not handed out counts as seen."""
        if self._prefetcher is not None:
            self._prefetcher.stop()
            self._prefetcher = None
        self._records.close()

    # ---- batches

    def steps(self) -> Iterator[StepBatch]:
        """Hand out the stage's steps without end, reading ahead; one iterator at a time.

        Raises:
            DataError: too many damaged records.
        """
        assert self._stage is not None, "enter() comes first"
        self.close()
        prepared = self._prepare(self._stage, self._state)
        if not self._prefetch_steps:
            while True:
                batch, self._state = self._waited_for(lambda: next(prepared))
                yield batch
        prefetcher = self._prefetcher = Prefetcher(prepared, 1)
        try:
            while self._prefetcher is prefetcher:
                batch, self._state = self._waited_for(prefetcher.get)
                yield batch
            raise RuntimeError("loader: these steps ended when the loader was closed, entered or loaded anew")
        finally:
            prefetcher.stop()

    def _waited_for(self, get: Callable[[], tuple[StepBatch, LoaderState]]) -> tuple[StepBatch, LoaderState]:
        began = time.perf_counter()
        item = get()
        self._wait_s += time.perf_counter() - began
        self._token_imbalance = item[0].token_imbalance
        return item

    def held_out(self) -> tuple[LatentBatch, ...]:
        """This rank's fixed held-out micro-batches, as many on each rank; empty when switched off.

        Raises:
            DataError: no held-out source has a record in the last curriculum stage's buckets, or one is damaged.
        """
        if not self._held_out_slots:
            return ()
        slots = self._planner.held_out(self._held_out_slots)
        size, world_size = self._planner.held_out_micro_batch_slots, self._world_size
        # As many on each rank; what is past the end is a filler.
        mine = [index for index in range(self._rank, -(-len(slots) // world_size) * world_size, world_size)]
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        try:
            return tuple(
                self._batch(
                    [self._held_out_item(slots[at % len(slots)]) for at in part],
                    self._held_out_slots,
                    num_fillers=sum(at >= len(slots) for at in part),
                )
                for part in parts
            )
        except CorruptRecordError as error:
            raise DataError(
                f"held-out record {error}; held-out slots are fixed: {self._cache.how_to_redo([error.shard])}."
            ) from error

    def _held_out_item(self, slot: Slot) -> tuple[Slot, CacheRecord]:
        return slot, self._records.take(self._records.read(*place_of(slot)), slot.caption)

    def plan_ahead(self, num_steps: int) -> list[list[Slot]]:
        """The slots of the next steps on all ranks, as they will be handed out; nothing is read, and no state moves."""
        assert self._stage is not None, "enter() comes first"
        steps, state = [], self._state
        for _ in range(num_steps):
            slots, state = self._planner.plan(self._stage, state)
            steps.append(slots)
        return steps

    # ---- reading

    def _prepare(self, stage: StagePlan, state: LoaderState) -> Iterator[tuple[StepBatch, LoaderState]]:
        ahead: deque[StepInFlight] = deque()
        while True:
            while len(ahead) <= self._prefetch_steps:
                ahead.append(self._reads.begin(stage, state, self._bad))
                state = ahead[-1].after
            step = ahead.popleft()
            yield self._finish(stage, step), step.after

    def _finish(self, stage: StagePlan, step: StepInFlight) -> StepBatch:
        read: dict[Place, RecordBytes] = {}
        batches = []
        for members, num_fillers in zip(step.micro_batches, step.num_fillers, strict=True):
            items = [self._take(stage, step, slot, read) for slot in members]
            batches.append(self._batch(items, self._planner.num_slots, num_fillers=num_fillers))
        return StepBatch(step.step, tuple(batches), step.token_imbalance)

    def _take(
        self, stage: StagePlan, step: StepInFlight, slot: Slot, read: dict[Place, RecordBytes]
    ) -> tuple[Slot, CacheRecord]:
        """The slot's record, or one of the reserve where that is damaged."""
        place = place_of(slot)
        self._num_slots_read += 1
        for attempt in range(_RESERVE_TRIES):
            if place not in read and place not in self._bad:
                try:
                    read[place] = self._read(place, step)
                except CorruptRecordError as error:
                    self._bad[place] = str(error)
                    logger.warning("damaged record %d of this rank, replaced: %s", len(self._bad), error)
            if place in read:
                slot = self._planner.with_record(slot, place[1]) if attempt else slot
                return slot, self._records.take(read[place], slot.caption)
            if attempt == 0:
                self._num_slots_replaced += 1
            self._require_few_bad()
            place = (slot.source, self._planner.reserve(stage, slot, attempt))
        raise DataError(
            f"loader: step {slot.step}, slot {slot.index}: {_RESERVE_TRIES} records of {slot.source} in a row are "
            "damaged; precompute the source again."
        )

    def _read(self, place: Place, step: StepInFlight) -> RecordBytes:
        begun = step.reads.get(place)
        if begun is not None:
            return begun.result()
        return self._records.read(*place, is_shared=False)

    def _require_few_bad(self) -> None:
        """Stop past the ceiling. One damaged record is let pass: in a small cache it is more than any fraction."""
        if len(self._bad) > 1 and self._num_slots_replaced > self._max_bad_fraction * self._num_slots_read:
            raise DataError(
                f"loader: rank {self._rank} met {len(self._bad)} damaged records in {self._num_slots_replaced} of the "
                f"{self._num_slots_read} slots that it read, more than "
                f"precompute.max_bad_fraction={self._max_bad_fraction:g}: {sorted(self.bad_records)[:5]}; "
                f"{self._cache.how_to_redo(self._cache.table(source).shard(record) for source, record in self._bad)}."
            )

    def _batch(self, items: list[tuple[Slot, CacheRecord]], num_slots: int, *, num_fillers: int) -> LatentBatch:
        return LatentBatch(
            slots=tuple(slot for slot, _ in items),
            # a causal codec makes a shorter clip a prefix of a longer one
            latents=tuple(self._handed_out(record.latents[:, : slot.unit]) for slot, record in items),  # c t h w
            text=tuple(self._text(record.text) for _, record in items),
            null_text=self._text(self._cache.null_text),
            weights=(1.0,) * (len(items) - num_fillers) + (0.0,) * num_fillers,
            global_num_slots=num_slots,
        )

    def _text(self, text: TextFeatures) -> TextFeatures:
        return TextFeatures(self._handed_out(text.tokens), self._handed_out(text.pooled))

    def _handed_out(self, tensor: Tensor) -> Tensor:
        """Contiguous, and page-locked where a GPU takes it."""
        if not self._pin_memory:
            return tensor.contiguous()
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
