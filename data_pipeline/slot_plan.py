"""Which slots a step has: the curriculum stage, the mixture and the pyramid, as numbers; no read, no thread.

Every rank makes the whole plan. It follows from (seed, step, slot) and the cursors of `LoaderState` alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data_pipeline.index_table import RecordTable
from data_pipeline.latent_cache import LatentCache
from data_pipeline.loader_state import LoaderState
from data_pipeline.mixture import Mixture, Pick, Walk
from data_pipeline.reserve import Positions, Reserve
from m4v_dist.batch import Slot, derive_seed
from m4v_dist.config.data_settings import BucketSettings, SourceSettings
from m4v_dist.config.training_settings import CurriculumStageSettings, ObjectiveSettings
from m4v_dist.errors import ConfigError, DataError

_LOOK_UPS_TO_RELEASE = 32
"""Records after whose look-up the pages of a mapped index are let go of; the system maps megabytes for each."""
ChooseUnit = Callable[[int, int, int, int, int, int], int]
"""`objective.history.choose_unit(num_units, group_size, member, turn, pyramid_stage, num_pyramid_stages)`."""
NumSegmentTokens = Callable[[int, int, int, tuple[int, int], int], int]
"""`objective.history.num_segment_tokens(unit, pyramid_stage, num_pyramid_stages, grid, patch_size)`."""


@dataclass(frozen=True)
class StagePlan:
    """A curriculum stage with the rows that it may take.

    Args:
        settings: the stage.
        mixture: chooses rows.
        allowed: per source, positions in the cache's table, ascending.
        reserves: per source, made when a record is first found damaged; see `SlotPlanner.reserve`.
    """

    settings: CurriculumStageSettings
    mixture: Mixture
    allowed: Mapping[str, Positions]
    reserves: dict[str, Reserve] = field(default_factory=dict)


class SlotPlanner:
    """Plans slots over an open cache.

    Args:
        cache: whose rows are planned, opened with the run's fingerprint.
        sources: of the run; those with split "held_out" feed the held-out slots only.
        curriculum: of the run.
        seed: of the run.
        num_slots: S.
        group_size: G, divides S.
        objective: pyramid stages and the columns that slots and groups take in turn.
        choose_unit, num_segment_tokens: see their types; passed in, because the data pipeline knows no objective.
        patch_size: side of a token in latents.

    Attributes:
        cache: as given.
        num_slots: as given.
    """

    def __init__(
        self,
        cache: LatentCache,
        *,
        sources: Sequence[SourceSettings],
        curriculum: Sequence[CurriculumStageSettings],
        seed: int,
        num_slots: int,
        group_size: int,
        objective: ObjectiveSettings,
        choose_unit: ChooseUnit,
        num_segment_tokens: NumSegmentTokens,
        patch_size: int,
    ) -> None:
        self.cache = cache
        self.num_slots = num_slots
        self._sources = {source.name: source for source in sources}
        self._curriculum = tuple(curriculum)
        self._seed = seed
        self._group_size = group_size
        self._objective = objective
        self._choose_unit = choose_unit
        self._num_segment_tokens = num_segment_tokens
        self._patch_size = patch_size
        self._num_looked_up = 0

    @property
    def identity(self) -> dict[str, int]:
        """What decides the order of the data beside the records, the cursors and the curriculum, by its setting."""
        return {"seed": self._seed, "global_batch_slots": self.num_slots, "sync_group": self._group_size}

    @property
    def held_out_micro_batch_slots(self) -> int:
        """Slots of a held-out micro-batch: as many as the last curriculum stage takes."""
        return self._curriculum[-1].micro_batch_slots

    def digests(self) -> dict[str, str]:
        """Digest of the records of each source, in order of their names; see `LatentCache.digest`."""
        return {name: self.cache.digest(name) for name in sorted(self._sources)}

    def stage(self, index: int) -> StagePlan:
        """Make ready to plan a curriculum stage.

        Raises:
            DataError: a source has too few records in the stage's buckets for one step.
            ConfigError: a bucket that the pyramid cannot divide.
        """
        stage = self._curriculum[index]
        self._check_buckets(stage.buckets)
        allowed = {source: self._rows_in(source, stage.buckets) for source in stage.weights}
        walks = {source: self._walk(source, stage, len(rows)) for source, rows in allowed.items()}
        for source, walk in walks.items():
            self._require_enough(source, walk, stage)
        mixture = Mixture(
            self._seed, derive_seed, weights=stage.weights, walks=walks,
            num_groups=self.num_slots // self._group_size, group_size=self._group_size,
        )  # fmt: skip
        return StagePlan(stage, mixture, allowed)

    def plan(self, stage: StagePlan, state: LoaderState) -> tuple[list[Slot], LoaderState]:
        """All S slots of `state.next_step`, and the state after it."""
        picks, cursors = stage.mixture.plan(state.next_step, state.cursors)
        slots = [self._slot(stage, state.next_step, index, pick) for index, pick in enumerate(picks)]
        samples, tokens = dict(state.samples_seen), dict(state.tokens_seen)
        for slot in slots:
            samples[slot.source] = samples.get(slot.source, 0) + 1
            tokens[slot.source] = tokens.get(slot.source, 0) + slot.num_full_tokens
        return slots, LoaderState(state.next_step + 1, cursors, samples, tokens)

    def held_out(self, num_slots: int) -> list[Slot]:
        """The fixed held-out slots, in the last curriculum stage's buckets and length.

        Slot i takes pyramid stage i mod K, then walks records and units; seed ("held_out", i). Step 0, so the history
        carries the least noise that the objective's ramp gives.

        Raises:
            DataError: no held-out source has a record there.
        """
        stage = self._curriculum[-1]
        pool = self._held_out_pool(stage, num_slots)
        return [self._held_out_slot(index, pool, stage) for index in range(num_slots)]

    def reserve(self, stage: StagePlan, slot: Slot, attempt: int) -> int:
        """A record that may stand in for a slot's: same source and bucket, long enough; the same for a whole group."""
        reserve = stage.reserves.get(slot.source)
        if reserve is None:
            reserve = Reserve(self.cache.table(slot.source), stage.allowed[slot.source], stage.settings.buckets)
            stage.reserves[slot.source] = reserve
        fitting = reserve.fitting(slot.record, stage.settings.num_latents)
        shared = self._shares_record(slot.source, stage.settings)
        stream = f"group {slot.index // self._group_size}" if shared else f"slot {slot.index}"
        return int(fitting[derive_seed(self._seed, "reserve", slot.step, stream, attempt) % len(fitting)])

    def with_record(self, slot: Slot, record: int) -> Slot:
        """The slot with another record, and the caption that its draw gives there; its tokens stay as planned."""
        table = self.cache.table(slot.source)
        return replace(slot, record=record, key=table.key(record), caption=_caption(table, record, slot.seed))

    def _slot(self, stage: StagePlan, step: int, index: int, pick: Pick) -> Slot:
        record = int(stage.allowed[pick.source][pick.row])
        num_units = min(int(self.cache.table(pick.source).num_latents[record]), stage.settings.num_latents)
        columns = self._objective.pyramid_stage_columns
        # counted over the whole run: a step with fewer groups than columns would else never reach the last ones
        if self._shares_record(pick.source, stage.settings):
            turn_of_columns = step * (self.num_slots // self._group_size) + pick.group
        else:
            turn_of_columns = step * self.num_slots + index
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
        table = self.cache.table(source)
        self._num_looked_up += 1
        if self._num_looked_up % _LOOK_UPS_TO_RELEASE == 0:
            table.release()
        caption = _caption(table, record, seed)
        height, width = grid = self._grid(int(table.height_px[record]), int(table.width_px[record]))
        visual = self._num_segment_tokens(
            unit, pyramid_stage, self._objective.num_pyramid_stages, grid, self._patch_size
        )
        return Slot(
            step=step, index=index, source=source, record=record, key=table.key(record), unit=unit,
            pyramid_stage=pyramid_stage, seed=seed, caption=caption,
            num_tokens=visual + table.num_text_tokens(record)[caption],
            num_full_tokens=unit * (height // self._patch_size) * (width // self._patch_size),
        )  # fmt: skip

    def _held_out_pool(self, stage: CurriculumStageSettings, num_slots: int) -> list[tuple[str, int]]:
        """Held-out records as (source, position), the sources taking turns."""
        names = [source.name for source in self._sources.values() if source.split == "held_out"]
        columns = [[(name, record) for record in self._rows_in(name, stage.buckets).tolist()] for name in names]
        longest = max((len(column) for column in columns), default=0)
        pool = [column[place] for place in range(longest) for column in columns if place < len(column)]
        if not pool:
            lack = self._found_elsewhere(names, stage.buckets) + "," if names else "no source has split='held_out';"
            raise DataError(
                f"trainer.held_out_slots={num_slots} in the last curriculum stage {stage.name!r}: {lack} add a "
                "held-out source, or set trainer.held_out_slots=0."
            )
        return pool

    def _held_out_slot(self, index: int, pool: list[tuple[str, int]], stage: CurriculumStageSettings) -> Slot:
        turn, pyramid_stage = divmod(index, self._objective.num_pyramid_stages)
        source, record = pool[turn % len(pool)]
        num_units = min(int(self.cache.table(source).num_latents[record]), stage.num_latents)
        # from the last unit down; the shift gives a record another unit once all pairs have come round
        unit = num_units - (turn + turn // math.lcm(len(pool), num_units)) % num_units
        seed = derive_seed("held_out", index)
        return self._make_slot(0, index, source, record, unit=unit, pyramid_stage=pyramid_stage, seed=seed)

    def _rows_in(self, source: str, buckets: Sequence[BucketSettings]) -> Positions:
        table = self.cache.table(source)
        chosen = np.zeros(len(table), dtype=bool)
        for bucket in buckets:
            chosen |= (table.height_px == bucket.height_px) & (table.width_px == bucket.width_px)
        # half the memory of numpy's own
        return np.flatnonzero(chosen).astype(np.int32)

    def _shares_record(self, source: str, stage: CurriculumStageSettings) -> bool:
        """Sync groups share a record where it has several units to train; an image has one."""
        return self._sources[source].media == "video" and stage.num_latents > 1

    def _walk(self, source: str, stage: CurriculumStageSettings, num_rows: int) -> Walk:
        return Walk(f"{source}@{'+'.join(_names(stage.buckets))}", num_rows, self._shares_record(source, stage))

    def _require_enough(self, source: str, walk: Walk, stage: CurriculumStageSettings) -> None:
        if walk.num_rows == 0:
            raise DataError(
                f"curriculum {stage.name!r}: {self._found_elsewhere([source], stage.buckets)}, or drop the source from "
                "the stage's weights."
            )
        needed = self.num_slots // self._group_size if walk.shares_record else self.num_slots
        if walk.num_rows < needed:
            raise DataError(
                f"curriculum {stage.name!r}: source {source!r} has {walk.num_rows} records in the buckets "
                f"{_names(stage.buckets)}, but a step of trainer.global_batch_slots={self.num_slots} may take {needed}"
                f"{f' (one per sync group of {self._group_size})' if walk.shares_record else ''}; add clips, lower "
                "trainer.global_batch_slots, or drop the source from the stage's weights."
            )

    def _found_elsewhere(self, sources: Sequence[str], buckets: Sequence[BucketSettings]) -> str:
        """What to say of sources without a record in these buckets: where they have some, and the ways out."""
        found = []
        for source in sources:
            table = self.cache.table(source)
            found_sizes, counts = np.unique(np.stack([table.height_px, table.width_px]), axis=1, return_counts=True)
            named = [f"{height}x{width}" for height, width in found_sizes.T.tolist()]
            sizes = ", ".join(f"{size} ({count} records)" for size, count in sorted(zip(named, counts, strict=True)))
            found.append(f"{source!r} is there in {sizes or 'no bucket at all'}")
        missing = ", ".join(_names(buckets))
        return (
            f"the cache {self.cache.path} holds nothing in {missing}: {'; '.join(found)}; add {missing} to "
            "precompute.buckets (a clip goes to the nearest aspect ratio) and precompute into a new folder, take it "
            "out of the stage's buckets"
        )

    def _check_buckets(self, buckets: Sequence[BucketSettings]) -> None:
        num_stages = self._objective.num_pyramid_stages
        for bucket in buckets:
            grid = self._grid(bucket.height_px, bucket.width_px)
            try:
                self._num_segment_tokens(1, 0, num_stages, grid, self._patch_size)
            except ValueError as error:
                raise ConfigError(f"bucket {_size_name(bucket)}: {error}") from error

    def _grid(self, height_px: int, width_px: int) -> tuple[int, int]:
        return height_px // self.cache.spatial_stride, width_px // self.cache.spatial_stride


def _names(buckets: Sequence[BucketSettings]) -> list[str]:
    return sorted(_size_name(bucket) for bucket in buckets)


def _size_name(bucket: BucketSettings) -> str:
    return f"{bucket.height_px}x{bucket.width_px}"


def _caption(table: RecordTable, record: int, seed: int) -> int:
    """The caption that a slot takes of a record, drawn by weight from the slot's seed."""
    weights = table.caption_weights(record)
    if len(weights) == 1:
        return 0
    threshold = derive_seed(seed, "caption") / 2.0**63 * sum(weights)
    for number, weight in enumerate(weights):
        threshold -= weight
        if threshold < 0:
            return number
    # the draw rounded up to 1: the last one that has a weight
    return max(number for number, weight in enumerate(weights) if weight)
