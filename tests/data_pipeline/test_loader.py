"""The loader: same slots on any number of ranks, exact resume, damaged records, refusals."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.latent_cache import LatentCache
from data_pipeline.loader import LatentLoader, StepBatch
from data_pipeline.slot_plan import SlotPlanner
from m4v_dist import storage
from m4v_dist.batch import LatentBatch, Slot
from m4v_dist.config.data_settings import BucketSettings, SourceSettings
from m4v_dist.config.training_settings import CurriculumStageSettings, ObjectiveSettings
from m4v_dist.errors import ConfigError, DataError, StoreError
from m4v_dist.objective.history import choose_unit, num_segment_tokens
from tests.data_pipeline.made_cache import MadeSource, make_cache, record_value

BUCKET = BucketSettings(height_px=64, width_px=64)
SOURCES = [
    MadeSource("vid", "video", 7, 5),
    MadeSource("img", "image", 13, 1),
    MadeSource("unseen", "video", 3, 4, split="held_out"),
]
CURRICULUM = (
    CurriculumStageSettings(
        name="images", num_steps=4, num_latents=1, buckets=(BUCKET,), weights={"img": 1.0}, micro_batch_slots=2
    ),
    CurriculumStageSettings(
        name="video", num_steps=40, num_latents=4, buckets=(BUCKET,), weights={"vid": 3.0, "img": 1.0},
        micro_batch_slots=2,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(str(tmp_path_factory.mktemp("cache")), SOURCES)


def make_loader(folder: str, rank: int = 0, world_size: int = 1, **changes: Any) -> LatentLoader:
    values: dict[str, Any] = {
        "sources": [
            SourceSettings(name=s.name, shards="x", media=s.media, licence="none", split=s.split) for s in SOURCES
        ],
        "curriculum": CURRICULUM,
        "seed": 5,
        "num_slots": 8,
        "group_size": 4,
        "objective": ObjectiveSettings(),
        "choose_unit": choose_unit,
        "num_segment_tokens": num_segment_tokens,
        "patch_size": 2,
    }
    planner = SlotPlanner(
        LatentCache.open(folder), **values | {name: changes.pop(name) for name in values.keys() & changes.keys()}
    )
    return LatentLoader(planner, rank=rank, world_size=world_size, **{"held_out_slots": 12} | changes)


def enter_video_stage(loader: LatentLoader) -> LatentLoader:
    """As if the image stage's four steps had been handed out."""
    loader.load_state_dict({**loader.state_dict(), "next_step": 4})
    loader.enter(1, 4)
    return loader


def take(loader: LatentLoader, count: int) -> list[StepBatch]:
    steps = loader.steps()
    taken = [next(steps) for _ in range(count)]
    loader.close()
    return taken


def slots_of(batches: list[StepBatch]) -> list[Slot]:
    return [slot for batch in batches for micro in batch.micro_batches for slot in micro.slots]


def counted_slots_of(batches: list[StepBatch]) -> list[Slot]:
    """Without fillers."""
    micros = [micro for batch in batches for micro in batch.micro_batches]
    pairs = [pair for micro in micros for pair in zip(micro.slots, micro.weights, strict=True)]
    assert {weight for _, weight in pairs} <= {0.0, 1.0}
    return [slot for slot, weight in pairs if weight]


def by_index(slots: list[Slot]) -> list[Slot]:
    return sorted(slots, key=lambda slot: (slot.step, slot.index))


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 8, 11])
def test_any_number_of_ranks_reads_the_same_slots(cache_folder: str, world_size: int) -> None:
    alone = make_loader(cache_folder)
    alone.enter(0, 0)
    expected = by_index(slots_of(take(alone, 10)))
    states, found = [], []
    for rank in range(world_size):
        loader = make_loader(cache_folder, rank, world_size)
        loader.enter(0, 0)
        batches = take(loader, 10)
        assert all(len(b.micro_batches) == math.ceil(8 / world_size / 2) for b in batches)
        found += counted_slots_of(batches)
        states.append(loader.state_dict())
    assert by_index(found) == expected
    assert [s.index for s in expected] == list(range(8)) * 10
    assert all(state == alone.state_dict() for state in states)


