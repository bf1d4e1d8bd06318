"""A cache that is not there yet: what a plan may assume of it, and walks over stages of different sizes."""

from typing import Any

import pytest

from data_pipeline.assumed_cache import assumed_cache
from data_pipeline.latent_cache import CorruptRecordError, LatentCache
from data_pipeline.slot_plan import LoaderState, SlotPlanner
from m4v_dist.config.data_settings import BucketSettings, SourceSettings
from m4v_dist.config.training_settings import CurriculumStageSettings, ObjectiveSettings
from m4v_dist.objective.history import choose_unit, num_segment_tokens

SMALL, LARGE = BucketSettings(height_px=64, width_px=64), BucketSettings(height_px=128, width_px=128)


def _source(name: str, media: Any = "video", buckets: tuple[BucketSettings, ...] = ()) -> SourceSettings:
    return SourceSettings(name=name, shards="none.tar", media=media, licence="none", buckets=buckets)


def _cache(*sources: SourceSettings) -> LatentCache:
    return assumed_cache("there", sources, (SMALL, LARGE), num_frames=17, num_text_tokens=9, num_records=10)


def _stage(name: str, bucket: BucketSettings, **weights: float) -> CurriculumStageSettings:
    return CurriculumStageSettings(name=name, num_steps=2, num_latents=3, buckets=(bucket,), weights=weights)


def test_records_are_as_long_as_can_be_in_the_sizes_of_their_source() -> None:
    cache = _cache(_source("both"), _source("large", buckets=(LARGE,)), _source("stills", "image"))
    assert [len(cache.rows(name)) for name in ("both", "large", "stills")] == [20, 10, 20]
    assert {(row.num_latents, row.num_text_tokens) for row in cache.rows("both")} == {(3, (9,))}
    assert {(row.num_latents, row.height_px) for row in cache.rows("large")} == {(3, 128)}
    assert {row.num_latents for row in cache.rows("stills")} == {1}


def test_nothing_can_be_read_from_it() -> None:
    cache = _cache(_source("both"))
    with pytest.raises(CorruptRecordError):
        cache.read(cache.rows("both")[0])


def test_a_walk_goes_on_in_a_stage_of_the_same_size_and_another_begins_at_another_size() -> None:
    planner = SlotPlanner(
        _cache(_source("clips")), sources=[_source("clips")],
        curriculum=[_stage("a", SMALL, clips=1.0), _stage("b", LARGE, clips=1.0), _stage("c", SMALL, clips=1.0)],
        seed=1, num_slots=4, group_size=2, objective=ObjectiveSettings(), choose_unit=choose_unit,
        num_segment_tokens=num_segment_tokens, patch_size=2,
    )  # fmt: skip
    state, records = LoaderState(), []
    for index in (0, 1, 2):
        stage = planner.stage(index)
        for _ in range(2):
            slots, state = planner.plan(stage, state)
            records.append([slot.record for slot in slots[::2]])
    assert {name: cursor.position for name, cursor in state.cursors.items()} == {"clips@64x64": 8, "clips@128x128": 4}
    of_small = [record for step in (0, 1, 4, 5) for record in records[step]]
    assert len(set(of_small)) == 8, "the third stage repeats no record of the first"
