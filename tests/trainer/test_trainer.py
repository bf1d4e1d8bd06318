"""The loop with toy parts on two gloo ranks: curriculum stages, rows, skipped steps, and what stops it.

Kill and resume: tests/integration/test_resume.py.
"""

import json
import os
import re
import shutil
from glob import glob
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from m4v_dist.errors import NonFiniteError, PreemptedError
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.stop_request import StopRequest
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.trainer import Trainer
from tests.trainer.ranks import run_ranks
from tests.trainer.toy import ToyLoader, ToyModel, ToyOutput, build_toy, toy_config, toy_objective

TOTAL = 10
STOP = StopRequest("SIGTERM")


def _trainer(folder: str, *, objective: Any = toy_objective, **settings: Any) -> Trainer:
    mesh = Mesh.of_process_group(use_gpu=False)
    loader = ToyLoader(12, mesh.rank, mesh.world_size, micro=3)
    config = toy_config(folder, **settings)
    return Trainer(config, mesh, build_model=build_toy, objective=objective, loader=loader)


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


def test_curriculum_stages_change_freeze_set_rate_and_data_counts_at_their_boundary(straight: str) -> None:
    folder = straight
    assert [(row["curriculum_stage"], row["step"]) for row in rows(folder, "stage")] == [("first", 0), ("second", 4)]
    rates = [row["train/lr"] for row in rows(folder, "train")]
    assert rates == [0.05] * 4 + [0.01] + [0.02] * 5
    assert [row["train/lr_fresh"] for row in rows(folder, "train")] == [4 * rate for rate in rates[:4]] + rates[4:]
    last = rows(folder, "train")[-1]
    assert last["data/clips/samples_seen"] == last["data/images/samples_seen"] == 6 * TOTAL
    assert last["data/clips/tokens_seen"] == 50 * 6 * TOTAL, "the loader counts, and nobody beside it"
    assert last["data/bad_records"] == 1 + 2, "rank 0 met one and rank 1 two"
    # double blocks were frozen for 4 steps and begin their own AdamW after it
    state = checkpoint.read_state(str(checkpoint.newest_committed(f"{folder}/checkpoints")))
    assert state["loader"] == {"cursor": 12 * TOTAL} and "seen" not in state
    steps = state["optimizer_steps"]
    assert {name: count for name, count in steps.items() if name.startswith("double_blocks/")} == {
        "double_blocks/decay": 6,
        "double_blocks/no_decay": 6,
    }
    assert {steps[name] for name in ("fresh/no_decay", "rest/decay", "rest/no_decay")} == {10} and len(steps) == 5
    losses = [row["validation/held_out_loss"] for row in rows(folder, "held_out")]
    assert [row["step"] for row in rows(folder, "held_out")] == [0, TOTAL]
    assert losses[1] < losses[0]


def _split_job(folder: str, num_steps: list[int]) -> tuple[list[torch.Tensor], int]:
    """Average of a run whose stages differ in nothing but their names."""
    trainer = _trainer(folder)
    (_, stage) = trainer.config.curriculum
    stage = stage.model_copy(update={"warmup_steps": 0})
    stages = [stage.model_copy(update={"name": f"part{n}", "num_steps": count}) for n, count in enumerate(num_steps)]
    trainer.config = trainer.config.model_copy(update={"curriculum": tuple(stages)})
    trainer.run()
    return trainer.ema.averages, trainer.ema.num_updates


def test_a_boundary_between_equal_stages_changes_no_bit(tmp_path: Path) -> None:
    """So weights, moments, step counters, average and data carry over; what the stage says begins anew by itself."""
    whole, split = str(tmp_path / "whole"), str(tmp_path / "split")
    (averages, count), _ = run_ranks(_split_job, 2, whole, [TOTAL])
    (split_averages, split_count), _ = run_ranks(_split_job, 2, split, [3, 2, 5])
    assert count == split_count == TOTAL
    assert all(torch.equal(one, other) for one, other in zip(averages, split_averages, strict=True))
    for name in ("train/loss", "train/grad_norm", "data/clips/samples_seen"):
        assert [row[name] for row in rows(whole, "train")] == [row[name] for row in rows(split, "train")], name
    assert [row["step"] for row in rows(split, "stage")] == [0, 3, 5]


def _filled_jobs(folder: str) -> list[str]:
    """Which of three attempts at a run filled its model: one that dies in its first step, one that stops, the last."""
    filled: list[str] = []

    def attempt(name: str, **options: Any) -> Trainer:
        trainer = _trainer(folder, **options)

        def fill(_: str, model: nn.Module) -> None:
            assert isinstance(model, ToyModel)
            nn.init.constant_(model.registers, 0.25)
            filled.append(name)

        trainer.fill_start = fill
        return trainer

    def die(model: nn.Module, batch: Any) -> ToyOutput:
        if batch.slots[0].step == 0:
            raise RuntimeError("lost")
        return toy_objective(model, batch)

    with pytest.raises(RuntimeError, match="lost"):
        attempt("dies", objective=die).run()
    stopping = attempt("stops")
    stopping.stop_requests = lambda: [STOP] * (stopping.step >= 1)
    with pytest.raises(PreemptedError):
        stopping.run()
    attempt("ends").run()
    return filled