@pytest.mark.parametrize("prefetch_steps", [0, 3])
def test_an_interrupted_run_continues_as_the_straight_one(cache_folder: str, prefetch_steps: int) -> None:
    straight = make_loader(cache_folder)
    straight.enter(0, 0)
    first = take(straight, 4)
    straight.enter(1, 4)
    expected = slots_of(first + take(straight, 9))

    before = make_loader(cache_folder, prefetch_steps=prefetch_steps)
    before.enter(0, 0)
    found = slots_of(take(before, 4))
    before.enter(1, 4)
    found += slots_of(take(before, 3))
    state = before.state_dict()
    # two ranks go on where one stopped
    rest: list[Slot] = []
    for rank in range(2):
        after = make_loader(cache_folder, rank, 2, prefetch_steps=prefetch_steps)
        after.load_state_dict(state)
        after.enter(1, 7)
        rest += slots_of(take(after, 6))
        assert after.state_dict() == straight.state_dict()
    assert by_index(found) + by_index(rest) == by_index(expected)


def test_an_epoch_repeats_and_skips_no_record(cache_folder: str) -> None:
    loader = make_loader(cache_folder)
    loader.enter(0, 0)
    records = [slot.record for slot in slots_of([*take(loader, 13)])]
    assert len(records) == 8 * 13
    # micro-batches reorder the slots of a step, so epochs are cut at whole steps: 13 steps are 8 epochs of 13 images
    assert Counter(records) == {record: 8 for record in range(13)}


def test_epochs_have_different_orders(cache_folder: str) -> None:
    loader = make_loader(cache_folder)
    loader.enter(0, 0)
    records = [slot.record for slot in by_index(slots_of(take(loader, 4)))]
    assert sorted(records[:13]) == sorted(records[13:26]) == list(range(13))
    assert records[:13] != records[13:26]


def test_a_sync_group_shares_one_video_and_trains_its_units(cache_folder: str) -> None:
    loader = enter_video_stage(make_loader(cache_folder))
    slots = by_index(slots_of(take(loader, 20)))
    groups = [slots[start : start + 4] for start in range(0, len(slots), 4)]
    videos = [group for group in groups if group[0].source == "vid"]
    assert len(videos) > 15
    assert all(len({slot.record for slot in group}) == 1 for group in videos)
    assert all(sorted(slot.unit for slot in group) == [1, 2, 3, 4] for group in videos)
    assert all(len({slot.pyramid_stage for slot in group}) == 1 for group in videos)
    assert {group[0].pyramid_stage for group in videos} == {0, 1, 2}
    images = [{slot.record for slot in group} for group in groups if group[0].source == "img"]
    # where an epoch ends inside a group, the next one may begin with one of its records
    assert all(len(records) >= 3 for records in images) and any(len(records) == 4 for records in images)
    assert len({slot.seed for slot in slots}) == len(slots)


def test_a_group_smaller_than_the_clip_reaches_every_unit_at_every_pyramid_stage(cache_folder: str) -> None:
    loader = enter_video_stage(make_loader(cache_folder, group_size=2))
    slots = [slot for slot in slots_of(take(loader, 30)) if slot.source == "vid"]
    assert {(slot.unit, slot.pyramid_stage) for slot in slots} == {(u, k) for u in (1, 2, 3, 4) for k in (0, 1, 2)}


def test_latents_are_the_prefix_that_ends_at_the_unit(cache_folder: str) -> None:
    loader = enter_video_stage(make_loader(cache_folder))
    for batch in take(loader, 6):
        for micro in batch.micro_batches:
            check_content(micro)


def check_content(micro: LatentBatch) -> None:
    assert micro.global_num_slots == 8 and micro.weights == (1.0, 1.0)
    for slot, latents, text in zip(micro.slots, micro.latents, micro.text, strict=True):
        assert latents.shape == (4, slot.unit, 8, 8) and latents.dtype == torch.bfloat16
        assert text.tokens.shape == (3 + slot.record % 2, 6)
        expected = record_value(slot.source, slot.record) + torch.arange(slot.unit)
        assert torch.equal(latents[0, :, 0, 0].float(), expected.bfloat16().float())


