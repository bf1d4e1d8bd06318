"""`jobs.train` before any worker starts: bad input ends with its code and the way out, and a dry run shows the plan."""

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.cache_manifest import index_path
from data_pipeline.cache_writer import CacheShardWriter
from data_pipeline.latent_cache import LatentCache
from data_pipeline.manifest import read_index, write_index
from jobs import cli
from jobs.train import check_run_folder, require_free_run, train
from m4v_dist import lease, storage
from m4v_dist.batch import TextFeatures
from m4v_dist.config.load import parse_config
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.trainer import checkpoint
from tests.integration.small_run import make_small_cache, small_config, small_values, to_toml
from tests.trainer.made_checkpoint import made_checkpoint


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_small_cache(str(tmp_path_factory.mktemp("cache") / "cache"))


@pytest.fixture(autouse=True)
def _no_worker_may_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr("jobs.train.run_workers", refuse)
    monkeypatch.setattr("jobs.train.ray_session", refuse)


def committed(config: RunConfig, step: int, stage: int, start: int) -> str:
    """A checkpoint folder as the preflight sees it."""
    return made_checkpoint(config, step, {"index": stage, "name": config.curriculum[stage].name, "start": start})


def test_a_dry_run_shows_steps_slots_tokens_and_parameters(
    cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert "nothing was written" in train(small_config(str(tmp_path / "run"), cache), True)
    plan = plan_of(caplog)
    assert plan.startswith(f"plan, from records of {cache}\n")
    image, video = (rows_of(plan, name)[0] for name in ("image", "video"))
    assert image[1:4] == ["0..2", "12 = 2 x 2 x 3", "1"] and video[1:4] == ["2..9", "12 = 2 x 2 x 3", "3"]
    assert all(len(rows_of(plan, name)) == 2 for name in ("image", "video")), "work and memory"
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_how_evenly_sequences_are_cut(
    cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = small_values(str(tmp_path / "run"), cache)
    values["launch"] = {"num_workers": 2, "sequence_parallel": 2}
    values["curriculum"][0]["micro_batch_slots"] = 1
    with caplog.at_level(logging.INFO):
        train(parse_config(values, where="test"), True)
    plan = next(record.getMessage() for record in caplog.records if record.getMessage().startswith("plan"))
    assert "1 x 12" in plan, "two ranks that share their sequences are one data rank"
    (line,) = (line for line in plan.splitlines() if "sequence ranks" in line)
    found = re.search(r"holds ([\d.]+) times .* at worst ([\d.]+); (\d+) of (\d+) have fewer frames", line)
    assert found, line
    mean, worst, short, total = (float(part) for part in found.groups())
    # two steps of twelve single images, all on one of two ranks, and seven of four micro-batches of clips or images
    assert (short, total) == (24, 52)
    assert worst == 2.0 and 1 < mean < 2


def plan_of(caplog: pytest.LogCaptureFixture) -> str:
    """The plan that was logged."""
    return next(record.getMessage() for record in caplog.records if record.getMessage().startswith("plan"))


def rows_of(plan: str, name: str) -> list[list[str]]:
    """The cells of a stage's rows, in its tables' order."""
    lines = [line for line in plan.splitlines() if line.startswith(f"| {name} ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_dry_run_without_a_cache_shows_a_plan_of_assumed_records_and_then_what_is_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(str(tmp_path / "run"), str(tmp_path / "cache"))
    with caplog.at_level(logging.INFO), pytest.raises(DataError, match="run jobs.precompute_latents first"):
        train(config, True)
    plan = plan_of(caplog)
    assert plan.startswith("plan, from assumed records")
    # 12 images: a quarter each at 1 x 1 and 4 x 4 tokens, half at 2 x 2, and the longest texts
    assert rows_of(plan, "image")[0][4] == "75 + 1,536"
    assert not (tmp_path / "run").exists()


def test_a_stage_that_fits_no_memory_of_the_named_gpu_is_refused_before_any_worker_starts(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = small_values(str(tmp_path / "run"), cache)
    values["launch"]["gpu"] = "a100_40gb"
    monkeypatch.setattr("m4v_dist.config.gpus.USABLE_FRACTION", 1e-4)
    for dry_run in (False, True):
        with pytest.raises(ConfigError, match=r"curriculum 'image': a rank needs .* A100 40 GB has 0.0 GiB usable"):
            train(parse_config(values, where="test"), dry_run)


def test_a_dry_run_of_an_elastic_run_shows_what_a_rank_needs_of_the_fewest(
    cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = small_values(str(tmp_path / "run"), cache)
    values["launch"]["min_workers"] = 1
    with caplog.at_level(logging.INFO):
        train(parse_config(values, where="test"), True)
    assert "peak on launch.min_workers=1" in plan_of(caplog)
    peak, of_fewest = (float(cell) for cell in rows_of(plan_of(caplog), "video")[1][-2:])
    assert of_fewest > peak


def test_a_dry_run_asks_whether_the_workers_fit(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    values = small_values(str(tmp_path / "run"), cache)
    values["launch"] = {**values.get("launch", {}), "cpus_per_worker": 4096.0}
    with pytest.raises(ConfigError, match="cpus_per_worker=4096"):
        train(parse_config(values, where="test"), True)


def test_a_cache_of_another_codec_is_refused_by_field(cache: str, tmp_path: Path) -> None:
    other = str(shutil.copytree(cache, tmp_path / "cache"))
    manifest = storage.read_json(f"{other}/manifest.json")
    manifest["fingerprint"]["codec_weights_sha256"] = "another"
    storage.write_json(f"{other}/manifest.json", manifest)
    with pytest.raises(DataError, match=r"another codec or text encoder.*codec_weights_sha256.*'another'"):
        train(small_config(str(tmp_path / "run"), other), False)


def test_no_cache_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run jobs.precompute_latents first"):
        train(small_config(str(tmp_path / "run"), str(tmp_path / "nothing")), False)


def test_a_bucket_with_fewer_records_than_a_step_needs_names_both_numbers(cache: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'stills' has 14 records.*global_batch_slots=24.*take 24"):
        train(small_config(str(tmp_path / "run"), cache, global_batch_slots=24), False)


def test_a_model_for_other_text_is_refused_with_the_width_to_set(cache: str, tmp_path: Path) -> None:
    values = small_values(str(tmp_path / "run"), cache)
    values["model"]["text_width"] = 100
    with pytest.raises(ConfigError, match=r"text_width=100.*384"):
        train(parse_config(values, where="test"), False)


def test_a_text_longer_than_the_encoder_gives_is_exit_3_with_its_record_and_both_numbers(
    cache: str, tmp_path: Path
) -> None:
    other = str(shutil.copytree(cache, tmp_path / "cache"))
    rows, notes = read_index(index_path(other, "clips"))
    write_index(
        index_path(other, "clips"), [replace(row, num_text_tokens=(126 + n,)) for n, row in enumerate(rows)], notes
    )
    with pytest.raises(
        DataError,
        match=r"5 records .*max_tokens=128, the first is clips/clips003 with 129; .* remove .*/index/clips.parquet",
    ):
        train(small_config(str(tmp_path / "run"), other), False)


def test_a_held_out_record_with_text_of_another_width_is_exit_3_before_any_worker(cache: str, tmp_path: Path) -> None:
    """The model would fail on it with a column's number and no key."""
    other = str(shutil.copytree(cache, tmp_path / "cache"))
    whole = LatentCache.open(other)
    records = [(row, whole.read(row)) for row in whole.rows("unseen")]
    writer = CacheShardWriter(other, "unseen")
    for row, record in records:
        narrow = TextFeatures(record.text.tokens[:, :100], record.text.pooled)
        writer.add(row, record.latents, [narrow])
    writer.commit({})
    with pytest.raises(
        DataError, match=r"unseen/unseen00\d in .*: its text has \d tokens of width 100 .* say \d, 384 and"
    ):
        train(small_config(str(tmp_path / "run"), other), False)


def test_a_run_folder_of_another_model_is_refused(cache: str, tmp_path: Path) -> None:
    config = small_config(str(tmp_path / "run"), cache)
    committed(config, 3, 1, 2)
    values = small_values(str(tmp_path / "run"), cache)
    values["model"]["num_single_blocks"] = 3
    with pytest.raises(ConfigError, match=r"step_00000003 was trained with other settings.*num_single_blocks: 2 -> 3"):
        train(parse_config(values, where="test"), False)


def test_a_curriculum_cut_below_what_was_done_is_refused(cache: str, tmp_path: Path) -> None:
    config = small_config(str(tmp_path / "run"), cache)
    committed(config, 6, 1, 2)
    values = small_values(str(tmp_path / "run"), cache)
    values["curriculum"][1]["num_steps"] = 3
    with pytest.raises(ConfigError, match=r"at step 6 of stage 'video'.*ends at step 5"):
        train(parse_config(values, where="test"), False)
    values["curriculum"].pop()
    with pytest.raises(ConfigError, match=r"at step 6 of stage 'video'"):
        train(parse_config(values, where="test"), False)


def test_a_stage_cut_below_its_own_done_steps_is_refused_though_others_follow(cache: str, tmp_path: Path) -> None:
    values = small_values(str(tmp_path / "run"), cache)
    values["curriculum"][0]["num_steps"] = 5
    committed(parse_config(values, where="test"), 4, 0, 0)
    values["curriculum"][0]["num_steps"] = 3
    with pytest.raises(ConfigError, match=r"at step 4 of stage 'image'.*ends at step 3.*at least the 4 steps"):
        train(parse_config(values, where="test"), False)
    # nothing but this check stands in the way of as many steps as were done
    values["curriculum"][0]["num_steps"] = 4
    assert check_run_folder(parse_config(values, where="test")) == 4


def test_a_finished_run_submitted_again_says_so_and_starts_nothing(cache: str, tmp_path: Path) -> None:
    config = small_config(str(tmp_path / "run"), cache)
    committed(config, config.total_steps, 1, 2)
    assert "trained to its last step 9" in train(config, False)
    # Nor does it ask for what it would need no more.
    gone = small_values(str(tmp_path / "run"), str(tmp_path / "no-cache"))
    gone["launch"]["gpu"] = "a100_40gb"
    assert "trained to its last step 9" in train(parse_config(gone, where="test"), False)


def test_a_remote_run_folder_is_refused_for_now(cache: str) -> None:
    with pytest.raises(ConfigError, match=r"local or mounted.*trainer.checkpoint_folder.*may be on s3://"):
        train(small_config("s3://bucket/run", cache), False)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_planned_with(
    cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(str(tmp_path / "run"), cache)
    committed(config, 3, 1, 2)
    config_file = Path(checkpoint.attempt_folder(committed(config, 6, 1, 2), 1)) / "config.json"
    config_file.write_bytes(config_file.read_bytes()[:-1])
    assert check_run_folder(config) == 3
    assert re.search(r"step_00000006/attempt_0001/config.json: \d+ bytes.*damaged", caplog.text)
    # a look changes nothing: training itself takes the marker away
    assert (config_file.parent.parent / "COMMITTED").exists()


def test_a_run_whose_checkpoints_are_all_damaged_is_exit_3_and_never_begins_anew(cache: str, tmp_path: Path) -> None:
    config = small_config(str(tmp_path / "run"), cache)
    state = Path(checkpoint.attempt_folder(committed(config, 3, 1, 2), 1)) / "state.json"
    state.write_bytes(b"x" + state.read_bytes()[1:])
    with pytest.raises(DataError, match=r"all committed checkpoints are damaged \(step_00000003"):
        train(config, False)


def test_a_run_that_another_driver_trains_is_exit_2_and_its_result_is_left_alone(
    cache: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = small_config(str(tmp_path / "run"), cache)
    lease.claim(config.checkpoint_folder, lease.Holder("other", "gpu-7", "", 4321), above=0, timeout_s=60.0)
    storage.write_json(f"{tmp_path}/run/result.json", {"of": "the other"})
    (tmp_path / "run.toml").write_text(to_toml(config.model_dump(mode="json", exclude_none=True)))
    arguments = ["--config", str(tmp_path / "run.toml")]
    assert cli.main("train", train, "x", arguments, preflight=require_free_run) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert re.search(r"RunInUseError: .*in use by attempt 1 of process 4321 on gpu-7, since .*lease_timeout_s=60", last)
    assert storage.read_json(f"{tmp_path}/run/result.json") == {"of": "the other"}


def _no_cache(cache: Path) -> None:
    shutil.rmtree(cache)


def _empty_cache(cache: Path) -> None:
    """A precompute that kept nothing."""
    manifest = storage.read_json(f"{cache}/manifest.json")
    for name in manifest["fragments"]:
        for path in cache.rglob(f"*{name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    storage.write_json(f"{cache}/manifest.json", {**manifest, "fragments": [], "sources": {}})


def _other_codec(cache: Path) -> None:
    manifest = storage.read_json(f"{cache}/manifest.json")
    manifest["fingerprint"]["codec_weights_sha256"] = "another"
    storage.write_json(f"{cache}/manifest.json", manifest)


def _nothing(cache: Path) -> None:
    """The overrides are bad enough."""


@pytest.mark.parametrize(
    ("harm", "overrides", "exit_code", "last_line"),
    [
        (_no_cache, [], 3, "DataError: .*run jobs.precompute_latents"),
        (_empty_cache, [], 3, "DataError: .*holds no record"),
        (_other_codec, [], 3, "DataError: .*codec_weights_sha256.*'another'"),
        (_nothing, ["trainer.global_batch_slots=24"], 3, "DataError: .*14 records.*global_batch_slots=24"),
        (_nothing, ["trainer.global_batch_slots=13"], 2, "ConfigError: .*global_batch_slots=13 is no multiple"),
        (_nothing, ["launch.num_workers=0"], 2, "ConfigError: .*launch.num_workers"),
        (_nothing, ["precompute.num_frames=16"], 2, "ConfigError: .*num_frames=16 breaks the 8k.1 frame rule; use 17"),
        (_nothing, ["curriculum.1.weights={klips=1.0}"], 2, r"ConfigError: .*weights name \['klips'\], but .*'clips'"),
        (_nothing, ["trainer.global_batch_slots=2"], 2, "ConfigError: .*slots=2 is no .*sync_group=3; use 3"),
        (
            _nothing,
            ["precompute.buckets.0.height_px=96", "curriculum.0.buckets.0.height_px=96"],
            2,
            "ConfigError: .*96x64 px does not divide into patches at all 3 pyramid stages.*multiples of 64",
        ),
    ],
    ids=[
        "no cache",
        "empty cache",
        "another codec",
        "bucket too small",
        "impossible group",
        "impossible workers",
        "frames not 8k+1",
        "missing source",
        "batch smaller than the group",
        "bucket that the pyramid cannot divide",
    ],
)
def test_bad_input_of_the_command_gives_its_code_last_line_and_result(
    cache: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    harm: Callable[[Path], None],
    overrides: list[str],
    exit_code: int,
    last_line: str,
) -> None:
    harm(Path(shutil.copytree(cache, tmp_path / "cache")))
    config = small_config(str(tmp_path / "run"), str(tmp_path / "cache"))
    (tmp_path / "run.toml").write_text(to_toml(config.model_dump(mode="json", exclude_none=True)))
    assert cli.main("train", train, "x", ["--config", str(tmp_path / "run.toml"), *overrides]) == exit_code
    last = capfd.readouterr().err.splitlines()[-1]
    assert re.fullmatch(f"train: {last_line}.*", last), last
    if exit_code == 2:
        # the config was never whole, so there is no run folder to write to
        assert not (tmp_path / "run").exists()
        return
    result = storage.read_json(f"{tmp_path}/run/result.json")
    assert (result["verb"], result["exit_code"], f"train: {result['reason']}") == ("train", exit_code, last)
