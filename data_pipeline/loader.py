"""Latent cache to micro-batches: planned alike on all ranks, read by each for itself, resumable anywhere.

Every rank plans all S slots of a step (numbers only) and reads its own records. The state is a small JSON, the same on
all ranks and for any number of them: cursors and counts after the last step that was handed out, however far the
prefetch thread has read. A record that reads back damaged is counted, named, and replaced from a reserve stream keyed
(seed, step, slot), so that no cursor moves; past a ceiling the run fails.

Legend: `c` channels, `t` latents in time, `h` `w` latent grid.
"""

import logging
import math
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from data_pipeline.latent_cache import CacheRecord, CorruptRecordError, LatentCache
from data_pipeline.manifest import IndexRow
from data_pipeline.mixture import Cursor, Mixture, Pick, Walk, pack_slots
from m4v_dist.batch import LatentBatch, Slot, derive_seed
from m4v_dist.config.schema import BucketSettings, CurriculumStageSettings, ObjectiveSettings, SourceSettings
from m4v_dist.errors import ConfigError, DataError

LOG = logging.getLogger(__name__)

ChooseUnit = Callable[[int, int, int, int, int, int], int]
"""`objective.history.choose_unit(num_units, group_size, member, turn, pyramid_stage, num_pyramid_stages)`."""
NumSegmentTokens = Callable[[int, int, int, tuple[int, int], int], int]
"""`objective.history.num_segment_tokens(unit, pyramid_stage, num_pyramid_stages, grid, patch_size)`."""

_RESERVE_TRIES = 16
_POLL_S = 0.2


@dataclass(frozen=True)
class StepBatch:
    """This rank's micro-batches of one global step."""

    step: int
    micro_batches: tuple[LatentBatch, ...]


@dataclass(frozen=True)
class LoaderState:
    """Where the loader stands after the last step that was handed out.

    Args:
        next_step: the step that comes next.
        cursors: per walk.
        samples_seen: slots per source.
        tokens_seen: tokens per source, as the records would have without a pyramid.
    """

    next_step: int = 0
    cursors: Mapping[str, Cursor] = field(default_factory=dict)
    samples_seen: Mapping[str, int] = field(default_factory=dict)
    tokens_seen: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Phase:
    """A curriculum stage as the loader sees it: its rows and its plan."""

    settings: CurriculumStageSettings
    mixture: Mixture
    allowed: Mapping[str, list[int]]