def test_state_counts_samples_and_tokens_of_what_was_handed_out(cache_folder: str) -> None:
    loader = make_loader(cache_folder, prefetch_steps=3)
    loader.enter(0, 0)
    slots = slots_of(take(loader, 3))
    state = loader.state_dict()
    assert state["samples_seen"] == {"img": 24} and state["next_step"] == 3
    assert state["tokens_seen"] == {"img": sum(slot.num_full_tokens for slot in slots)} == {"img": 24 * 16}
    resumed = make_loader(cache_folder)
    assert resumed.samples_seen == resumed.tokens_seen == {}
    resumed.load_state_dict(state)
    for each in (loader, resumed):
        assert each.samples_seen == {"img": 24} and each.tokens_seen == {"img": 24 * 16}


def test_micro_batches_of_a_step_have_about_equal_tokens(cache_folder: str) -> None:
    loader = enter_video_stage(make_loader(cache_folder))
    for batch in take(loader, 10):
        loads = [sum(slot.num_tokens for slot in micro.slots) for micro in batch.micro_batches]
        heaviest = max(slot.num_tokens for micro in batch.micro_batches for slot in micro.slots)
        assert max(loads) - min(loads) <= heaviest


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_the_imbalance_of_tokens_over_ranks_is_reported_by_each(cache_folder: str, world_size: int) -> None:
    loaders = [enter_video_stage(make_loader(cache_folder, rank, world_size)) for rank in range(world_size)]
    batches = [take(loader, 5) for loader in loaders]
    for step in zip(*batches, strict=True):
        loads = [sum(slot.num_tokens for slot in slots_of([batch])) for batch in step]
        expected = max(loads) / (sum(loads) / world_size) - 1
        assert all(batch.token_imbalance == pytest.approx(expected) for batch in step)
    assert all(loader.reads["token_imbalance"] == pytest.approx(expected) for loader in loaders)
    assert (expected == 0) == (world_size == 1)


def test_reads_are_counted_once_for_a_group(cache_folder: str) -> None:
    loader = enter_video_stage(make_loader(cache_folder, prefetch_steps=0))
    slots = slots_of(take(loader, 6))
    distinct = {(slot.step, slot.source, slot.record) for slot in slots}
    reads = loader.reads
    assert reads["num_reads"] == len(distinct) and reads["num_saved"] == len(slots) - len(distinct) > 0
    table = loader._cache.table
    assert reads["read_bytes"] == sum(table(source).place(record).size_bytes for _, source, record in distinct)
    assert reads["num_reread"] == 0 and reads["wait_s"] > 0


@pytest.mark.parametrize(("world_size", "size", "expected"), [(11, 1, 3), (3, 2, 4), (5, 2, 2)])
def test_all_ranks_have_equal_micro_batches_filled_up(
    cache_folder: str, world_size: int, size: int, expected: int
) -> None:
    """Eight slots, two a micro-batch at most; a filler is read from the cache like any slot."""
    fillers = 0
    for rank in range(world_size):
        loader = make_loader(cache_folder, rank, world_size)
        loader.enter(0, 0)
        (batch,) = take(loader, 1)
        for micro in batch.micro_batches:
            assert len(micro.slots) == len(micro.latents) == len(micro.text) == len(micro.weights) == size
            fillers += micro.weights.count(0.0)
    assert fillers == expected


