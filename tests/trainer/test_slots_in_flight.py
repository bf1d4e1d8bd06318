"""The records of a step that went wrong are named: the guilty ones, or all where no loss tells."""

import logging
import math
from dataclasses import replace

import pytest
import torch

from m4v_dist.trainer.slots_in_flight import MAX_SHOWN, once, skipped_row, slots_in_flight
from tests.trainer.toy import toy_batch

LOSSES = torch.tensor([1.0, 2.0, 3.0])


def test_a_filler_slot_is_none_of_the_step_s_records() -> None:
    batch = replace(toy_batch(4, [2, 3, 5], 12), weights=(1.0, 0.0, 1.0))
    found = slots_in_flight(1, batch, LOSSES)
    assert [(slot.rank, slot.index, slot.record, slot.loss) for slot in found] == [
        (1, 2, "clips/key-2", 1.0),
        (1, 5, "images/key-5", 3.0),
    ]


def test_a_slot_that_ranks_of_a_sequence_share_is_named_once_and_by_the_rank_that_is_not_finite() -> None:
    batch, broken = toy_batch(4, [2, 3], 12), torch.tensor([1.0, math.nan])
    shared = [*slots_in_flight(0, batch, LOSSES[:2]), *slots_in_flight(1, batch, broken)]
    named = once([*slots_in_flight(2, toy_batch(4, [5], 12), LOSSES[:1]), *shared])
    assert [(slot.index, slot.rank, slot.is_finite) for slot in named] == [(2, 0, True), (3, 1, False), (5, 2, True)]


def test_slots_and_losses_of_unequal_number_are_no_step() -> None:
    with pytest.raises(ValueError, match="zip"):
        slots_in_flight(0, toy_batch(4, [2, 3], 12), LOSSES)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_slot_that_is_not_finite_stands_alone(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    slots = slots_in_flight(0, toy_batch(4, [2, 3, 5], 12), torch.tensor([1.0, bad, 3.0]))
    row = skipped_row(slots, step=4, loss=bad)
    assert row["num_non_finite_slots"] == 1 and [slot["record"] for slot in row["slots"]] == ["images/key-3"]
    assert "the loss of 1 of 3 slots was not finite; records: images/key-3 (slot 3, rank 0" in caplog.text


def test_where_every_loss_is_finite_the_gradient_was_not_and_all_records_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    slots = slots_in_flight(0, toy_batch(4, list(range(12)), 12), torch.ones(12))
    with caplog.at_level(logging.WARNING):
        row = skipped_row(slots, step=4, loss=1.0)
    assert row["num_non_finite_slots"] == 0 and len(row["slots"]) == 12
    assert "no slot's loss, but the gradient" in caplog.text and f"and {12 - MAX_SHOWN} more" in caplog.text
