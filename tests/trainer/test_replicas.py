"""One rank's weights that differ in one bit end the attempt unsaved; the next one goes on from the last checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.replicas import ReplicasDifferError, checksums
from tests.trainer.ranks import run_ranks
from tests.trainer.test_trainer import TOTAL, _trainer, rows
from tests.trainer.toy import ToyOutput, toy_objective


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_bit_of_one_element_changes_the_checksum_and_nothing_else(dtype: torch.dtype) -> None:
    weights = {"a": torch.randn(5, 7).to(dtype), "b": torch.randn(11).to(dtype)}
    before = checksums(weights)
    assert checksums({name: weight.clone() for name, weight in weights.items()}) == before
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weights["b"].element_size()]
    weights["b"].view(integer)[3] ^= 1
    after = checksums(weights)
    assert after["a"] == before["a"] and abs(after["b"] - before["b"]) == 1


def test_the_order_of_the_elements_does_not_change_the_sum_and_nan_is_a_pattern_too() -> None:
    weight = torch.randn(1000)
    weight[5] = torch.nan
    assert checksums({"a": weight}) == checksums({"a": weight.flip(0)})
    assert checksums({}) == {}


def _corrupted_job(folder: str, zero_stage: int) -> dict[str, Any]:
    """Rank 1 flips a bit of a frozen weight in step 1 of the first attempt, which checks every second step."""
    settings = {"zero_stage": zero_stage, "replica_check_every_steps": 2, "checkpoint_every_steps": 1}
    trainer = _trainer(folder, **settings)

    def objective(model: Any, batch: Any) -> ToyOutput:
        if trainer.step == 1 and trainer.mesh.rank == 1 and trainer.engine.zero_stage < 3 and batch.slots[0].index == 6:
            # Frozen in this stage: a weight that trains would be mended by the next gather from its owner.
            weight = trainer.engine.replicas()["double_blocks.1.weight"]
            weight.view(torch.int32).view(-1)[4] ^= 1
        return toy_objective(model, batch)

    trainer.objective = objective
    answer: dict[str, Any] = {"error": None}
    try:
        trainer.run()
    except ReplicasDifferError as error:
        # Rank 0 waits for the save in flight, and the others do not.
        trainer.mesh.barrier()
        answer = {"error": str(error), "newest": checkpoint.newest_committed(f"{folder}/checkpoints")}
        answer["end"] = _trainer(folder, **settings).run().step
    return answer


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_a_corrupted_weight_is_named_with_both_values_and_its_rank_and_is_not_saved(
    tmp_path: Path, zero_stage: int
) -> None:
    folder = str(tmp_path)
    answers = run_ranks(_corrupted_job, 2, folder, zero_stage)
    for answer in answers:
        assert "after step 2: ranks [1] hold other weights than rank 0" in answer["error"]
        assert "first on rank 1: double_blocks.1.weight (1 parameters in all) has checksum" in answer["error"]
        # the check came before the save of the same step
        assert answer["newest"].endswith("step_00000001")
        assert answer["end"] == TOTAL
    (row,) = rows(folder, "replicas_differ")
    assert row["step"] == 2 and row["error"] == answers[0]["error"]
    report = json.loads((tmp_path / "attempts" / "attempt_0001_failure.json").read_text())
    assert report["kind"] == "error" and "ReplicasDifferError" in report["cause"]


def _zero_3_job(folder: str) -> tuple[int, int]:
    trainer = _trainer(folder, zero_stage=3, replica_check_every_steps=1)
    return trainer.run().step, len(trainer.engine.replicas())


def test_zero_3_has_no_copies_to_compare(tmp_path: Path) -> None:
    assert run_ranks(_zero_3_job, 2, str(tmp_path)) == [(TOTAL, 0)] * 2
