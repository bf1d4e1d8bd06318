"""The FLOPs that the trainer is handed are those of `model/flops.py`, slot by slot."""

from dataclasses import replace

import pytest
import torch

from jobs.batch_flops import flops_of_batches
from m4v_dist.batch import LatentBatch, Slot, TextFeatures
from m4v_dist.bench.flops_tables import column_of
from m4v_dist.config.load import parse_config
from m4v_dist.config.schema import RunConfig
from m4v_dist.model.flops import forward_flops, training_flops
from tests.integration.small_run import small_values


def _config(**model: object) -> RunConfig:
    values = small_values("run", "cache")
    values["model"] |= model
    return parse_config(values, where="test")


def _batch(*slots: tuple[int, int, int], weights: tuple[float, ...] | None = None) -> LatentBatch:
    """Slots of (unit, pyramid stage, text tokens) on a grid of 8 x 16 latents."""
    return LatentBatch(
        slots=tuple(Slot(0, n, "clips", n, f"k{n}", unit, stage, 1, 0, 0) for n, (unit, stage, _) in enumerate(slots)),
        latents=tuple(torch.zeros(16, unit, 8, 16) for unit, _, _ in slots),
        text=tuple(TextFeatures(torch.zeros(num_text, 384), torch.zeros(384)) for _, _, num_text in slots),
        null_text=TextFeatures(torch.zeros(2, 384), torch.zeros(384)),
        weights=weights or (1.0,) * len(slots),
        global_num_slots=12,
    )


def test_a_batch_is_the_sum_of_its_columns() -> None:
    config = _config()
    slots = ((3, 2, 7), (1, 0, 5))
    expected = sum(
        training_flops(config.model, column_of((8, 16), num_text)(unit, stage)).total()
        for unit, stage, num_text in slots
    )
    assert flops_of_batches(config)(_batch(*slots), ()) == (expected, expected)


def test_recompute_counts_for_the_hardware_alone() -> None:
    plain = flops_of_batches(_config())(_batch((3, 2, 7)), ())
    needed, computed = flops_of_batches(_config(recompute="blocks"))(_batch((3, 2, 7)), ())
    assert needed == plain[0] and computed > 1.2 * needed


def test_a_filler_slot_is_computed_and_not_needed() -> None:
    batch = _batch((3, 2, 7), (3, 2, 7))
    needed, computed = flops_of_batches(_config())(replace(batch, weights=(1.0, 0.0)), ())
    assert computed == 2 * needed > 0


def test_frozen_double_blocks_have_no_weight_gradients() -> None:
    config, column = _config(), column_of((8, 16), 7)(3, 2)
    saved = (
        training_flops(config.model, column).total() - training_flops(config.model, column, ("double_blocks",)).total()
    )
    linears = sum(
        count
        for part, count in forward_flops(config.model, column).items()
        if part in ("double: modulation", "double: projections", "double: feed-forward")
    )
    assert saved == linears > 0
    of_batch = flops_of_batches(config)
    assert of_batch(_batch((3, 2, 7)), ())[0] - of_batch(_batch((3, 2, 7)), ("double_blocks",))[0] == saved


@pytest.mark.parametrize("num_text", [1, 128])
def test_text_counts_as_it_is_and_not_at_its_longest(num_text: int) -> None:
    of_batch = flops_of_batches(_config())
    assert (of_batch(_batch((1, 0, num_text)), ())[0] > of_batch(_batch((1, 0, 64)), ())[0]) == (num_text > 64)
