"""The demo stops at the first step that fails, with its exit code, and notices a precompute that works twice."""

import time
from pathlib import Path

import pytest

from jobs import demo
from m4v_dist import storage
from m4v_dist.config.load import load_config

CONFIG = str(Path(__file__).parents[2] / "jobs" / "configs" / "demo.toml")


def _demo(tmp_path: Path, *arguments: str) -> demo.Demo:
    config = load_config(CONFIG, [f"run.folder={tmp_path}/run", f"precompute.cache={tmp_path}/cache"])
    return demo.Demo(config, arguments)


def test_a_step_that_fails_ends_the_demo_with_its_exit_code(tmp_path: Path) -> None:
    """report has nothing to report on: exit 3."""
    step = _demo(tmp_path, "--config", CONFIG, f"run.folder={tmp_path}/run", f"precompute.cache={tmp_path}/cache")
    with pytest.raises(demo.StepFailedError, match=r"exit code 3 from: .*python\S* -m jobs.report --config") as raised:
        step._step("report")
    assert raised.value.exit_code == 3


def test_the_command_is_shown_so_that_it_can_be_copied(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    step = _demo(tmp_path, "--config", CONFIG, "sampling.prompts=['two words']", "--dry-run")
    step._step("sample")
    shown = capfd.readouterr().out
    assert f"-m jobs.sample --config {CONFIG} 'sampling.prompts=['\"'\"'two words'\"'\"']' --dry-run" in shown
    assert "would sample 1 videos" in shown


def test_a_second_precompute_that_writes_is_noticed(tmp_path: Path) -> None:
    shard = tmp_path / "cache" / "shards" / "a.tar"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"one")
    before = demo.snapshot(str(tmp_path / "cache"))
    assert demo.snapshot(str(tmp_path / "cache")) == before
    time.sleep(0.02)
    storage.write_bytes(str(shard), b"two")
    assert demo.snapshot(str(tmp_path / "cache")) != before


def test_an_earlier_demo_is_removed_and_an_empty_folder_is_not_spoken_of(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    _demo(tmp_path)._clear()
    assert "Removing" not in capfd.readouterr().out
    (run / "metrics.jsonl").write_text("{}")
    _demo(tmp_path)._clear()
    assert "Removing" in capfd.readouterr().out and not run.exists()


def test_a_dry_run_touches_nothing(tmp_path: Path) -> None:
    assert demo.main(["--config", CONFIG, f"run.folder={tmp_path}/run", "--dry-run"]) == 0
    assert not (tmp_path / "run").exists()


def test_a_remote_run_folder_is_exit_2(tmp_path: Path) -> None:
    assert demo.main(["--config", CONFIG, "run.folder=s3://bucket/run", "--dry-run"]) == 2


def test_the_demo_runs_without_arguments_from_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(CONFIG).parents[2])
    assert demo.main(["--dry-run"]) == 0
