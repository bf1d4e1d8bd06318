"""The bar follows the run's rows, moves back at a restart, and leaves out what was there before."""

import json
from pathlib import Path

import pytest

from m4v_dist.launch.metrics_tail import MetricsTail
from m4v_dist.launch.progress import TrainingProgress


def _write(folder: Path, kind: str, step: int, **values: object) -> None:
    row = {"attempt": 2, "step": step, "kind": kind, "curriculum_stage": "video", "train/loss": 0.25, **values}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def test_the_bar_shows_steps_loss_and_restarts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with TrainingProgress(str(tmp_path), total_steps=8, start_step=0):
        _write(tmp_path, "train", 4)
        _write(tmp_path, "restart", 2)
        _write(tmp_path, "held_out", 2, **{"validation/held_out_loss": 0.5})
        _write(tmp_path, "failed_save", 2, checkpoint="step_00000002", failures=["rank 1: disk full", "more"])
        _write(tmp_path, "damaged_checkpoint", 1, checkpoint="step_00000002", reason="cut short")
        _write(tmp_path, "train", 2)
    shown = capfd.readouterr()
    assert "3/8" in shown.err.split("\r")[-1] and "loss=0.2500" in shown.err and "stage=video" in shown.err
    assert "step_00000002 could not be saved: rank 1: disk full" in shown.out
    assert "step_00000002 is damaged; going on from step 1: cut short" in shown.out
    assert "attempt 2 goes on at step 2" in shown.out and "held-out loss after 2 steps: 0.5000" in shown.out


def test_rows_of_an_earlier_submission_are_not_shown(tmp_path: Path) -> None:
    _write(tmp_path, "train", 4)
    tail = MetricsTail(str(tmp_path), from_end=True)
    assert tail.new_rows() == []
    _write(tmp_path, "train", 5)
    assert [row["step"] for row in tail.new_rows()] == [5]


def test_a_torn_line_does_not_end_the_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tail = MetricsTail(str(tmp_path))
    with TrainingProgress(str(tmp_path), total_steps=8, start_step=0):
        (tmp_path / "metrics.jsonl").write_text('{"attempt": 1, "st\n')
        assert tail.new_rows() == [] and tail.num_torn_lines == 1
        _write(tmp_path, "train", 4)
    assert "5/8" in capfd.readouterr().err.split("\r")[-1]
    assert [row["step"] for row in tail.new_rows()] == [4]


def test_an_error_in_the_block_comes_through(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="worker"), TrainingProgress(str(tmp_path), total_steps=8, start_step=0):
        raise RuntimeError("worker")
