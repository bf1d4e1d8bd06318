"""The plan of a training run, composed: slots by the data pipeline, shapes by the objective, memory by the trainer.

`jobs.train` shows it on a dry run and refuses by it; the tables are `m4v_dist/bench/training_plan.py`'s.
"""

from collections.abc import Callable, Sequence
from functools import cache as cache_answers
from functools import lru_cache

from data_pipeline.assumed_cache import assumed_cache
from data_pipeline.latent_cache import LatentCache
from data_pipeline.loader_state import LoaderState
from data_pipeline.mixture import spread_slots
from data_pipeline.slot_plan import SlotPlanner
from m4v_dist.batch import Slot
from m4v_dist.bench.flops_tables import config_columns
from m4v_dist.bench.training_plan import PlannedStage
from m4v_dist.blocks.layout import ColumnShape
from m4v_dist.config.model_settings import KernelSettings, ModelSettings
from m4v_dist.config.schema import RunConfig
from m4v_dist.config.training_settings import TrainerSettings
from m4v_dist.model.build import build_on_meta, model_parts
from m4v_dist.objective.history import choose_unit, num_segment_tokens
from m4v_dist.trainer.curriculum import CurriculumStage, curriculum_stages
from m4v_dist.trainer.model_states import ModelStates, ParameterCounts, model_states
from m4v_dist.trainer.optimizer import is_frozen

NUM_PLANNED_STEPS = 16
"""Steps of each stage that a plan looks at."""


def build_planner(config: RunConfig, cache: LatentCache) -> SlotPlanner:
    """The planner of a run over an open cache, the same on every rank."""
    return SlotPlanner(
        cache,
        sources=config.sources,
        curriculum=config.curriculum,
        seed=config.run.seed,
        num_slots=config.trainer.global_batch_slots,
        group_size=config.trainer.sync_group,
        objective=config.objective,
        choose_unit=choose_unit,
        num_segment_tokens=num_segment_tokens,
        patch_size=config.model.patch_size,
    )


def cache_to_come(config: RunConfig) -> LatentCache:
    """In place of a cache that is not there yet: records of full length and texts at their longest."""
    return assumed_cache(
        config.precompute.cache,
        config.sources,
        config.precompute.buckets,
        num_frames=config.precompute.num_frames,
        num_text_tokens=config.text_encoder.max_tokens,
        num_records=config.trainer.global_batch_slots,
    )


def planned_stages(config: RunConfig, cache: LatentCache) -> list[PlannedStage]:
    """Plan the first steps of every curriculum stage.

    Raises:
        DataError: a source has too few records in a stage's buckets for one step.
        ConfigError: a bucket that the pyramid cannot divide.
    """
    planner, ranks = build_planner(config, cache), config.launch.num_data_ranks

    @cache_answers
    def column(height_px: int, width_px: int, num_text: int, unit: int, pyramid_stage: int) -> ColumnShape:
        return config_columns(config, height_px, width_px, num_text=num_text)(unit, pyramid_stage)

    def column_of(slot: Slot) -> ColumnShape:
        """What the objective will make of a slot; thousands a step are of few shapes."""
        table, record = cache.table(slot.source), slot.record
        num_text = table.num_text_tokens(record)[slot.caption]
        size = int(table.height_px[record]), int(table.width_px[record])
        return column(*size, num_text, slot.unit, slot.pyramid_stage)

    return [
        PlannedStage(stage.settings, stage.start, _planned_steps(planner, stage, column_of), spread_slots, ranks)
        for stage in curriculum_stages(config.curriculum)
    ]


def _planned_steps(
    planner: SlotPlanner, stage: CurriculumStage, column_of: Callable[[Slot], ColumnShape]
) -> list[list[ColumnShape]]:
    plan, state, steps = planner.stage(stage.index), LoaderState(next_step=stage.start), []
    for _ in range(min(NUM_PLANNED_STEPS, stage.settings.num_steps)):
        slots, state = planner.plan(plan, state)
        steps.append([column_of(slot) for slot in slots])
    return steps


def states_of(model: ModelSettings, freeze: Sequence[str], trainer: TrainerSettings, world_size: int) -> ModelStates:
    """What a rank holds of a model beside activations."""
    return model_states(
        _parameter_counts(model, tuple(freeze)),
        zero_stage=trainer.zero_stage,
        world_size=world_size,
        is_optimizer_offloaded=trainer.offload == "optimizer",
        is_reduced_per_micro_batch=trainer.reduce_gradients == "per_micro_batch",
        hpz_partition_size=trainer.hpz_partition_size if trainer.zero_stage == 3 else 1,
    )


@lru_cache(maxsize=64)
def _parameter_counts(model: ModelSettings, freeze: tuple[str, ...]) -> ParameterCounts:
    # Which backend scans changes no parameter, and a plan may count with one that is not there.
    built = build_on_meta(model, KernelSettings())
    sizes = {name: p.numel() for name, p in built.named_parameters()}
    training = [size for name, size in sizes.items() if not is_frozen(name, freeze)]
    trained = sum(training)
    return ParameterCounts(
        all=sum(sizes.values()),
        trained=trained,
        # Where one stage freezes the base for its adapters, all do.
        averaged=trained if "base" in freeze else sum(sizes.values()),
        largest=max(training, default=0),
        largest_part=max(sum(p.numel() for p in part.parameters()) for _, part in model_parts(built)),
    )
