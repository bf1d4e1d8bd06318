"""The command line: three things, one exit code for each kind of failure, the reason last and in result.json."""

import json
from pathlib import Path

import pytest

from jobs import cli
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import DataError

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
