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
import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from data_pipeline.cache_record import CacheRecord, CorruptRecordError
from data_pipeline.mixture import ORDER_VERSION, Cursor, num_micro_batches, spread_slots
from data_pipeline.slot_plan import LoaderState, SlotPlanner, StagePlan
from m4v_dist.batch import LatentBatch, Slot
from m4v_dist.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_RESERVE_TRIES = 16
_POLL_S = 0.2


@dataclass(frozen=True)
class StepBatch:
    """This rank's micro-batches of one global step."""

    step: int
    micro_batches: tuple[LatentBatch, ...]


class LatentLoader:
    """Plans and reads the slots of each step; see the module's docstring.

    Constructing reads nothing. `enter` a curriculum stage, then iterate `steps`.

    Args:
        planner: of the run, equal on all ranks; its cache is read.
        rank, world_size: this process among the data-parallel ranks.
        prefetch_steps: steps read ahead by a thread; 0 reads in the caller.
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
        held_out_slots: int = 0,
        max_bad_fraction: float = 0.01,
    ) -> None:
        self._planner = planner
        self._cache = planner.cache
        self._digests = planner.digests()
        self._rank = rank
        self._world_size = world_size
        self._prefetch_steps = prefetch_steps
        self._held_out_slots = held_out_slots
        self._max_bad_fraction = max_bad_fraction
        self._state = LoaderState()
        self._stage: StagePlan | None = None
        self._reader: _Prefetcher | None = None
        self._bad: dict[tuple[str, int], str] = {}
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
            "next_step": self._state.next_step,
            "cursors": {name: asdict(cursor) for name, cursor in sorted(self._state.cursors.items())},
            "samples_seen": dict(sorted(self._state.samples_seen.items())),
            "tokens_seen": dict(sorted(self._state.tokens_seen.items())),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state, of any rank and world size; `enter` the stage of its next step afterwards.

        Raises:
            ConfigError: it belongs to another seed, batch or sync group, so the order of the data would change.
            DataError: its cursors are of another order of the records than this code walks; a field of it is missing;
                or the cache now holds other records of a source, so the cursors would point elsewhere.
        """
        self.close()
        _require_order(state)
        _require_fields(state, self.state_dict())
        for name, value in self._planner.identity.items():
            if state[name] != value:
                raise ConfigError(
                    f"loader: the checkpoint was made with {name}={state[name]}, the run has {value}; that would "
                    "repeat and skip records. Set it back, or start a new run folder."
                )
        self._require_same_records(state["index"])
        self._state = LoaderState(
            next_step=state["next_step"],
            cursors={name: Cursor(**cursor) for name, cursor in state["cursors"].items()},
            samples_seen=dict(state["samples_seen"]),
            tokens_seen=dict(state["tokens_seen"]),
        )

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
        return {f"{source}/{self._cache.rows(source)[record].key}": e for (source, record), e in self._bad.items()}

    def close(self) -> None:
        """Stop the prefetch thread; nothing that was not handed out counts as seen."""
        if self._reader is not None:
            self._reader.stop()
            self._reader = None

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
            for batch, self._state in prepared:
                yield batch
            return
        reader = self._reader = _Prefetcher(prepared, self._prefetch_steps)
        try:
            while self._reader is reader:
                batch, state = reader.get()
                self._state = state
                yield batch
            raise RuntimeError("loader: these steps ended when the loader was closed, entered or loaded anew")
        finally:
            reader.stop()

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
                    [(slots[at % len(slots)], self._read(slots[at % len(slots)])) for at in part],
                    self._held_out_slots,
                    num_fillers=sum(at >= len(slots) for at in part),
                )
                for part in parts
            )
        except CorruptRecordError as error:
            raise DataError(
                f"held-out record {error}; held-out slots are fixed: {self._cache.how_to_redo([error.shard])}."
            ) from error

    # ---- reading

    def _prepare(self, stage: StagePlan, state: LoaderState) -> Iterator[tuple[StepBatch, LoaderState]]:
        while True:
            slots, after = self._planner.plan(stage, state)
            yield self._read_step(stage, state.next_step, slots), after
            state = after

    def _read_step(self, stage: StagePlan, step: int, slots: list[Slot]) -> StepBatch:
        num_micro = num_micro_batches(len(slots), self._world_size, stage.settings.micro_batch_slots)
        mine = spread_slots([slot.num_tokens for slot in slots], self._world_size, num_micro)[self._rank]
        size = -(-len(slots) // (self._world_size * num_micro))
        filler = min(slots, key=lambda slot: (slot.num_tokens, slot.index)).index
        # members of a sync group on this rank share one read
        read: dict[tuple[str, int], CacheRecord] = {}
        batches = []
        for members in mine:
            num_fillers = size - len(members)
            items = [self._read_slot(stage, slots[index], read) for index in [*members, *[filler] * num_fillers]]
            batches.append(self._batch(items, self._planner.num_slots, num_fillers=num_fillers))
        return StepBatch(step, tuple(batches))

    def _read_slot(
        self, stage: StagePlan, slot: Slot, read: dict[tuple[str, int], CacheRecord]
    ) -> tuple[Slot, CacheRecord]:
        place = (slot.source, slot.record)
        self._num_slots_read += 1
        for attempt in range(_RESERVE_TRIES):
            if place not in read and place not in self._bad:
                try:
                    read[place] = self._read_record(*place)
                except CorruptRecordError as error:
                    self._bad[place] = str(error)
                    logger.warning("damaged record %d of this rank, replaced: %s", len(self._bad), error)
            if place in read:
                record = place[1]
                return replace(slot, record=record, key=self._cache.rows(slot.source)[record].key), read[place]
            if attempt == 0:
                self._num_slots_replaced += 1
            self._require_few_bad()
            place = (slot.source, self._planner.reserve(stage, slot, attempt))
        raise DataError(
            f"loader: step {slot.step}, slot {slot.index}: {_RESERVE_TRIES} records of {slot.source} in a row are "
            "damaged; precompute the source again."
        )

    def _read(self, slot: Slot) -> CacheRecord:
        return self._read_record(slot.source, slot.record)

    def _read_record(self, source: str, record: int) -> CacheRecord:
        return self._cache.read(self._cache.rows(source)[record])

    def _require_few_bad(self) -> None:
        """Stop past the ceiling. One damaged record is let pass: in a small cache it is more than any fraction."""
        if len(self._bad) > 1 and self._num_slots_replaced > self._max_bad_fraction * self._num_slots_read:
            raise DataError(
                f"loader: rank {self._rank} met {len(self._bad)} damaged records in {self._num_slots_replaced} of the "
                f"{self._num_slots_read} slots that it read, more than "
                f"precompute.max_bad_fraction={self._max_bad_fraction:g}: {sorted(self.bad_records)[:5]}; "
                f"{self._cache.how_to_redo(self._cache.rows(source)[record].shard for source, record in self._bad)}."
            )

    def _batch(self, items: list[tuple[Slot, CacheRecord]], num_slots: int, *, num_fillers: int) -> LatentBatch:
        return LatentBatch(
            slots=tuple(slot for slot, _ in items),
            # a causal codec makes a shorter clip a prefix of a longer one
            latents=tuple(record.latents[:, : slot.unit].contiguous() for slot, record in items),  # c t h w
            text=tuple(record.text for _, record in items),
            null_text=self._cache.null_text,
            weights=(1.0,) * (len(items) - num_fillers) + (0.0,) * num_fillers,
            global_num_slots=num_slots,
        )


def _require_order(state: Mapping[str, Any]) -> None:
    """Check that a state's cursors count along the order that this code walks in; states of version 1 did not say.

    Raises:
        DataError: they do not.
    """
    version = state.get("order_version", 1)
    if version != ORDER_VERSION:
        raise DataError(
            f"loader: the checkpoint's cursors are of order version {version}, this code walks the records in order "
            f"{ORDER_VERSION}; going on would repeat and skip records. Go on with the version of the code that wrote "
            "it, or start a new run folder (warm_start.weights takes over weights)."
        )


def _require_fields(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that a state has every field of `wanted`, and each cursor its own.

    A cursor that lost a field would else start at that field's default and repeat records.

    Raises:
        DataError: naming the missing ones.
    """
    missing = sorted(wanted.keys() - state.keys())
    cursor_fields = {field.name for field in fields(Cursor)}
    for walk, cursor in sorted(state.get("cursors", {}).items()):
        missing += [f"cursors.{walk}.{name}" for name in sorted(cursor_fields - cursor.keys())]
    if missing:
        raise DataError(
            f"loader: the checkpoint's loader state has no {', '.join(missing)}; it is damaged, or another version of "
            "the code wrote it. Remove that checkpoint, so that the run goes on from the one before it, go on with the "
            "version that wrote it, or start a new run folder."
        )


class _Prefetcher:
    """A thread that runs an iterator a few items ahead and hands over its items, or its error."""

    def __init__(self, items: Iterator[tuple[StepBatch, LoaderState]], num_ahead: int) -> None:
        self._items = items
        self._queue: queue.Queue[tuple[StepBatch, LoaderState] | BaseException] = queue.Queue(num_ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loader-prefetch", daemon=True)
        self._thread.start()

    def get(self) -> tuple[StepBatch, LoaderState]:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self) -> None:
        """End the thread; waits for the read that is under way."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    return
        # not swallowed: whatever it is, the consumer's get() raises it
        except BaseException as error:
            self._put(error)

    def _put(self, item: tuple[StepBatch, LoaderState] | BaseException) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False
