"""The loop with toy parts on two gloo ranks: phases, resume after a SIGKILL, rows, attempts, and what stops it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from m4v_dist.errors import PreemptedError
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.guards import NonFiniteError
from m4v_dist.trainer.trainer import Trainer
from tests.trainer.ranks import run_ranks
from tests.trainer.toy import ToyLoader, ToyModel, ToyOutput, toy_config, toy_objective

TOTAL = 10


def _trainer(folder: str, *, objective: Any = toy_objective, **settings: Any) -> Trainer:
    mesh = Mesh.of_process_group(use_gpu=False)
    loader = ToyLoader(12, mesh.rank, mesh.world_size, micro=3)
    config = toy_config(folder, **settings)
    return Trainer(config, mesh, build_model=lambda: ToyModel(5), objective=objective, loader=loader)


def _slow(model: Any, batch: Any) -> ToyOutput:
    time.sleep(0.1)
    return toy_objective(model, batch)


def _straight_job(folder: str) -> list[int]:
    return [_trainer(f"{folder}/zero{stage}", zero_stage=stage).run().step for stage in (1, 2, 3)]


def _killed_job(folder: str, stage: int) -> int:
    return _trainer(f"{folder}/zero{stage}", zero_stage=stage, objective=_slow).run().step


def rows(folder: str, kind: str) -> list[dict[str, Any]]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def kill_rank_1_after(folder: str, step: int) -> Any:
    """Watch the rows, and SIGKILL rank 1 while the steps after `step` run."""

    def watch(processes: list[subprocess.Popen[str]]) -> None:
        deadline = time.monotonic() + 120
        while not (Path(folder) / "metrics.jsonl").exists() or not any(
            r["step"] >= step for r in rows(folder, "train")
        ):
            assert time.monotonic() < deadline and processes[1].poll() is None, "no such step before the kill"
            time.sleep(0.02)
        pids = json.loads(next((Path(folder) / "attempts").glob("*.json")).read_text())["pids"]
        assert pids["1"] == processes[1].pid, "the attempt file names another process"
        os.kill(pids["1"], signal.SIGKILL)

    return watch


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Straight runs and killed-and-resumed runs of ZeRO 1, 2 and 3."""
    straight, killed = (str(tmp_path_factory.mktemp(name)) for name in ("straight", "killed"))
    run_ranks(_straight_job, 2, straight)
    for stage in (1, 2, 3):
        answers = run_ranks(_killed_job, 2, killed, stage, watch=kill_rank_1_after(f"{killed}/zero{stage}", 7))
        assert answers == [None, None], "the run ended before the kill"
    assert run_ranks(_straight_job, 2, killed) == [[TOTAL] * 3] * 2
    return straight, killed


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_killed_run_ends_bit_identical_to_a_straight_one(runs: tuple[str, str], stage: int) -> None:
    straight, killed = (f"{folder}/zero{stage}" for folder in runs)
    expected = {row["step"]: (row["train/loss"], row["train/grad_norm"]) for row in rows(straight, "train")}
    assert sorted(expected) == list(range(TOTAL))
    found = rows(killed, "train")
    assert {row["attempt"] for row in found} == {1, 2}
    redone = {r["step"] for r in found if r["attempt"] == 1} & {r["step"] for r in found if r["attempt"] == 2}
    assert redone, "no step was done twice, so the kill proved nothing"
    for row in found:
        assert (row["train/loss"], row["train/grad_norm"]) == expected[row["step"]]
    for load in (checkpoint.load_weights, checkpoint.load_ema_weights):
        paths = [str(checkpoint.newest_committed(f"{folder}/checkpoints")) for folder in (straight, killed)]
        one, other = load(paths[0]), load(paths[1])
        assert sorted(one) == sorted(other)
        assert all(torch.equal(one[name], other[name]) for name in one)
    states = [checkpoint.read_state(path) for path in paths]
    assert states[0] == states[1]
    assert states[0]["loader"] == {"cursor": 12 * TOTAL}


