"""Every config that ships loads, and its model builds without memory."""

from pathlib import Path

import pytest

from jobs.demo import MIN_REDONE_STEPS
from m4v_dist.config.load import config_from_json, config_to_json, load_config
from m4v_dist.config.schema import RunConfig
from m4v_dist.model.build import build_on_meta

CONFIGS = sorted((Path(__file__).parents[2] / "jobs" / "configs").glob("*.toml"))
CODEC_STRIDE = 8


def _load(path: Path) -> RunConfig:
    return load_config(str(path))


def test_there_are_configs() -> None:
    assert {path.name for path in CONFIGS} >= {"demo.toml", "tiny_cpu.toml", "m4v_2b.toml"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_survives_json(path: Path) -> None:
    config = _load(path)
    assert config_from_json(config_to_json(config)) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_model_of_a_config_builds_on_the_meta_device(path: Path) -> None:
    config = _load(path)
    model = build_on_meta(config.model, config.kernels)
    parameters = list(model.parameters())
    assert parameters and all(parameter.is_meta for parameter in parameters)
    assert len(model.double_blocks) == config.model.num_double_blocks
    assert len(model.single_blocks) == config.model.num_single_blocks


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_sizes_of_a_config_fit_codec_patch_and_pyramid(path: Path) -> None:
    config = _load(path)
    multiple = CODEC_STRIDE * config.model.patch_size * 2 ** (config.objective.num_pyramid_stages - 1)
    sizes = [(bucket.height_px, bucket.width_px) for bucket in config.precompute.buckets]
    sizes.append((config.sampling.height_px, config.sampling.width_px))
    assert all(height % multiple == 0 and width % multiple == 0 for height, width in sizes)


def test_the_demo_kills_in_a_stage_that_has_room_for_it() -> None:
    """The kill waits for half of the last stage and falls between two checkpoints."""
    config = _load(next(path for path in CONFIGS if path.name == "demo.toml"))
    every = config.trainer.checkpoint_every_steps
    assert every >= 2 * MIN_REDONE_STEPS and config.curriculum[-1].num_steps // 2 >= 2 * every
    assert config.logging.every_steps == 1 and config.launch.num_workers == 2 and config.launch.max_failures >= 1


def test_the_papers_curriculum_is_whole_and_in_its_order() -> None:
    """Height, latents and media of each stage; the first one twice, with the double blocks frozen and without."""
    config = _load(next(path for path in CONFIGS if path.name == "m4v_2b.toml"))
    media = {source.name: source.media for source in config.sources}
    stages = [
        (stage.buckets[0].height_px, stage.num_latents, sorted({media[name] for name in stage.weights}))
        for stage in config.curriculum
    ]
    assert stages == [
        (384, 1, ["image"]), (384, 1, ["image"]), (384, 8, ["image", "video"]), (384, 16, ["image", "video"]),
        (768, 8, ["image", "video"]), (768, 16, ["image", "video"]), (768, 31, ["image", "video"]),
    ]  # fmt: skip
    assert [stage.freeze for stage in config.curriculum] == [("double_blocks",)] + [()] * 6
    assert [stage.learning_rate for stage in config.curriculum] == [1e-4] * 2 + [5e-5] * 5
    for stage in config.curriculum[2:]:
        images = sum(weight for name, weight in stage.weights.items() if media[name] == "image")
        assert images / sum(stage.weights.values()) == pytest.approx(0.2)


def test_both_sizes_of_the_papers_curriculum_are_read_from_the_same_shards() -> None:
    config = _load(next(path for path in CONFIGS if path.name == "m4v_2b.toml"))
    shards = {source.name: source.shards for source in config.train_sources}
    assert shards["videos_384p"] == shards["videos_768p"] and shards["images_384p"] == shards["images_768p"]
    assert all(len(source.buckets) == 1 for source in config.sources)
