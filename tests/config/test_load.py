"""Configuration is strict, and its errors say what, where and the way out."""

from pathlib import Path
from typing import Any, get_args

import pytest

from m4v_dist.config.gpus import GPUS
from m4v_dist.config.load import config_from_json, config_to_json, load_config, parse_config
from m4v_dist.config.training_settings import LaunchSettings
from m4v_dist.errors import ConfigError
from tests.config.run_values import run_values


def test_preset_fills_what_the_file_leaves_out_and_keys_override_it() -> None:
    values = run_values()
    values["model"] = {"preset": "m4v_2b", "num_single_blocks": 4, "ssm": {"chunk_size": 128}}
    model = parse_config(values, "test").model
    assert (model.hidden_size, model.num_single_blocks, model.ssm.chunk_size) == (1920, 4, 128)


def test_resolved_config_survives_json() -> None:
    config = parse_config(run_values(), "test")
    assert config_from_json(config_to_json(config)) == config


def test_override_reaches_a_list_item_and_a_missing_section(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        '[run]\nname = "t"\nfolder = "r"\n[[sources]]\nname = "clips"\nshards = "a.tar"\nmedia = "video"\n'
        'licence = "MIT"\n[precompute]\ncache = "c"\nnum_frames = 17\n'
        "[[precompute.buckets]]\nheight_px = 64\nwidth_px = 64\n"
        '[model]\npreset = "tiny"\n[[curriculum]]\nname = "v"\nnum_steps = 5\nnum_latents = 3\n'
        "weights = {clips = 1.0}\n"
        "[[curriculum.buckets]]\nheight_px = 64\nwidth_px = 64\n"
    )
    config = load_config(str(file), ["trainer.zero_stage=3", "curriculum.0.num_steps=7", "run.folder=/tmp/x"])
    assert (config.trainer.zero_stage, config.curriculum[0].num_steps, config.run.folder) == (3, 7, "/tmp/x")


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("objective", "cfg_dorpout", 0.1, ["did you mean objective.cfg_dropout?", "Known here"]),
        ("precompute", "num_frames", 16, ["num_frames=16", "8k+1", "use 17"]),
        ("model", "num_heads", 3, ["hidden_size=128", "num_heads=3"]),
        ("model", "preset", "huge", ["model.preset", "'tiny', 'small' or 'm4v_2b'", "'huge'"]),
        ("trainer", "global_batch_slots", 12, ["global_batch_slots=12", "sync_group=8", "use 16"]),
        ("objective", "pyramid_stage_columns", [0, 3], ["pyramid_stage_columns=(0, 3)", "0..2"]),
        ("sampling", "height_px", 100, ["100x128 px", "multiples of 64", "as 64 or 128 high and 128 wide"]),
        ("sampling", "width_px", 40, ["128x40 px", "as 128 high and 64 wide"]),
        ("sampling", "first_unit_steps", [1, 2], ["first_unit_steps=[1, 2] has 2", "3 pyramid stages"]),
        ("model", "hidden_size", 256, ["256 / 2 = 128, but rope_axes=(16, 24, 24) sum to 64: set num_heads=4"]),
        ("model", "hidden_size", 160, ["160 / 2 = 80, but", "sum to 64: set rope_axes that sum to 80"]),
        ("text_encoder", "weights", "s3://a/b", ["'s3://a/b'", "s3:// is not read here; copy it to a local folder"]),
    ],
)
def test_refusal_says_what_and_the_way_out(section: str, key: str, value: Any, words: list[str]) -> None:
    values = run_values()
    values.setdefault(section, {})[key] = value
    with pytest.raises(ConfigError) as caught:
        parse_config(values, "run.toml")
    for word in ["run.toml", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(("num_workers", "micro_batch_slots"), [(5, 4), (2, 3), (64, 1)])
def test_any_number_of_workers_and_any_micro_batch_fit_a_batch(num_workers: int, micro_batch_slots: int) -> None:
    values = run_values()
    values["launch"]["num_workers"] = num_workers
    values["curriculum"][0]["micro_batch_slots"] = micro_batch_slots
    assert parse_config(values, "run.toml").launch.num_workers == num_workers


@pytest.mark.parametrize(
    ("launch", "model", "words"),
    [
        ({"num_workers": 4, "sequence_parallel": 3}, {}, r"num_workers=4; use one of 1, 2, 4, or 6 workers"),
        ({"num_workers": 4, "sequence_parallel": 4}, {}, r"=4 does not divide model.num_heads=2.*use one of 1, 2\."),
        ({"num_workers": 4, "sequence_parallel": 4}, {"preset": "m4v_2b"}, r"num_heads=30.*1, 2, 3, 5, 6, 10, 15, 30"),
    ],
)
def test_sequence_ranks_that_divide_neither_workers_nor_heads_are_refused(
    launch: dict[str, Any], model: dict[str, Any], words: str
) -> None:
    values = run_values()
    values["launch"], values["model"] = launch, model
    with pytest.raises(ConfigError, match=words):
        parse_config(values, "run.toml")


@pytest.mark.parametrize(
    ("launch", "trainer", "words"),
    [
        ({"sequence_parallel": 2}, {}, r"min_workers=2 does not go with launch.sequence_parallel=2: .*need a multiple"),
        ({}, {"zero_stage": 3, "hpz_partition_size": 2}, r"does not go with trainer.hpz_partition_size=2"),
    ],
)
def test_groups_of_ranks_are_refused_in_an_elastic_run(
    launch: dict[str, Any], trainer: dict[str, Any], words: str
) -> None:
    values = run_values()
    values["launch"] = {"num_workers": 4, **launch}
    values["trainer"] = {**values.get("trainer", {}), **trainer}
    assert parse_config(values, "run.toml").launch.least_workers == 4
    values["launch"]["min_workers"] = 2
    with pytest.raises(ConfigError, match=words):
        parse_config(values, "run.toml")


@pytest.mark.parametrize("backend", ["triton", "mamba_ssm"])
def test_kernels_for_gpus_are_refused_where_training_runs_on_cpus(backend: str) -> None:
    values = run_values()
    values["kernels"] = {"backend": backend}
    with pytest.raises(ConfigError, match=f'kernels.backend="{backend}" runs on GPUs, but launch.use_gpu=false'):
        parse_config(values, "run.toml")
    values["launch"] = {**values.get("launch", {}), "use_gpu": True}
    assert parse_config(values, "run.toml").kernels.backend == backend


def test_a_model_without_attention_may_have_any_number_of_sequence_ranks() -> None:
    values = run_values()
    values["launch"] = {"num_workers": 4, "sequence_parallel": 4}
    values["model"] = {"num_double_blocks": 0}
    assert parse_config(values, "run.toml").launch.num_data_ranks == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": {"unseen": 1.0}}, "training sources are ['clips']"),
        ({"num_latents": 4}, "raise precompute.num_frames to 25"),
        ({"buckets": [{"height_px": 128, "width_px": 64}]}, "128x64"),
        ({"weights": {"klips": 1.0}}, "weights name ['klips'], but the training sources are ['clips']"),
    ],
)
def test_curriculum_stage_that_contradicts_other_sections_is_refused(change: dict[str, Any], words: str) -> None:
    values = run_values()
    values["curriculum"][0].update(change)
    with pytest.raises(ConfigError) as caught:
        parse_config(values, "run.toml")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("trainer", "words"),
    [
        ({"profile": {"start_step": 3, "ranks": [0, 2]}}, r"profile.ranks names \[2\].*num_workers=2 .*0 to 1"),
        ({"profile": {"start_step": 10}}, r"profile.start_step=10 is past the curriculum's last step 9"),
        ({"keep_every_steps": 2500}, r"keep_every_steps=2500 is no .*checkpoint_every_steps=1000.*use 3000"),
    ],
    ids=["a trace of a rank that is not there", "a trace past the end", "checkpoints that are never saved"],
)
def test_what_would_never_come_is_refused(trainer: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config({**run_values(), "trainer": trainer}, where="test")


def test_missing_file_and_broken_toml_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(str(tmp_path / "none.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(str(broken))


@pytest.mark.parametrize(
    ("buckets", "words"),
    [
        ([{"height_px": 128, "width_px": 128}], ["clips", "128x128", "precompute.buckets (64x64, 64x128)"]),
        ([{"height_px": 64, "width_px": 128}], ["'video'", "reads 64x64", "'clips' go to 64x128"]),
    ],
    ids=["a size that the cache will not have", "a size that the stage does not read"],
)
def test_a_source_of_other_sizes_is_refused_with_both(buckets: list[dict[str, int]], words: list[str]) -> None:
    values = run_values()
    values["precompute"]["buckets"].append({"height_px": 64, "width_px": 128})
    values["sources"][0]["buckets"] = buckets
    with pytest.raises(ConfigError) as caught:
        parse_config(values, "run.toml")
    for word in words:
        assert word in str(caught.value)


def test_every_gpu_that_a_plan_knows_can_be_named_and_no_other() -> None:
    names = get_args(get_args(LaunchSettings.model_fields["gpu"].annotation)[0])
    assert set(names) == set(GPUS)