@pytest.mark.slow
def test_the_restart_stands_in_the_rows_and_in_the_ledger(runs: tuple[str, str]) -> None:
    folder = f"{runs[1]}/zero2"
    (restart,) = rows(folder, "restart")
    assert restart["attempt"] == 2
    assert restart["step"] == 6
    assert restart["lost_steps"] >= 1
    ledger = json.loads((Path(folder) / "ledger.json").read_text())
    assert ledger["lost_s"] == restart["lost_s"] > 0
    assert ledger["restart_s"] > 0
    assert 0 < ledger["goodput"] < 1


@pytest.mark.slow
def test_phases_change_freeze_set_rate_and_data_counts_at_their_boundary(runs: tuple[str, str]) -> None:
    folder = f"{runs[0]}/zero2"
    assert [(row["curriculum_stage"], row["step"]) for row in rows(folder, "stage")] == [("first", 0), ("second", 4)]
    rates = [row["train/lr"] for row in rows(folder, "train")]
    assert rates == [0.05] * 4 + [0.01] + [0.02] * 5
    last = rows(folder, "train")[-1]
    assert last["data/clips/samples_seen"] == last["data/images/samples_seen"] == 6 * TOTAL
    assert last["data/clips/tokens_seen"] == 40 * 6 * TOTAL
    # double blocks were frozen for 4 steps and begin their own AdamW after it
    steps = checkpoint.read_state(str(checkpoint.newest_committed(f"{folder}/checkpoints")))["optimizer_steps"]
    assert steps == {"double_blocks/decay": 6, "double_blocks/no_decay": 6, "rest/decay": 10, "rest/no_decay": 10}
    losses = [row["validation/held_out_loss"] for row in rows(folder, "held_out")]
    assert [row["step"] for row in rows(folder, "held_out")] == [0, TOTAL]
    assert losses[1] < losses[0]


def _more_jobs(folder: str) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    first = _trainer(f"{folder}/done").run()
    again = _trainer(f"{folder}/done").run()
    answer["again"] = (first.step, again.step, first.checkpoint == again.checkpoint)
    stopping = _trainer(f"{folder}/stopped")
    stopping.should_stop = lambda: stopping.step >= 5
    try:
        stopping.run()
    except PreemptedError as error:
        answer["stopped"] = str(error)
    mesh = stopping.mesh

    def nan_on_one_rank(model: Any, batch: Any) -> ToyOutput:
        output = toy_objective(model, batch)
        is_bad = mesh.rank == 1 and batch.slots[0].step in (2, 3)
        return ToyOutput(output.loss * (torch.nan if is_bad else 1.0), output.metrics)

    _trainer(f"{folder}/skips", objective=nan_on_one_rank).run()
    try:
        _trainer(f"{folder}/gives_up", objective=nan_on_one_rank, max_skipped_steps=1).run()
    except NonFiniteError as error:
        answer["gave_up"] = str(error)
    return answer


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("more"))
    return folder, run_ranks(_more_jobs, 2, folder)[0]


def test_a_finished_run_submitted_again_does_no_step(more: tuple[str, dict[str, Any]]) -> None:
    assert more[1]["again"] == (TOTAL, TOTAL, True)
    assert len(rows(f"{more[0]}/done", "train")) == TOTAL


def test_a_run_asked_to_stop_saves_first(more: tuple[str, dict[str, Any]]) -> None:
    assert "asked to stop at step 5" in more[1]["stopped"]
    assert checkpoint.step_of(str(checkpoint.newest_committed(f"{more[0]}/stopped/checkpoints"))) == 5


def test_a_nan_on_one_rank_is_logged_as_nan_and_skipped(more: tuple[str, dict[str, Any]]) -> None:
    found = rows(f"{more[0]}/skips", "train")
    assert [row["step"] for row in found if row["train/loss"] != row["train/loss"]] == [2, 3]
    assert found[-1]["train/skipped_steps"] == 2
    steps = checkpoint.read_state(str(checkpoint.newest_committed(f"{more[0]}/skips/checkpoints")))["optimizer_steps"]
    assert steps["rest/decay"] == TOTAL - 2


def test_too_many_skips_in_a_row_end_the_run_with_the_way_out(more: tuple[str, dict[str, Any]]) -> None:
    assert "2 steps in a row" in more[1]["gave_up"]
    assert "trainer.max_skipped_steps=1" in more[1]["gave_up"]
