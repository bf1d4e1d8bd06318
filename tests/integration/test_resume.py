"""Straight run against kill and resume, with the real model, objective and loader: bit-identical at the end.

Two gloo ranks on CPU; one of them is killed with SIGKILL in the middle of the video stage, between two checkpoints:
rank 0 waits for the kill, so that no machine is so fast or so slow that it comes after the next commit.
ZeRO 1, 2 and 3 run as plain processes; ZeRO 2 also through `python -m jobs.train` on Ray workers, where the run comes
back by itself.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jobs.train import train_on_rank
from m4v_dist.config.load import config_to_json
from m4v_dist.trainer import checkpoint
from tests.integration.small_run import TOTAL_STEPS, make_small_cache, rows, small_config, to_toml, train_each
from tests.trainer.ranks import ROOT, run_ranks

KILL_AFTER = 4
"""Checkpoints stand at 2 (end of the image stage), 3 and 6: steps 3 and on are done again."""

pytestmark = pytest.mark.slow


def _train_until_killed(config: str, folder: str) -> None:
    def wait_for_the_kill() -> tuple[()]:
        """Asked by rank 0 in each step, before the sum that rank 1 is waited for in."""
        while not (Path(folder) / "killed").exists() and any(r["step"] >= KILL_AFTER for r in rows(folder, "train")):
            time.sleep(0.01)
        return ()

    train_on_rank({"config": config}, wait_for_the_kill)


def kill_rank_1(folder: str, is_alive: Callable[[], bool], after: int = KILL_AFTER) -> None:
    """SIGKILL rank 1 of the first attempt once it has logged step `after`, and leave the file `killed`."""
    deadline = time.monotonic() + 150
    while not any(row["step"] >= after for row in rows(folder, "train")):
        assert time.monotonic() < deadline and is_alive(), "the run ended before the kill"
        time.sleep(0.01)
    attempt = json.loads((Path(folder) / "attempts" / "attempt_0001.json").read_text())
    os.kill(attempt["pids"]["1"], signal.SIGKILL)
    (Path(folder) / "killed").touch()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders straight/zero1..3 and killed/zero1..3 of finished runs, and the cache."""
    base = tmp_path_factory.mktemp("resume")
    cache = make_small_cache(str(base / "cache"))
    configs = {
        kind: [
            config_to_json(small_config(f"{base}/{kind}/zero{stage}", cache, zero_stage=stage)) for stage in (1, 2, 3)
        ]
        for kind in ("straight", "killed")
    }
    assert run_ranks(train_each, 2, configs["straight"]) == [[TOTAL_STEPS] * 3] * 2
    for stage, config in zip((1, 2, 3), configs["killed"], strict=True):
        folder = f"{base}/killed/zero{stage}"
        answers = run_ranks(
            _train_until_killed,
            2,
            config,
            folder,
            watch=lambda ranks, f=folder: kill_rank_1(f, lambda: ranks[1].is_alive()),
        )
        assert answers == [None, None], "both ranks ended well, so nothing was killed"
    assert run_ranks(train_each, 2, configs["killed"]) == [[TOTAL_STEPS] * 3] * 2
    return base


def assert_same_end(straight: str, killed: str) -> None:
    """Every step's loss and gradient norm, then weights, average, and the whole state."""
    expected = {row["step"]: (row["train/loss"], row["train/grad_norm"]) for row in rows(straight, "train")}
    assert sorted(expected) == list(range(TOTAL_STEPS))
    found = rows(killed, "train")
    first, second = ({row["step"] for row in found if row["attempt"] == attempt} for attempt in (1, 2))
    assert first | second == set(expected)
    assert first & second, "no step was done twice, so the kill proved nothing"
    for row in found:
        assert (row["train/loss"], row["train/grad_norm"]) == expected[row["step"]], row
    held_out = [rows(folder, "held_out")[-1]["validation/held_out_loss"] for folder in (straight, killed)]
    assert held_out[0] == held_out[1]
    paths = [str(checkpoint.newest_committed(f"{folder}/checkpoints")) for folder in (straight, killed)]
    for load in (checkpoint.load_weights, checkpoint.load_ema_weights):
        one, other = (load(path) for path in paths)
        assert sorted(one) == sorted(other)
        differing = [name for name in one if not torch.equal(one[name], other[name])]
        assert not differing
    states = [checkpoint.read_state(path) for path in paths]
    assert states[0] == states[1]
    assert states[0]["loader"]["next_step"] == TOTAL_STEPS
    for name in ("samples_seen", "tokens_seen"):
        counts = states[0]["loader"][name]
        assert counts == {source: found[-1][f"data/{source}/{name}"] for source in ("clips", "stills")}
        assert name != "samples_seen" or sum(counts.values()) == 12 * TOTAL_STEPS


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_a_killed_run_ends_bit_identical_to_a_straight_one(runs: Path, zero_stage: int) -> None:
    assert_same_end(f"{runs}/straight/zero{zero_stage}", f"{runs}/killed/zero{zero_stage}")


def test_the_zero_stages_agree_with_one_another(runs: Path) -> None:
    losses = [[row["train/loss"] for row in rows(f"{runs}/straight/zero{stage}", "train")] for stage in (1, 2, 3)]
    for other in losses[1:]:
        # float32 sums in another order
        torch.testing.assert_close(other, losses[0], rtol=1e-4, atol=0)


def test_a_checkpoint_of_zero_2_goes_on_under_zero_3_on_one_rank(runs: Path, tmp_path: Path) -> None:
    import shutil

    folder = str(shutil.copytree(runs / "straight" / "zero2", tmp_path / "run"))
    for name in ("step_00000009", "step_00000006"):
        shutil.rmtree(f"{folder}/checkpoints/{name}")
    config = small_config(folder, str(runs / "cache"), zero_stage=3)
    assert run_ranks(train_each, 1, [config_to_json(config)]) == [[TOTAL_STEPS]]
    straight = {row["step"]: row["train/loss"] for row in rows(str(runs / "straight" / "zero2"), "train")}
    redone = {row["step"]: row["train/loss"] for row in rows(folder, "train") if row["attempt"] == 2}
    assert sorted(redone) == list(range(3, TOTAL_STEPS))
    for step, loss in redone.items():
        # the same slots and noise; sums in another order, over a few steps
        assert loss == pytest.approx(straight[step], rel=1e-4)


@pytest.mark.ray
def test_a_run_on_ray_workers_comes_back_by_itself_after_a_kill(runs: Path) -> None:
    folder = f"{runs}/killed/ray"
    # No checkpoint between 2 and 9: after step 3 there are five more steps for the kill to fall into.
    config = small_config(folder, str(runs / "cache"), zero_stage=2, checkpoint_every_steps=100)
    toml = runs / "ray.json.toml"
    toml.write_text(to_toml(config.model_dump(mode="json", exclude_none=True)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.train", "--config", str(toml)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        kill_rank_1(folder, lambda: process.poll() is None, after=3)
        output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output[-4000:]
    assert output.strip().splitlines()[-1].startswith(f"train: {TOTAL_STEPS} steps done, held-out loss")
    assert_same_end(f"{runs}/straight/zero2", folder)
    (restart,) = rows(folder, "restart")
    assert restart["lost_steps"] >= 1
    ledger = json.loads((Path(folder) / "ledger.json").read_text())
    assert ledger["lost_s"] > 0 and ledger["restart_s"] > 0
