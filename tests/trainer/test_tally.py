"""What a step's sums say when ranks share a sequence: each data rank once, and all ranks the same slots."""

import math
from dataclasses import replace
from typing import Any

import torch

from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer.tally import Tally
from tests.trainer.ranks import run_ranks
from tests.trainer.toy import toy_batch


def sums_on_rank(case: str) -> Any:
    """Three ranks of one sequence group, told one loss; or another batch, or a broken loss, on the last."""
    mesh = Mesh.of_process_group(use_gpu=False, sequence_size=3)
    is_odd = mesh.rank == 2
    batch = toy_batch(0, [0, 1], 2)
    if is_odd and case == "other record":
        slot = replace(batch.slots[1], key="another")
        batch = replace(batch, slots=(batch.slots[0], slot))
    loss = torch.tensor(math.inf if is_odd and case == "infinite" else 0.1)
    tally = Tally()
    tally.add(loss, {"loss_pyramid_stage_0": torch.tensor([0.4, 2.0])}, batch)
    try:
        return tally.summed(mesh, bad_records=1, wants_stop=mesh.is_main)
    except RuntimeError as error:
        return str(error)


def test_sequence_ranks_count_once() -> None:
    for sums in run_ranks(sums_on_rank, 3, "same"):
        assert sums.loss == float(torch.tensor(0.1))
        assert sums.means == {"loss_pyramid_stage_0": float(torch.tensor(0.4)) / 2}
        assert (sums.tokens, sums.bad_records, sums.wants_stop) == (20, 1, True)


def test_a_loss_that_is_not_finite_on_one_sequence_rank_shows() -> None:
    assert all(not math.isfinite(sums.loss) for sums in run_ranks(sums_on_rank, 3, "infinite"))


def test_sequence_ranks_with_different_records_are_stopped_on_all_ranks() -> None:
    answers = run_ranks(sums_on_rank, 3, "other record")
    assert all("given different records" in answer for answer in answers), answers
