"""Ranks that share a sequence must hold the same records."""

from dataclasses import replace

import torch

from m4v_dist.parallel.mesh import Mesh, SequenceGroup
from m4v_dist.trainer.guards import require_same_slots
from tests.trainer.ranks import run_ranks
from tests.trainer.toy import toy_batch


def check_on_rank(odd_rank: int) -> str:
    """Four ranks, two groups; one rank has another record in place of a damaged one."""
    mesh = Mesh.of_process_group(use_gpu=False, sequence_size=2)
    batch = toy_batch(0, [2 * mesh.data_rank, 2 * mesh.data_rank + 1], 4)
    if mesh.rank == odd_rank:
        batch = replace(batch, slots=(batch.slots[0], replace(batch.slots[1], key="another")))
    try:
        require_same_slots(mesh, (batch,))
    except RuntimeError as error:
        return str(error)
    return "same"


def test_groups_with_the_same_records_go_on() -> None:
    assert run_ranks(check_on_rank, 4, -1) == ["same"] * 4


def test_one_other_record_stops_all_ranks_before_their_first_exchange() -> None:
    answers = run_ranks(check_on_rank, 4, 3)
    assert all("given different records" in answer for answer in answers), answers
    assert "another" in answers[3]


def test_a_rank_that_shares_with_nobody_asks_nobody() -> None:
    require_same_slots(Mesh(0, 1, torch.device("cpu"), SequenceGroup()), (toy_batch(0, [0], 1),))
