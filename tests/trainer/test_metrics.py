"""Rows, ledger and W&B."""

import json
import math
from pathlib import Path

import pytest
import torch

from m4v_dist.config.schema import LoggingSettings
from m4v_dist.trainer.deepspeed_engine import Slice
from m4v_dist.trainer.ema import Ema, decay_at
from m4v_dist.trainer.guards import Clock
from m4v_dist.trainer.metrics import Ledger, Metrics, lost_since, read_rows
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
    rows = read_rows(str(tmp_path))
    assert [row["train/loss"] for row in rows][:4] == values
    assert [row["attempt"] for row in rows] == [1] * 5 + [2] * 5
    assert math.isnan(rows[4]["train/loss"])


def test_lost_work_is_what_the_last_attempt_did_after_the_checkpoint(tmp_path: Path) -> None:
    for attempt, steps in ((1, range(6)), (2, range(4, 9))):
        metrics = _metrics(tmp_path, attempt)
        for step in steps:
            metrics.write("train", step, {"timing/step_s": 2.0})
        metrics.close()
    seconds, steps_lost, last = lost_since(read_rows(str(tmp_path)), resume_step=7)
    assert (seconds, steps_lost) == (4.0, 2)
    assert last is not None
    assert lost_since([], 0) == (0.0, 0, None)


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


def test_a_clock_laps() -> None:
    times = iter([1.0, 3.0, 3.5])
    clock = Clock(lambda: next(times))
    assert (clock.lap(), clock.lap()) == (2.0, 0.5)
