"""Rows, ledger and W&B."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from m4v_dist.config.training_settings import LoggingSettings
from m4v_dist.trainer.ema import Ema, decay_at
from m4v_dist.trainer.guards import Clock
from m4v_dist.trainer.metrics import Ledger, Metrics, broken_attempt, ledger_table, read_rows
from m4v_dist.trainer.zero_slices import Slice
from tests.trainer.toy import toy_config


def _metrics(folder: Path, attempt: int, mode: str = "disabled") -> Metrics:
    settings = LoggingSettings.model_validate({"wandb": mode})
    return Metrics(str(folder), attempt, settings, toy_config(str(folder)))


def test_rows_are_appended_over_attempts_and_floats_read_back_to_the_last_bit(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1 / 3, 5e-324, float(torch.tensor(0.1))]
    for attempt in (1, 2):
        metrics = _metrics(tmp_path, attempt)
        for step, value in enumerate(values):
            metrics.write("train", step, {"train/loss": value, "timing/step_s": 1.0})
        metrics.write("train", 9, {"train/loss": math.nan, "timing/step_s": 1.0})
        metrics.close()
    rows, num_torn = read_rows(str(tmp_path))
    assert num_torn == 0
    assert [row["train/loss"] for row in rows][:4] == values
    assert [row["attempt"] for row in rows] == [1] * 5 + [2] * 5
    assert math.isnan(rows[4]["train/loss"])


@pytest.mark.parametrize("torn", [b'{"attempt": 1, "st', b"\0\0\0\0", b"\xff\xfe{", b"[1]"])
def test_a_torn_line_costs_itself_only_and_the_next_row_stands_on_its_own(tmp_path: Path, torn: bytes) -> None:
    metrics = _metrics(tmp_path, 1)
    metrics.write("train", 0, {})
    metrics.close()
    with metrics.path.open("ab") as file:
        file.write(torn)
    for attempt in (2, 3):
        metrics = _metrics(tmp_path, attempt)
        metrics.write("train", attempt, {})
        metrics.close()
    rows, num_torn = read_rows(str(tmp_path))
    assert [row["attempt"] for row in rows] == [1, 2, 3]
    assert num_torn == 1
    assert b"\n\n" not in metrics.path.read_bytes()


def test_rows_that_a_full_disk_does_not_take_wait_for_room_and_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, room = os.write, [10]

    def write(file: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = whole(file, data[: room[0]])
        room[0] -= taken
        return taken

    metrics = _metrics(tmp_path, 1)
    monkeypatch.setattr(os, "write", write)
    metrics.write("train", 0, {})
    metrics.write("train", 1, {})
    assert read_rows(str(tmp_path)) == ([], 1), "ten bytes of the first"
    assert len(caplog.records) == 1 and "rows wait in memory" in caplog.text
    room[0] = 10**6
    metrics.write("train", 2, {})
    assert [row["step"] for row in read_rows(str(tmp_path))[0]] == [0, 1, 2]
    room[0] = 0
    metrics.write("train", 3, {})
    metrics.close()
    assert "1 rows were never written" in caplog.text and '"step": 3' in caplog.text

    metrics = _metrics(tmp_path, 2)
    monkeypatch.setattr("m4v_dist.trainer.metrics.MAX_WAITING_BYTES", 100)
    with pytest.raises(OSError, match="No space left"):
        for step in range(9):
            metrics.write("train", step, {})


def test_a_disk_that_takes_a_part_of_a_row_gets_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.write
    monkeypatch.setattr(os, "write", lambda file, data: whole(file, data[:7]))
    metrics = _metrics(tmp_path, 1)
    metrics.write("train", 0, {"train/loss": 1.0})
    metrics.close()
    assert read_rows(str(tmp_path))[0][0]["train/loss"] == 1.0


def _row(attempt: int, kind: str, step: int, time: float) -> dict[str, Any]:
    return {"attempt": attempt, "kind": kind, "step": step, "time": time}


def test_lost_work_is_the_time_since_the_checkpoint_whatever_was_logged_in_it() -> None:
    rows = [_row(1, "train", 5, 1.0), _row(2, "restart", 4, 10.0), _row(2, "train", 4, 12.0)]
    rows += [_row(2, "checkpoint", 6, 15.0), _row(2, "train", 8, 21.0), _row(2, "held_out", 9, 30.0)]
    broken = broken_attempt(rows, resume_step=6)
    assert broken is not None
    # steps 6, 7 and 8 with one row (every_steps = 4), and a held-out loss
    assert (broken.lost_s, broken.lost_steps, broken.last_time) == (15.0, 3, 30.0)
    assert broken.world_size is None
    sized = broken_attempt([{**_row(2, "stage", 4, 11.0), "world_size": 3}, *rows[2:]], resume_step=6)
    assert sized is not None and sized.world_size == 3
    # no commit of its own: all since its first row
    none_of_its_own = broken_attempt(rows, resume_step=4)
    assert none_of_its_own is not None and none_of_its_own.lost_s == 20.0
    # killed between a commit and its row
    unwritten = broken_attempt(rows[:3], resume_step=5)
    assert unwritten is not None and (unwritten.lost_s, unwritten.lost_steps) == (0.0, 0)


def test_an_attempt_that_ended_as_asked_lost_nothing_and_its_pause_is_no_restart() -> None:
    assert broken_attempt([], 0) is None
    assert broken_attempt([_row(1, "train", 5, 1.0), _row(1, "ledger", 6, 2.0)], 6) is None


def test_the_ledger_survives_json_and_goodput_is_the_share_of_steps() -> None:
    ledger = Ledger(step_s=6.0, data_s=1.0, lost_s=3.0)
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger
    assert ledger.to_json()["goodput"] == 0.6


@pytest.mark.slow
def test_wandb_offline_keeps_one_run_id_over_attempts(tmp_path: Path) -> None:
    for attempt in (1, 2):
        metrics = _metrics(tmp_path, attempt, "offline")
        metrics.write("train", attempt, {"train/loss": 1.0})
        metrics.close()
    run_id = json.loads((tmp_path / "wandb_id.json").read_text())["id"]
    folders = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(folders) == 2 and all(run_id in name for name in folders)


def test_the_average_is_warm_at_first_and_has_its_own_memory() -> None:
    weight = torch.zeros(3)
    part = [Slice("a", 0, 3, weight)]
    ema = Ema(part, decay=0.9)
    expected = 0.0
    for update in range(100):
        weight.fill_(update + 1.0)
        ema.update(part)
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * (update + 1.0)
    assert ema.averages[0].tolist() == pytest.approx([expected] * 3, rel=1e-5)
    assert (decay_at(0.9, 0), decay_at(0.9, 1000)) == (0.1, 0.9)


def test_what_no_stage_trains_has_no_average_and_what_a_checkpoint_lacks_begins_at_its_weight() -> None:
    parts = [Slice(name, 0, 2, torch.full((2,), float(value))) for value, name in enumerate("abc")]
    ema = Ema(parts, 0.9, lambda name: name != "b")
    ema.update(parts)
    assert ema.ranges == [("a", 0), ("c", 0)]
    for part in parts:
        part.weight.fill_(7.0)
    ema.begin(parts, stored={"a"})
    assert [average.tolist() for average in ema.averages] == [[0.0, 0.0], [7.0, 7.0]]


def test_a_clock_laps() -> None:
    times = iter([1.0, 3.0, 3.5])
    clock = Clock(lambda: next(times))
    assert (clock.lap(), clock.lap()) == (2.0, 0.5)


def test_the_ledger_is_shown_largest_first_with_shares_and_goodput() -> None:
    lines = ledger_table(Ledger(step_s=6.0, data_s=1.0, lost_s=3.0)).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["step", "6.00", "60.0%"],
        ["lost", "3.00", "30.0%"],
        ["data", "1.00", "10.0%"],
    ]
    assert lines[9].split() == ["all", "10.00", "goodput", "60.0%"]
    assert lines[10:] == ["failed_saves 0", "damaged_checkpoints 0"]
    assert "0.0%" in ledger_table(Ledger())
