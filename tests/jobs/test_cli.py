"""The command line: three things, one exit code for each kind of failure, the reason last and in result.json."""

import json
from pathlib import Path

import pytest

from jobs import cli
from jobs.precompute_latents import precompute_latents
from jobs.train import train
from m4v_dist.config.load import load_config
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, DataError

TOML = """
[run]
name = "t"
folder = "{folder}"
[[sources]]
name = "clips"
shards = "a.tar"
media = "video"
licence = "MIT"
[precompute]
cache = "c"
num_frames = 17
buckets = [{{height_px = 64, width_px = 64}}]
[model]
preset = "tiny"
[[curriculum]]
name = "v"
num_steps = 5
num_latents = 3
weights = {{clips = 1.0}}
buckets = [{{height_px = 64, width_px = 64}}]
"""


def _done(config: RunConfig, dry_run: bool) -> str:
    return "planned" if dry_run else "done"


def _config(tmp_path: Path, folder: str) -> str:
    path = tmp_path / "run.toml"
    path.write_text(TOML.format(folder=folder))
    return str(path)


def test_success_prints_the_reason_last_and_writes_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = _config(tmp_path, str(tmp_path / "run"))
    assert cli.main("verb", _done, "x", ["--config", config]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "verb: done"
    assert json.loads((tmp_path / "run" / "result.json").read_text())["exit_code"] == 0


def test_dry_run_touches_nothing(tmp_path: Path) -> None:
    assert cli.main("verb", _done, "x", ["--config", _config(tmp_path, str(tmp_path / "run")), "--dry-run"]) == 0
    assert not (tmp_path / "run").exists()


def test_unknown_key_is_exit_2(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = _config(tmp_path, str(tmp_path / "run"))
    assert cli.main("verb", _done, "x", ["--config", config, "trainer.zero_stagee=2"]) == 2
    assert "did you mean trainer.zero_stage?" in capfd.readouterr().err


def test_unwritable_output_is_exit_2(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert cli.main("verb", _done, "x", ["--config", _config(tmp_path, str(blocker / "run"))]) == 2
    assert "cannot be written" in capfd.readouterr().err


def test_data_error_is_exit_3_and_stands_in_result_json(tmp_path: Path) -> None:
    def fail(config: RunConfig, dry_run: bool) -> str:
        raise DataError("shard x.tar is missing; put it there.")

    assert cli.main("verb", fail, "x", ["--config", _config(tmp_path, str(tmp_path / "run"))]) == 3
    assert "x.tar" in json.loads((tmp_path / "run" / "result.json").read_text())["reason"]


def _result(tmp_path: Path) -> dict[str, object]:
    result: dict[str, object] = json.loads((tmp_path / "run" / "result.json").read_text())
    return result


def test_exit_2_of_a_verb_replaces_the_result_of_an_earlier_job(tmp_path: Path) -> None:
    config = _config(tmp_path, str(tmp_path / "run"))
    assert cli.main("verb", _done, "x", ["--config", config]) == 0

    def refuse(config: RunConfig, dry_run: bool) -> str:
        raise ConfigError("model.text_width=100 does not fit.")

    assert cli.main("verb", refuse, "x", ["--config", config]) == 2
    assert _result(tmp_path)["exit_code"] == 2 and "text_width" in str(_result(tmp_path)["reason"])


def test_an_unexpected_error_is_raised_and_stands_in_result_json_as_1(tmp_path: Path) -> None:
    def crash(config: RunConfig, dry_run: bool) -> str:
        raise ZeroDivisionError("a fault of ours")

    with pytest.raises(ZeroDivisionError):
        cli.main("verb", crash, "x", ["--config", _config(tmp_path, str(tmp_path / "run"))])
    assert _result(tmp_path)["exit_code"] == 1 and _result(tmp_path)["reason"] == "ZeroDivisionError: a fault of ours"


def test_a_job_that_is_killed_leaves_no_result_of_an_earlier_one(tmp_path: Path) -> None:
    config = _config(tmp_path, str(tmp_path / "run"))
    assert cli.main("verb", _done, "x", ["--config", config]) == 0

    def look(config: RunConfig, dry_run: bool) -> str:
        assert not (tmp_path / "run" / "result.json").exists()
        return "looked"

    assert cli.main("verb", look, "x", ["--config", config]) == 0


def test_a_preflight_that_refuses_writes_nothing(tmp_path: Path) -> None:
    def refuse(config: RunConfig) -> None:
        raise ConfigError("not this folder")

    arguments = ["--config", _config(tmp_path, str(tmp_path / "run"))]
    assert cli.main("verb", _done, "x", arguments, preflight=refuse) == 2
    assert not (tmp_path / "run").exists()


def test_overrides_may_stand_on_both_sides_of_the_options(tmp_path: Path) -> None:
    def tell(config: RunConfig, dry_run: bool) -> str:
        return f"{config.run.name} {config.run.seed}"

    config = _config(tmp_path, str(tmp_path / "run"))
    assert cli.main("verb", tell, "x", ["run.name=other", "--config", config, "run.seed=3"]) == 0
    assert _result(tmp_path)["reason"] == "other 3"


@pytest.mark.parametrize("verb", [precompute_latents, train])
def test_a_cache_in_a_store_without_credentials_is_exit_3_with_where_they_come_from(
    verb: cli.Verb, no_credentials: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = _config(tmp_path, str(tmp_path / "run"))
    assert cli.main("verb", verb, "x", ["--config", config, "precompute.cache=s3://bucket/cache", "--dry-run"]) == 3
    shown = capfd.readouterr().err.splitlines()[-1]
    assert shown.startswith("verb: StoreError: s3://bucket/cache") and "AWS_ACCESS_KEY_ID" in shown


def test_a_relative_path_is_refused_where_a_submitted_job_s_code_stands(tmp_path: Path) -> None:
    unpacked = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0123456789abcdef"
    config = load_config(_config(tmp_path, "/shared/run"))
    with pytest.raises(ConfigError, match=r"precompute.cache=c is relative.*by precompute.cache=/"):
        cli.check_kept(config, unpacked)
    cli.check_kept(config, str(tmp_path))
    kept = load_config(_config(tmp_path, "/shared/run"), ["precompute.cache=s3://bucket/c"])
    cli.check_kept(kept, unpacked)


def test_a_config_is_required_where_a_verb_has_none_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.parse_arguments("verb", "x", ["run.seed=3"])
    assert "--config" in capfd.readouterr().err
    assert cli.parse_arguments("verb", "x", ["run.seed=3"], default_config="own.toml").config == "own.toml"
    given = cli.parse_arguments("verb", "x", ["--config", "other.toml"], default_config="own.toml")
    assert given.config == "other.toml"


def test_an_object_store_without_credentials_is_exit_2(
    no_credentials: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main("verb", _done, "x", ["--config", _config(tmp_path, "s3://bucket/run")]) == 2
    assert "s3://bucket/run cannot be written" in (shown := capfd.readouterr().err) and "credentials" in shown


def test_a_folder_that_no_run_has_made_is_exit_3_and_stays_unmade(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = _config(tmp_path, str(tmp_path / "mistyped"))
    assert cli.main("report", _done, "x", ["--config", config], preflight=cli.require_run_folder) == 3
    assert "no such run" in capfd.readouterr().err and not (tmp_path / "mistyped").exists()


def test_a_folder_as_config_is_exit_2(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main("verb", _done, "x", ["--config", str(tmp_path)]) == 2
    assert "Is a directory" in capfd.readouterr().err
