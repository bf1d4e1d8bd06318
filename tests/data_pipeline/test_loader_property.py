"""One run in pieces is the run in one piece: any ranks, any kills, reading ahead or not, sharing reads or not."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.host_files import SharedReads
from data_pipeline.loader import LatentLoader, StepBatch
from m4v_dist.config.data_settings import BucketSettings, SourceSettings
from m4v_dist.config.training_settings import CurriculumStageSettings
from tests.data_pipeline.made_cache import MadeSource, make_cache
from tests.data_pipeline.test_loader import damage, make_loader

SMALL, LARGE = (BucketSettings(height_px=side, width_px=side) for side in (64, 128))
SOURCES = [
    MadeSource("vid", "video", 7, 5, num_captions=3),
    MadeSource("img", "image", 13, 1, num_captions=2),
    MadeSource("long", "video", 5, 3, size_px=128),
    MadeSource("unseen", "video", 3, 4, split="held_out"),
]
CURRICULUM = (
    CurriculumStageSettings(
        name="images", num_steps=3, num_latents=1, buckets=(SMALL,), weights={"img": 1.0}, micro_batch_slots=2
    ),
    CurriculumStageSettings(
        name="videos", num_steps=4, num_latents=4, buckets=(SMALL,), weights={"vid": 3.0, "img": 1.0},
        micro_batch_slots=1,
    ),
    # other weights, of which one source goes on where it stood and one is new
    CurriculumStageSettings(
        name="larger", num_steps=99, num_latents=3, buckets=(SMALL, LARGE), weights={"img": 2.0, "long": 1.0},
        micro_batch_slots=3,
    ),
)  # fmt: skip
STAGE_STARTS = (0, 3, 7)
NUM_STEPS = 11


@dataclass(frozen=True)
class Attempt:
    """One life of a run: so many ranks do so many steps, the state of some step is saved, then all are killed."""

    world_size: int
    num_steps: int
    num_saved: int
    prefetch_steps: int
    is_sharing: bool


ATTEMPTS = st.lists(
    st.builds(
        Attempt,
        world_size=st.sampled_from([1, 2, 3, 4, 8]),
        num_steps=st.integers(1, 6),
        num_saved=st.integers(0, 6),
        prefetch_steps=st.integers(0, 3),
        is_sharing=st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache with two damaged records, which every run must replace alike."""
    folder = make_cache(str(tmp_path_factory.mktemp("cache")), SOURCES)
    damage(folder, "img", 3)
    damage(folder, "vid", 2)
    return folder


def open_loader(folder: str, rank: int, world_size: int, **changes: Any) -> LatentLoader:
    return make_loader(
        folder, rank, world_size, curriculum=CURRICULUM, max_bad_fraction=0.9, held_out_slots=0,
        sources=[source_settings(source) for source in SOURCES], **changes,
    )  # fmt: skip


def source_settings(source: MadeSource) -> SourceSettings:
    values = {"name": source.name, "shards": "x", "media": source.media, "licence": "none", "split": source.split}
    return SourceSettings.model_validate(values)


def run(loader: LatentLoader, step: int, stop: int) -> list[StepBatch]:
    """Steps from `step` to `stop`, through the stages between."""
    done: list[StepBatch] = []
    for index, (start, end) in enumerate(zip(STAGE_STARTS, (*STAGE_STARTS[1:], NUM_STEPS), strict=True)):
        first, last = max(step, start), min(stop, end)
        if first < last:
            loader.enter(index, first)
            steps = loader.steps()
            done += [next(steps) for _ in range(last - first)]
    loader.close()
    return done


def contents(batches: Sequence[StepBatch]) -> list[tuple[Any, ...]]:
    """Every counted slot with the bytes that it was handed out with; fillers left out."""
    found = []
    for batch in batches:
        for micro in batch.micro_batches:
            for slot, latents, text, weight in zip(micro.slots, micro.latents, micro.text, micro.weights, strict=True):
                assert text.tokens.shape[0] == 3 + slot.record % 2 + slot.caption
                assert text.pooled[0] == slot.caption + 1
                parts = [latents.view(-1).float(), text.tokens.view(-1).float(), text.pooled]
                digest = hashlib.blake2b(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()
                if weight:
                    found.append((slot.step, slot.index, slot, tuple(latents.shape), digest))
    return sorted(found, key=lambda content: content[:2])


@pytest.fixture(scope="module")
def straight(folder: str) -> list[tuple[Any, ...]]:
    """One rank, never killed, reading nothing ahead."""
    found = contents(run(open_loader(folder, 0, 1, prefetch_steps=0), 0, NUM_STEPS))
    assert [content[:2] for content in found] == [(step, index) for step in range(NUM_STEPS) for index in range(8)]
    captions = {(slot.source, slot.caption) for _, _, slot, _, _ in found}
    assert captions == {("vid", 0), ("vid", 1), ("vid", 2), ("img", 0), ("img", 1), ("long", 0)}
    return found


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(attempts=ATTEMPTS)
def test_a_run_in_any_pieces_is_the_run_in_one(
    folder: str, straight: list[tuple[Any, ...]], attempts: list[Attempt]
) -> None:
    state: dict[str, Any] | None = None
    kept: list[tuple[Any, ...]] = []
    last = Attempt(2, NUM_STEPS, NUM_STEPS, 1, False)
    with TemporaryDirectory() as shared:
        for attempt in [*attempts, last]:
            step = state["next_step"] if state is not None else 0
            stop = min(step + attempt.num_steps, NUM_STEPS)
            saved = min(step + min(attempt.num_saved, attempt.num_steps), NUM_STEPS)
            states, done = [], []
            for rank in range(attempt.world_size):
                loader = open_loader(
                    folder, rank, attempt.world_size, prefetch_steps=attempt.prefetch_steps,
                    shared=SharedReads(1 << 20, shared) if attempt.is_sharing else None,
                )  # fmt: skip
                if state is not None:
                    loader.load_state_dict(state)
                done += run(loader, step, saved)
                states.append(loader.state_dict())
                # what a kill loses: handed out, and not in the state that the next attempt goes on from
                run(loader, saved, stop)
            assert all(other == states[0] for other in states)
            state, kept = states[0], kept + contents(done)
    assert kept == straight
    alone = open_loader(folder, 0, 1)
    run(alone, 0, NUM_STEPS)
    assert state == alone.state_dict()
