"""The loop with toy parts on two gloo ranks: phases, rows, skipped steps, and what stops it.

Kill and resume: tests/integration/test_resume.py.
"""

import json
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


def _straight_job(folder: str) -> int:
    return _trainer(folder).run().step


def rows(folder: str, kind: str) -> list[dict[str, Any]]:
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("straight"))
    assert run_ranks(_straight_job, 2, folder) == [TOTAL, TOTAL]
    return folder


def test_phases_change_freeze_set_rate_and_data_counts_at_their_boundary(straight: str) -> None:
    folder = straight
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