def _more_jobs(folder: str) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    first = _trainer(f"{folder}/done").run()
    again = _trainer(f"{folder}/done").run()
    answer["again"] = (first.step, again.step, first.checkpoint == again.checkpoint)
    stopping = _trainer(f"{folder}/stopped")

    def stop_after_five() -> list[StopRequest]:
        assert stopping.mesh.is_main, "only rank 0 asks"
        return [STOP] * (stopping.step >= 4)

    stopping.stop_requests = stop_after_five
    try:
        stopping.run()
    except PreemptedError as error:
        answer["stopped"] = str(error)
    answer["filled"] = _filled_jobs(f"{folder}/filled")
    mesh = stopping.mesh

    def nan_on_one_rank(model: Any, batch: Any) -> ToyOutput:
        output = toy_objective(model, batch)
        is_bad = mesh.rank == 1 and batch.slots[0].step in (2, 3)
        if not is_bad:
            return output
        # of the first micro-batch of rank 1, slots 6 to 8, the second slot alone
        slot_losses = output.slot_losses.clone()
        slot_losses[1] = torch.nan if batch.slots[0].index == 6 else slot_losses[1]
        return ToyOutput(output.loss * torch.nan, output.metrics, slot_losses)

    _trainer(f"{folder}/skips", objective=nan_on_one_rank, validate_every_steps=2).run()
    try:
        _trainer(f"{folder}/gives_up", objective=nan_on_one_rank, max_skipped_steps=1).run()
    except NonFiniteError as error:
        answer["gave_up"] = str(error)
        answer["exit_code"] = error.exit_code
    if mesh.is_main:
        # As a kill leaves it that comes between the last commit and the end.
        shutil.copytree(f"{folder}/done", f"{folder}/killed_at_its_end")
        written = Path(folder, "killed_at_its_end", "metrics.jsonl").read_text().splitlines(keepends=True)
        ends = next(at for at, line in enumerate(written) if '"kind": "ledger"' in line)
        Path(folder, "killed_at_its_end", "metrics.jsonl").write_text("".join(written[:ends]))
    mesh.barrier()
    answer["killed_at_its_end"] = _trainer(f"{folder}/killed_at_its_end").run().step
    answer["open_files"] = [name for name in map(os.path.realpath, glob("/proc/self/fd/*")) if "metrics.jsonl" in name]
    return answer


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("more"))
    return folder, run_ranks(_more_jobs, 2, folder)[0]


def test_a_finished_run_submitted_again_does_no_step(more: tuple[str, dict[str, Any]]) -> None:
    assert more[1]["again"] == (TOTAL, TOTAL, True)
    assert len(rows(f"{more[0]}/done", "train")) == TOTAL


def test_a_run_that_was_killed_when_all_was_done_ends_and_books_what_that_took(
    more: tuple[str, dict[str, Any]],
) -> None:
    folder = f"{more[0]}/killed_at_its_end"
    assert more[1]["killed_at_its_end"] == TOTAL and len(rows(folder, "train")) == TOTAL
    (restart,), (ledger,) = rows(folder, "restart"), rows(folder, "ledger")
    assert restart["lost_steps"] == 0 and ledger["restart_s"] == restart["timing/restart_s"] > 0


def test_start_weights_fill_a_run_without_a_checkpoint_and_never_one_that_has_one(
    more: tuple[str, dict[str, Any]],
) -> None:
    """Nor the model of a later curriculum stage."""
    assert more[1]["filled"] == ["dies", "stops"]
    filled, fresh = (rows(f"{more[0]}/{name}", "held_out") for name in ("filled", "done"))
    assert filled[0]["step"] == fresh[0]["step"] == 0
    assert filled[0]["validation/held_out_loss"] != fresh[0]["validation/held_out_loss"]
    assert len({row["validation/held_out_loss"] for row in filled if row["step"] == 0}) == 1


def test_a_run_asked_to_stop_saves_first(more: tuple[str, dict[str, Any]]) -> None:
    assert re.search(
        r"asked to stop at step 5 \(SIGTERM: a save takes 0 s, no deadline.*\); saved: .*5\.", more[1]["stopped"]
    )
    assert checkpoint.step_of(str(checkpoint.newest_committed(f"{more[0]}/stopped/checkpoints"))) == 5


def test_a_nan_on_one_rank_is_logged_as_nan_and_skipped(more: tuple[str, dict[str, Any]]) -> None:
    found = rows(f"{more[0]}/skips", "train")
    assert [row["step"] for row in found if row["train/loss"] != row["train/loss"]] == [2, 3]
    assert found[-1]["train/skipped_steps"] == 2
    steps = checkpoint.read_state(str(checkpoint.newest_committed(f"{more[0]}/skips/checkpoints")))["optimizer_steps"]
    assert steps["rest/decay"] == TOTAL - 2