@pytest.mark.parametrize("world_size", [2, 5, 16])
def test_held_out_slots_are_fixed_and_spread_over_any_ranks(cache_folder: str, world_size: int) -> None:
    whole = [slot for micro in make_loader(cache_folder).held_out() for slot in micro.slots]
    parts = [make_loader(cache_folder, rank, world_size, seed=99).held_out() for rank in range(world_size)]
    assert len({tuple(len(micro.slots) for micro in part) for part in parts}) == 1
    counted = [
        slot
        for part in parts
        for micro in part
        for slot, weight in zip(micro.slots, micro.weights, strict=True)
        if weight
    ]
    assert sorted(counted, key=lambda slot: slot.index) == whole
    assert {slot.source for slot in whole} == {"unseen"}
    assert {slot.pyramid_stage for slot in whole} == {0, 1, 2}
    assert {slot.unit for slot in whole} == {1, 2, 3, 4}
    assert {slot.record for slot in whole} == {0, 1, 2}


def damage(folder: str, source: str, position: int) -> str:
    cache = LatentCache.open(folder)
    row = cache.rows(source)[position]
    path = Path(folder) / "shards" / f"{row.shard}.tar"
    data = bytearray(path.read_bytes())
    data[row.offset_bytes + row.size_bytes // 2] ^= 1
    path.write_bytes(bytes(data))
    return f"{source}/{row.key}"


def test_a_damaged_record_is_replaced_by_the_same_one_on_any_ranks(tmp_path: Path) -> None:
    folder = make_cache(str(tmp_path), SOURCES)
    sound = make_loader(folder)
    sound.enter(0, 0)
    expected = by_index(slots_of(take(sound, 4)))
    name = damage(folder, "img", 3)
    alone = make_loader(folder)
    alone.enter(0, 0)
    found = by_index(slots_of(take(alone, 4)))
    assert list(alone.bad_records) == [name] and "checksum" in alone.bad_records[name]
    assert all(slot.record != 3 for slot in found)
    changed = [(a, b) for a, b in zip(expected, found, strict=True) if a != b]
    assert changed and all(a.record == 3 and a.seed == b.seed for a, b in changed)
    assert alone.state_dict() == sound.state_dict()
    split: list[Slot] = []
    for rank in range(2):
        loader = make_loader(folder, rank, 2)
        loader.enter(0, 0)
        split += slots_of(take(loader, 4))
    assert by_index(split) == found


def test_a_damaged_video_is_replaced_by_one_video_for_its_whole_group(tmp_path: Path) -> None:
    folder = make_cache(str(tmp_path), SOURCES)
    damage(folder, "vid", 4)
    found: list[Slot] = []
    for rank in range(4):
        loader = enter_video_stage(make_loader(folder, rank, 4))
        found += slots_of(take(loader, 12))
    slots = by_index(found)
    groups = [slots[start : start + 4] for start in range(0, len(slots), 4) if slots[start].source == "vid"]
    assert all(len({slot.record for slot in group}) == 1 and group[0].record != 4 for group in groups)


def test_too_many_damaged_records_end_the_run(tmp_path: Path) -> None:
    folder = make_cache(str(tmp_path), SOURCES)
    names = [damage(folder, "img", position) for position in (1, 2, 5)]
    loader = make_loader(folder)
    loader.enter(0, 0)
    with pytest.raises(DataError, match="damaged") as caught:
        take(loader, 10)
    assert any(name in str(caught.value) for name in names)


def test_fewer_records_than_a_step_needs_is_refused_before_a_read(cache_folder: str) -> None:
    loader = make_loader(cache_folder, num_slots=16)
    with pytest.raises(DataError, match="'img' has 13 records .* may take 16"):
        loader.enter(0, 0)
    with pytest.raises(DataError, match="'vid' has 7 records .* may take 8"):
        enter_video_stage(make_loader(cache_folder, group_size=1))


def test_a_step_needs_one_video_per_sync_group_and_no_more(cache_folder: str) -> None:
    only_videos = CURRICULUM[1].model_copy(update={"weights": {"vid": 1.0}})

    def enter(num_slots: int, **changes: Any) -> LatentLoader:
        curriculum = (CURRICULUM[0], only_videos.model_copy(update=changes))
        return enter_video_stage(make_loader(cache_folder, num_slots=num_slots, curriculum=curriculum))

    groups = slots_of(take(enter(28), 1))
    assert len({slot.record for slot in groups}) == 7 and len(groups) == 28
    with pytest.raises(DataError, match=r"'vid' has 7 records .*global_batch_slots=32 may take 8 \(one per sync group"):
        enter(32)
    # a group that trains one unit shares no video
    with pytest.raises(DataError, match=r"'vid' has 7 records .*global_batch_slots=8 may take 8; add clips"):
        enter(8, num_latents=1)


def test_a_bucket_that_the_cache_does_not_hold_is_named_with_those_that_it_holds(tmp_path: Path) -> None:
    folder = make_cache(str(tmp_path), [*SOURCES[1:], MadeSource("vid", "video", 9, 5, size_px=128)])
    stage = CURRICULUM[0].model_copy(update={"buckets": (BucketSettings(height_px=128, width_px=64),)})
    with pytest.raises(DataError, match=r"holds nothing in 128x64: 'img' is there in 64x64 \(13 records\); add 128x64"):
        make_loader(folder, curriculum=(stage,)).enter(0, 0)
    # that there are some in another source helps nobody
    with pytest.raises(DataError, match=r"'video': .* nothing in 64x64: 'vid' is there in 128x128 \(9 records\)"):
        enter_video_stage(make_loader(folder))
    with pytest.raises(DataError, match=r"'unseen' is there in 64x64 \(3 records\); add 128x64 to precompute.buckets"):
        make_loader(folder, curriculum=(stage,)).held_out()
    gone = stage.model_copy(update={"weights": {"gone": 1.0}})
    sources = [SourceSettings(name="gone", shards="x", media="image", licence="none")]
    with pytest.raises(DataError, match="'gone' is there in no bucket at all"):
        make_loader(folder, curriculum=(gone,), sources=sources).enter(0, 0)
    with pytest.raises(DataError, match="no source has split='held_out'"):
        make_loader(folder, curriculum=(gone,), sources=sources).held_out()


def test_a_state_of_another_order_is_refused(cache_folder: str) -> None:
    state = make_loader(cache_folder).state_dict()
    with pytest.raises(ConfigError, match="seed=5, the run has 6"):
        make_loader(cache_folder, seed=6).load_state_dict(state)
    with pytest.raises(ConfigError, match="step 3"):
        make_loader(cache_folder).enter(0, 3)


@pytest.mark.parametrize("before", [{}, {"order_version": 1}, {"order_version": 3}])
def test_a_state_of_another_order_of_records_is_refused_and_not_reordered(
    cache_folder: str, before: dict[str, int]
) -> None:
    state = make_loader(cache_folder).state_dict()
    del state["order_version"]
    version = before.get("order_version", 1)
    with pytest.raises(DataError, match=f"of order version {version}, this code walks .* order 2; .*new run folder"):
        make_loader(cache_folder).load_state_dict(state | before)


@pytest.mark.parametrize("name", ["index", "seed", "sync_group", "next_step", "cursors", "tokens_seen"])
def test_a_state_without_a_field_is_refused_by_its_name(cache_folder: str, name: str) -> None:
    state = make_loader(cache_folder).state_dict()
    del state[name]
    with pytest.raises(DataError, match=rf"has no {name}; .*start a new run folder"):
        make_loader(cache_folder).load_state_dict(state)


def test_a_cursor_without_a_field_is_refused_and_never_starts_over(cache_folder: str) -> None:
    loader = make_loader(cache_folder)
    loader.enter(0, 0)
    take(loader, 1)
    state = loader.state_dict()
    del state["cursors"]["img@64x64"]["position"]
    with pytest.raises(DataError, match=r"has no cursors\.img@64x64\.position"):
        make_loader(cache_folder).load_state_dict(state)


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_a_store_that_cannot_be_asked_is_no_damaged_record(
    cache_folder: str, monkeypatch: pytest.MonkeyPatch, prefetch_steps: int
) -> None:
    def unreachable(path: str, *_: object) -> bytes:
        raise StoreError(f"{path}: EndpointConnectionError")

    loader = make_loader(cache_folder, prefetch_steps=prefetch_steps)
    loader.enter(0, 0)
    with monkeypatch.context() as patched:
        patched.setattr(storage, "read_into", unreachable)
        with pytest.raises(StoreError, match="EndpointConnectionError"):
            take(loader, 1)
        with pytest.raises(StoreError, match="EndpointConnectionError"):
            loader.held_out()
    assert loader.num_bad_records == 0
    take(loader, 1)


def test_a_damaged_held_out_record_ends_the_run_with_the_fragment_to_remove(tmp_path: Path) -> None:
    folder = make_cache(str(tmp_path), SOURCES)
    name = damage(folder, "unseen", 1)
    with pytest.raises(DataError, match=rf"held-out record {name} .*remove {folder}/index/unseen.parquet"):
        make_loader(folder).held_out()


def test_a_bucket_that_the_pyramid_cannot_halve_is_refused(tmp_path: Path) -> None:
    folder = make_cache(str(tmp_path), [MadeSource("img", "image", 9, 1, size_px=48), SOURCES[0], SOURCES[2]])
    stage = CURRICULUM[0].model_copy(update={"buckets": (BucketSettings(height_px=48, width_px=48),)})
    loader = make_loader(folder, curriculum=(stage,))
    with pytest.raises(ConfigError, match="48x48"):
        loader.enter(0, 0)


def test_steps_of_an_old_stage_end_when_another_is_entered(cache_folder: str) -> None:
    loader = make_loader(cache_folder)
    loader.enter(0, 0)
    steps = loader.steps()
    next(steps)
    loader.enter(0, 1)
    with pytest.raises(RuntimeError, match="ended"):
        next(steps)
    assert loader.state_dict()["next_step"] == 1


def test_clips_added_between_two_starts_are_refused_by_source(cache_folder: str, tmp_path: Path) -> None:
    before = make_loader(cache_folder)
    before.enter(0, 0)
    take(before, 2)
    state = before.state_dict()
    grown = make_cache(str(tmp_path), [SOURCES[0], MadeSource("img", "image", 14, 1), SOURCES[2]])
    with pytest.raises(DataError, match="other records of img than"):
        make_loader(grown).load_state_dict(state)
    make_loader(cache_folder).load_state_dict(state)


def test_a_rank_counts_the_damaged_records_that_it_met(tmp_path: Path) -> None:
    folder = make_cache(str(tmp_path), SOURCES)
    damage(folder, "img", 3)
    counts = []
    for rank in range(4):
        loader = make_loader(folder, rank, 4)
        loader.enter(0, 0)
        assert loader.num_bad_records == 0
        take(loader, 1)
        counts.append(loader.num_bad_records)
        assert "num_bad" not in str(loader.state_dict())
    assert set(counts) <= {0, 1} and any(counts)


def test_the_ceiling_of_damaged_records_does_not_grow_with_the_ranks(tmp_path: Path) -> None:
    sources = [SOURCES[0], MadeSource("img", "image", 120, 1), SOURCES[2]]
    folder = make_cache(str(tmp_path), sources)
    # three of ten, twice what is allowed; but each of eight ranks meets fewer than 0.15 of all 130 records
    for position in range(0, 120, 10):
        for offset in range(3):
            damage(folder, "img", position + offset)
    curriculum = (CURRICULUM[0].model_copy(update={"micro_batch_slots": 1}),)
    for rank in range(8):
        loader = make_loader(folder, rank, 8, curriculum=curriculum, max_bad_fraction=0.15, held_out_slots=0)
        loader.enter(0, 0)
        with pytest.raises(DataError, match=rf"rank {rank} met .*index/img.parquet"):
            take(loader, 30)
        assert loader.num_bad_records < 18


def test_few_damaged_records_do_not_end_a_run_however_long(tmp_path: Path) -> None:
    folder = make_cache(str(tmp_path), [SOURCES[0], MadeSource("img", "image", 60, 1), SOURCES[2]])
    damage(folder, "img", 5), damage(folder, "img", 50)
    loader = make_loader(folder, max_bad_fraction=0.2)
    loader.enter(0, 0)
    take(loader, 30)
    assert loader.num_bad_records == 2
