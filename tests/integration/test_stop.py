"""SIGTERM to the driver of a real run: saved, exit 5; the same command again goes on and ends bit for bit the same."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from jobs import cli
from jobs.train import train
from m4v_dist import storage
from m4v_dist.config.load import config_to_json, parse_config
from m4v_dist.trainer import checkpoint
from tests.integration.small_run import make_small_cache, rows, small_values, to_toml, train_each
from tests.trainer.ranks import ROOT, run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.ray]

NUM_STEPS = 42
"""Two of images and forty of clips: after step 3 there is a second or more for the signal to be heard in."""


def _submit(toml: Path, *overrides: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.train", "--config", str(toml), *overrides],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_when_submitted_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache, folder, straight = make_small_cache(f"{tmp_path}/cache"), f"{tmp_path}/stopped", f"{tmp_path}/straight"
    # No checkpoint but that of the stages' ends and that of the signal.
    values = small_values(folder, cache, checkpoint_every_steps=1000, held_out_slots=0)
    values["curriculum"][1]["num_steps"] = NUM_STEPS - 2
    toml = tmp_path / "run.toml"
    toml.write_text(to_toml(parse_config(values, where="stop").model_dump(mode="json", exclude_none=True)))
    with _submit(toml) as process:
        deadline = time.monotonic() + 150
        while not any(row["step"] >= 3 for row in rows(folder, "train")):
            assert time.monotonic() < deadline and process.poll() is None, "no steps before the signal"
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=150)
    saved = rows(folder, "checkpoint")[-1]["step"]
    assert process.returncode == 5, output[-4000:]
    assert output.splitlines()[-1].startswith(f"train: PreemptedError: asked to stop at step {saved} (SIGTERM: a save")
    assert f"saved: {folder}/checkpoints/step_{saved:08d}" in output.splitlines()[-1]
    assert 3 < saved < NUM_STEPS
    assert (storage.read_json(f"{folder}/result.json"))["exit_code"] == 5
    assert not rows(folder, "restart"), "nobody restarts what was asked to stop"

    with _submit(toml) as again:
        output, _ = again.communicate(timeout=150)
    assert again.returncode == 0, output[-4000:]
    # Submitted once more there is nothing to do, and no worker starts for it.
    assert cli.main("train", train, "x", ["--config", str(toml)]) == 0
    assert "nothing to do" in capfd.readouterr().out.splitlines()[-1]
    values["run"]["folder"] = straight
    config = config_to_json(parse_config(values, where="straight"))
    assert run_ranks(train_each, 2, [config]) == [[NUM_STEPS]] * 2
    expected, found = ([(r["step"], r["train/loss"]) for r in rows(f, "train")] for f in (straight, folder))
    assert found == expected, "the same steps, each once, to the last bit"
    ends = [str(checkpoint.newest_committed(f"{f}/checkpoints")) for f in (straight, folder)]
    for load in (checkpoint.load_weights, checkpoint.load_ema_weights):
        one, other = (load(end) for end in ends)
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