class LatentLoader:
    """Plans and reads the slots of each step; see the module's docstring.

    Constructing reads nothing. `enter` a curriculum stage, then iterate `steps`.

    Args:
        cache: opened with the run's fingerprint.
        sources: of the run; those with split "held_out" feed `held_out` only.
        curriculum: of the run.
        seed: of the run.
        global_batch_slots: S.
        sync_group: G, divides S.
        objective: pyramid stages and the columns that slots and groups take in turn.
        rank, world_size: this process among the data-parallel ranks.
        choose_unit, num_segment_tokens: see their types; passed in, because the data pipeline knows no objective.
        patch_size: side of a token in latents.
        prefetch_steps: steps read ahead by a thread; 0 reads in the caller.
        held_out_slots: H, a multiple of world_size; 0 for none.
        max_bad_fraction: damaged records over all records of the cache; past it (and past one) the run fails.
    """

    def __init__(
        self,
        cache: LatentCache,
        *,
        sources: Sequence[SourceSettings],
        curriculum: Sequence[CurriculumStageSettings],
        seed: int,
        global_batch_slots: int,
        sync_group: int,
        objective: ObjectiveSettings,
        rank: int,
        world_size: int,
        choose_unit: ChooseUnit,
        num_segment_tokens: NumSegmentTokens,
        patch_size: int = 2,
        prefetch_steps: int = 2,
        held_out_slots: int = 0,
        max_bad_fraction: float = 0.01,
    ) -> None:
        self._cache = cache
        self._sources = {source.name: source for source in sources}
        self._curriculum = tuple(curriculum)
        self._seed = seed
        self._num_slots = global_batch_slots
        self._group_size = sync_group
        self._objective = objective
        self._rank = rank
        self._world_size = world_size
        self._choose_unit = choose_unit
        self._num_segment_tokens = num_segment_tokens
        self._patch_size = patch_size
        self._prefetch_steps = prefetch_steps
        self._held_out_slots = held_out_slots
        self._max_bad_fraction = max_bad_fraction
        self._state = LoaderState()
        self._phase: _Phase | None = None
        self._reader: _Prefetcher | None = None
        self._bad: dict[tuple[str, int], str] = {}

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
        stage = self._curriculum[curriculum_stage_index]
        self._check_buckets(stage.buckets)
        allowed = {source: self._rows_in(source, stage.buckets) for source in stage.weights}
        walks = {source: self._walk(source, stage, len(rows)) for source, rows in allowed.items()}
        for source, walk in walks.items():
            self._require_enough(source, walk, stage)
        mixture = Mixture(
            self._seed, derive_seed, weights=stage.weights, walks=walks,
            num_groups=self._num_slots // self._group_size, group_size=self._group_size,
        )  # fmt: skip
        self._phase = _Phase(stage, mixture, allowed)
        self._state = replace(self._state, next_step=step)

    def state_dict(self) -> dict[str, Any]:
        """State after the last step handed out, as JSON values; the same on every rank."""
        return {
            "seed": self._seed,
            "global_batch_slots": self._num_slots,
            "sync_group": self._group_size,
            "next_step": self._state.next_step,
            "cursors": {name: asdict(cursor) for name, cursor in sorted(self._state.cursors.items())},
            "samples_seen": dict(sorted(self._state.samples_seen.items())),
            "tokens_seen": dict(sorted(self._state.tokens_seen.items())),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state, of any rank and world size; `enter` the stage of its next step afterwards.

        Raises:
            ConfigError: it belongs to another seed, batch or sync group, so the order of the data would change.
        """
        self.close()
        for name, value in (
            ("seed", self._seed), ("global_batch_slots", self._num_slots), ("sync_group", self._group_size),
        ):  # fmt: skip
            if state[name] != value:
                raise ConfigError(
                    f"loader: the checkpoint was made with {name}={state[name]}, the run has {value}; that would "
                    "repeat and skip records. Set it back, or start a new run folder."
                )
        self._state = LoaderState(
            next_step=state["next_step"],
            cursors={name: Cursor(**cursor) for name, cursor in state["cursors"].items()},
            samples_seen=dict(state["samples_seen"]),
            tokens_seen=dict(state["tokens_seen"]),
        )

    @property
    def bad_records(self) -> dict[str, str]:
        """Damaged records that this rank met: `source/key` to error."""
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
        assert self._phase is not None, "enter() comes first"
        self.close()
        prepared = self._prepare(self._phase, self._state)
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

        Slot i takes pyramid stage i mod K, then walks records and units; seed ("held_out", i). Step 0, so the history
        carries the least noise that the objective's ramp gives.

        Raises:
            DataError: no held-out source has a record in the last curriculum stage's buckets, or one is damaged.
        """
        if not self._held_out_slots:
            return ()
        stage = self._curriculum[-1]
        pool = self._held_out_pool(stage)
        slots = [self._held_out_slot(index, pool, stage) for index in range(self._held_out_slots)]
        mine = slots[self._rank :: self._world_size]
        size = stage.micro_batch_slots
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        try:
            return tuple(
                self._batch([(slot, self._cache.read(self._row(slot))) for slot in part], self._held_out_slots)
                for part in parts
            )
        except CorruptRecordError as error:
            raise DataError(
                f"held-out record {error}; held-out slots are fixed: precompute its shard again."
            ) from error

    # ---- planning

    def _prepare(self, phase: _Phase, state: LoaderState) -> Iterator[tuple[StepBatch, LoaderState]]:
        while True:
            slots, after = self._plan(phase, state)
            yield self._read_step(phase, state.next_step, slots), after
            state = after

    def _plan(self, phase: _Phase, state: LoaderState) -> tuple[list[Slot], LoaderState]:
        picks, cursors = phase.mixture.plan(state.next_step, state.cursors)
        slots = [self._slot(phase, state.next_step, index, pick) for index, pick in enumerate(picks)]
        samples, tokens = dict(state.samples_seen), dict(state.tokens_seen)
        for slot in slots:
            samples[slot.source] = samples.get(slot.source, 0) + 1
            tokens[slot.source] = tokens.get(slot.source, 0) + slot.num_full_tokens
        return slots, LoaderState(state.next_step + 1, cursors, samples, tokens)

    def _slot(self, phase: _Phase, step: int, index: int, pick: Pick) -> Slot:
        record = phase.allowed[pick.source][pick.row]
        num_units = min(self._cache.rows(pick.source)[record].num_latents, phase.settings.num_latents)
        columns = self._objective.stage_columns
        # counted over the whole run: a step with fewer groups than columns would else never reach the last ones
        if self._shares_record(pick.source, phase.settings):
            turn_of_columns = step * (self._num_slots // self._group_size) + pick.group
        else:
            turn_of_columns = step * self._num_slots + index
        pyramid_stage = columns[turn_of_columns % len(columns)]
        turn = derive_seed(self._seed, "turn", step, pick.group) % num_units
        unit = self._choose_unit(
            num_units, self._group_size, pick.member, turn, pyramid_stage, self._objective.num_pyramid_stages
        )
        seed = derive_seed(self._seed, "slot", step, index)
        return self._make_slot(step, index, pick.source, record, unit=unit, pyramid_stage=pyramid_stage, seed=seed)

    def _make_slot(
        self, step: int, index: int, source: str, record: int, *, unit: int, pyramid_stage: int, seed: int
    ) -> Slot:
        row = self._cache.rows(source)[record]
        height, width = grid = self._grid(row.height_px, row.width_px)
        visual = self._num_segment_tokens(
            unit, pyramid_stage, self._objective.num_pyramid_stages, grid, self._patch_size
        )
        return Slot(
            step=step, index=index, source=source, record=record, key=row.key, unit=unit, pyramid_stage=pyramid_stage,
            seed=seed, num_tokens=visual + row.num_text_tokens,
            num_full_tokens=unit * (height // self._patch_size) * (width // self._patch_size),
        )  # fmt: skip

    def _held_out_pool(self, stage: CurriculumStageSettings) -> list[tuple[str, int]]:
        """Held-out records as (source, position), the sources taking turns."""
        names = [source.name for source in self._sources.values() if source.split == "held_out"]
        columns = [[(name, record) for record in self._rows_in(name, stage.buckets)] for name in names]
        longest = max((len(column) for column in columns), default=0)
        pool = [column[place] for place in range(longest) for column in columns if place < len(column)]
        if not pool:
            raise DataError(
                f"trainer.held_out_slots={self._held_out_slots}, but the held-out sources {names} have no record "
                f"in the buckets {_names(stage.buckets)} of the last curriculum stage {stage.name!r}; add a held-out "
                "source, or set trainer.held_out_slots=0."
            )
        return pool

    def _held_out_slot(self, index: int, pool: list[tuple[str, int]], stage: CurriculumStageSettings) -> Slot:
        turn, pyramid_stage = divmod(index, self._objective.num_pyramid_stages)
        source, record = pool[turn % len(pool)]
        num_units = min(self._cache.rows(source)[record].num_latents, stage.num_latents)
        # from the last unit down; the shift gives a record another unit once all pairs have come round
        unit = num_units - (turn + turn // math.lcm(len(pool), num_units)) % num_units
        seed = derive_seed("held_out", index)
        return self._make_slot(0, index, source, record, unit=unit, pyramid_stage=pyramid_stage, seed=seed)

    # ---- reading

    def _read_step(self, phase: _Phase, step: int, slots: list[Slot]) -> StepBatch:
        num_micro = self._num_slots // self._world_size // phase.settings.micro_batch_slots
        bins = pack_slots([slot.num_tokens for slot in slots], self._world_size * num_micro)
        mine = bins[self._rank * num_micro : (self._rank + 1) * num_micro]
        # members of a sync group on this rank share one read
        read: dict[tuple[str, int], CacheRecord] = {}
        batches = [
            self._batch([self._read_slot(phase, slots[index], read) for index in members], self._num_slots)
            for members in mine
        ]
        return StepBatch(step, tuple(batches))

    def _read_slot(
        self, phase: _Phase, slot: Slot, read: dict[tuple[str, int], CacheRecord]
    ) -> tuple[Slot, CacheRecord]:
        place = (slot.source, slot.record)
        for attempt in range(_RESERVE_TRIES):
            if place not in read and place not in self._bad:
                try:
                    read[place] = self._cache.read(self._cache.rows(place[0])[place[1]])
                except CorruptRecordError as error:
                    self._count_bad(place, error)
            if place in read:
                record = place[1]
                return replace(slot, record=record, key=self._cache.rows(slot.source)[record].key), read[place]
            place = (slot.source, self._reserve(phase, slot, attempt))
        raise DataError(
            f"loader: step {slot.step}, slot {slot.index}: {_RESERVE_TRIES} records of {slot.source} in a row are "
            "damaged; precompute the source again."
        )

    def _reserve(self, phase: _Phase, slot: Slot, attempt: int) -> int:
        """A record that may stand in for a slot's: same source and bucket, long enough; the same for a whole group."""
        rows = self._cache.rows(slot.source)
        wanted = rows[slot.record]
        fitting = [
            record
            for record in phase.allowed[slot.source]
            if (rows[record].height_px, rows[record].width_px) == (wanted.height_px, wanted.width_px)
            and rows[record].num_latents >= min(wanted.num_latents, phase.settings.num_latents)
        ]
        shared = self._shares_record(slot.source, phase.settings)
        stream = f"group {slot.index // self._group_size}" if shared else f"slot {slot.index}"
        return fitting[derive_seed(self._seed, "reserve", slot.step, stream, attempt) % len(fitting)]

    def _count_bad(self, place: tuple[str, int], error: CorruptRecordError) -> None:
        self._bad[place] = str(error)
        total = sum(len(self._cache.rows(source)) for source in self._cache.sources)
        limit = max(1, int(self._max_bad_fraction * total))
        LOG.warning("damaged record %d (limit %d), replaced: %s", len(self._bad), limit, error)
        if len(self._bad) > limit:
            raise DataError(
                f"loader: {len(self._bad)} of {total} cached records are damaged, more than {limit} "
                f"(precompute.max_bad_fraction={self._max_bad_fraction:g}): {sorted(self.bad_records)[:5]}; "
                f"precompute their shards in {self._cache.path} again."
            )

    def _batch(self, items: list[tuple[Slot, CacheRecord]], num_slots: int) -> LatentBatch:
        return LatentBatch(
            slots=tuple(slot for slot, _ in items),
            # a causal codec makes a shorter clip a prefix of a longer one
            latents=tuple(record.latents[:, : slot.unit].contiguous() for slot, record in items),  # c t h w
            text=tuple(record.text for _, record in items),
            null_text=self._cache.null_text,
            weights=(1.0,) * len(items),
            global_num_slots=num_slots,
        )

    # ---- rows

    def _row(self, slot: Slot) -> IndexRow:
        return self._cache.rows(slot.source)[slot.record]

    def _rows_in(self, source: str, buckets: Sequence[BucketSettings]) -> list[int]:
        sizes = {(bucket.height_px, bucket.width_px) for bucket in buckets}
        rows = self._cache.rows(source)
        return [position for position, row in enumerate(rows) if (row.height_px, row.width_px) in sizes]

    def _shares_record(self, source: str, stage: CurriculumStageSettings) -> bool:
        """Sync groups share a record where it has several units to train; an image has one."""
        return self._sources[source].media == "video" and stage.num_latents > 1

    def _walk(self, source: str, stage: CurriculumStageSettings, num_rows: int) -> Walk:
        return Walk(f"{source}@{'+'.join(_names(stage.buckets))}", num_rows, self._shares_record(source, stage))

    def _require_enough(self, source: str, walk: Walk, stage: CurriculumStageSettings) -> None:
        needed = self._num_slots // self._group_size if walk.shares_record else self._num_slots
        if walk.num_rows < needed:
            raise DataError(
                f"curriculum {stage.name!r}: source {source!r} has {walk.num_rows} records in the buckets "
                f"{_names(stage.buckets)}, but a step of trainer.global_batch_slots={self._num_slots} may take {needed}"
                f"{f' (one per sync group of {self._group_size})' if walk.shares_record else ''}; add clips, lower "
                "trainer.global_batch_slots, or drop the source from the stage's weights."
            )

    def _check_buckets(self, buckets: Sequence[BucketSettings]) -> None:
        num_stages = self._objective.num_pyramid_stages
        for bucket in buckets:
            grid = self._grid(bucket.height_px, bucket.width_px)
            try:
                self._num_segment_tokens(1, 0, num_stages, grid, self._patch_size)
            except ValueError as error:
                raise ConfigError(f"bucket {bucket.height_px}x{bucket.width_px}: {error}") from error

    def _grid(self, height_px: int, width_px: int) -> tuple[int, int]:
        return height_px // self._cache.spatial_stride, width_px // self._cache.spatial_stride


def _names(buckets: Sequence[BucketSettings]) -> list[str]:
    return sorted(f"{bucket.height_px}x{bucket.width_px}" for bucket in buckets)


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