def test_a_held_out_loss_that_is_due_at_a_boundary_is_taken_there_too(more: tuple[str, dict[str, Any]]) -> None:
    assert [row["step"] for row in rows(f"{more[0]}/skips", "held_out")] == [0, 2, 4, 6, 8, TOTAL]
    written = Path(more[0], "skips", "metrics.jsonl").read_text().splitlines()
    kinds = [(row["kind"], row["step"]) for row in map(json.loads, written)]
    assert kinds.index(("held_out", 4)) < kinds.index(("checkpoint", 4)) < kinds.index(("stage", 4))


def test_a_skipped_step_names_the_record_whose_loss_was_not_finite(more: tuple[str, dict[str, Any]]) -> None:
    found = rows(f"{more[0]}/skips", "skipped")
    assert [row["step"] for row in found] == [2, 3]
    for row in found:
        assert row["num_non_finite_slots"] == 1
        (slot,) = row["slots"]
        assert (slot["rank"], slot["index"], slot["record"]) == (1, 7, "images/key-7")
        assert slot["loss"] != slot["loss"] and (slot["unit"], slot["pyramid_stage"]) == (2, 1)


def test_too_many_skips_in_a_row_end_the_run_with_the_way_out(more: tuple[str, dict[str, Any]]) -> None:
    assert "2 steps in a row" in more[1]["gave_up"]
    assert "trainer.max_skipped_steps=1" in more[1]["gave_up"]
    assert more[1]["exit_code"] == 7


def test_the_step_that_was_one_too_many_has_its_row(more: tuple[str, dict[str, Any]]) -> None:
    last = rows(f"{more[0]}/gives_up", "train")[-1]
    assert (last["step"], last["train/skipped_steps"]) == (3, 2)
    assert last["train/loss"] != last["train/loss"]


def test_every_ending_closes_the_metrics_and_only_one_as_asked_ends_the_ledger(
    more: tuple[str, dict[str, Any]],
) -> None:
    assert more[1]["open_files"] == []
    assert [len(rows(f"{more[0]}/{name}", "ledger")) for name in ("done", "stopped", "gives_up")] == [2, 1, 0]


def test_the_ledger_holds_every_second_of_an_attempt(straight: str) -> None:
    written = [json.loads(line) for line in (Path(straight) / "metrics.jsonl").read_text().splitlines()]
    started = json.loads((Path(straight) / "attempts" / "attempt_0001.json").read_text())["started"]
    ledger = json.loads((Path(straight) / "ledger.json").read_text())
    total = sum(value for name, value in ledger.items() if name.endswith("_s"))
    # it begins a little before the attempt's file and ends with the ledger's row
    assert total == pytest.approx(written[-1]["time"] - started, abs=0.3)
    assert ledger["build_s"] > 0 and ledger["lost_s"] == ledger["restart_s"] == 0
    assert ledger["goodput"] == pytest.approx(ledger["step_s"] / total)


def test_skipped_steps_are_lost_time(more: tuple[str, dict[str, Any]]) -> None:
    skipped = [row["timing/step_s"] for row in rows(f"{more[0]}/skips", "train") if row["step"] in (2, 3)]
    (ledger,) = rows(f"{more[0]}/skips", "ledger")
    assert ledger["lost_s"] == pytest.approx(sum(skipped))


def _restart_job(folder: str) -> None:
    """Attempts 1 and 2 break off after step 4, the second before it commits; attempt 3 goes on to the end."""
    for _ in range(2):
        breaking = _trainer(folder)

        # on both ranks, so that none is left waiting
        def broken_objective(model: Any, batch: Any, trainer: Trainer = breaking) -> ToyOutput:
            if trainer.step > 4:
                raise RuntimeError("worker lost")
            return toy_objective(model, batch)

        breaking.objective = broken_objective
        with pytest.raises(RuntimeError, match="worker lost"):
            breaking.run()
    _trainer(folder).run()


def test_a_restart_lasts_until_the_first_step_and_counts_though_nothing_is_committed_after_it(tmp_path: Path) -> None:
    folder = str(tmp_path)
    run_ranks(_restart_job, 2, folder)
    second, third = rows(folder, "restart")
    assert (second["step"], third["step"]) == (4, 4)
    assert second["lost_steps"] == third["lost_steps"] == 1
    for row in (second, third):
        assert row["timing/restart_s"] >= row["timing/build_s"] > 0
        assert (row["world_size_before"], row["world_size"]) == (2, 2)
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert ledger["restart_s"] == pytest.approx(second["timing/restart_s"] + third["timing/restart_s"])
    assert ledger["lost_s"] == pytest.approx(second["lost_s"] + third["lost_s"])
