"""What a step's sums say when ranks share a sequence: each data rank once."""

import math

import torch

from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer.measured import Measured
from m4v_dist.trainer.tally import Sums, Tally
from tests.trainer.ranks import run_ranks
from tests.trainer.toy import ToyOutput, toy_batch


def sums_on_rank(case: str) -> Sums:
    """Three ranks of one sequence group, told one loss; or a broken one on the last."""
    mesh = Mesh.of_process_group(use_gpu=False, sequence_size=3)
    loss = torch.tensor(math.inf if mesh.rank == 2 and case == "infinite" else 0.1)
    tally = Tally()
    slot_losses = torch.stack([loss, torch.tensor(0.3)])
    output = ToyOutput(loss, {"loss_pyramid_stage_0": torch.tensor([0.4, 2.0])}, slot_losses)
    tally.add(output, toy_batch(0, [0, 1], 2))
    measured = Measured(mesh.rank + 0.5, 1.0, 0.0, 0.25, 10.0, 12.0)
    return tally.summed(mesh, bad_records=1, order=2 if mesh.is_main else 0, measured=measured)


def test_sequence_ranks_count_once() -> None:
    for sums in run_ranks(sums_on_rank, 3, "same"):
        assert sums.loss == float(torch.tensor(0.1))
        assert sums.means == {"loss_pyramid_stage_0": float(torch.tensor(0.4)) / 2}
        assert (sums.tokens, sums.bad_records, sums.order) == (20, 1, 2)
        # what a rank measured is its own, and no slot's
        assert [measured.data_s for measured in sums.ranks] == [0.5, 1.5, 2.5]


def test_a_loss_that_is_not_finite_on_one_sequence_rank_shows() -> None:
    assert all(not math.isfinite(sums.loss) for sums in run_ranks(sums_on_rank, 3, "infinite"))
