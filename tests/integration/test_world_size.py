"""The same run on another number of ranks, under another ZeRO stage: same slots and noise, same losses, same end.

Blocks that were frozen until the checkpoint, several parameter groups, the moving average and the loader's cursors all
change hands. Sums over ranks come in another order, so the comparison has a tolerance: 1e-4 of the loss, and for a
weight a twentieth of what the weights have moved since. AdamW's first steps after an unfreeze have the size of the
learning rate however small the gradient, so a gradient of about nothing may send a weight either way.
"""

import shutil
from pathlib import Path

import pytest
import torch

from m4v_dist.config.load import config_to_json
from m4v_dist.trainer import checkpoint
from tests.integration.small_run import TOTAL_STEPS, make_small_cache, rows, small_config, train_each
from tests.trainer.ranks import run_ranks

pytestmark = pytest.mark.slow

PATHS = [(2, 1, 1, 3), (2, 5, 3, 3), (2, 3, 2, 1)]
"""Ranks before and after, ZeRO stage before and after."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Straight runs on two ranks under each ZeRO stage, and the cache."""
    folder = tmp_path_factory.mktemp("world")
    cache = make_small_cache(str(folder / "cache"))
    configs = [
        config_to_json(small_config(f"{folder}/zero{stage}", cache, zero_stage=stage, keep_last=9))
        for stage in (1, 2, 3)
    ]
    assert run_ranks(train_each, 2, configs) == [[TOTAL_STEPS] * 3] * 2
    return folder


def _assert_near(found: str, expected: str, since: str) -> None:
    """Weights and averages of two checkpoints, beside how far they have come since a third."""
    for load in (checkpoint.load_weights, checkpoint.load_ema_weights):
        one, other, before = load(found), load(expected), load(since)
        assert sorted(one) == sorted(other)
        moved = max(float((other[name] - before[name]).abs().max()) for name in other)
        apart = {name: float((one[name] - other[name]).abs().max()) for name in other}
        worst = max(apart, key=apart.__getitem__)
        assert moved > 1e-3, "nothing moved, so nothing is compared"
        assert apart[worst] <= 0.05 * moved, f"{worst}: {apart[worst]:.2e} apart, moved {moved:.2e}"


@pytest.mark.parametrize(("before", "after", "zero_before", "zero_after"), PATHS)
def test_a_run_goes_on_with_other_ranks_and_another_zero_stage(
    base: Path, tmp_path: Path, before: int, after: int, zero_before: int, zero_after: int
) -> None:
    straight = f"{base}/zero{zero_before}"
    folder = str(shutil.copytree(straight, tmp_path / "run"))
    for name in ("step_00000009", "step_00000006", "step_00000003"):
        shutil.rmtree(f"{folder}/checkpoints/{name}")
    config = small_config(folder, str(base / "cache"), zero_stage=zero_after, keep_last=9)
    assert run_ranks(train_each, after, [config_to_json(config)]) == [[TOTAL_STEPS]] * after
    expected = {row["step"]: row for row in rows(straight, "train")}
    redone = [row for row in rows(folder, "train") if row["attempt"] == 2]
    assert [row["step"] for row in redone] == list(range(2, TOTAL_STEPS))
    for row in redone:
        assert row["train/loss"] == pytest.approx(expected[row["step"]]["train/loss"], rel=1e-4)
        for name in ("data/clips/samples_seen", "data/stills/samples_seen", "data/clips/tokens_seen", "train/lr"):
            assert row[name] == expected[row["step"]][name]
    ends = [f"{path}/checkpoints/step_{TOTAL_STEPS:08d}" for path in (folder, straight)]
    _assert_near(*ends, since=f"{straight}/checkpoints/step_00000003")
    states = [checkpoint.read_state(path) for path in ends]
    assert states[0]["loader"] == states[1]["loader"]
    assert states[0]["optimizer_steps"] == states[1]["optimizer_steps"]
    assert states[0]["ema_updates"] == states[1]["ema_updates"]


def test_a_batch_smaller_than_the_ranks_trains_the_same_with_fillers(base: Path, tmp_path: Path) -> None:
    """Three slots on one rank, and on four, of which one holds a filler in every step, held-out ones too."""
    options = {"global_batch_slots": 3, "held_out_slots": 3, "zero_stage": 3}
    folders = [str(tmp_path / f"{ranks}") for ranks in (1, 4)]
    for ranks, folder in zip((1, 4), folders, strict=True):
        config = config_to_json(small_config(folder, str(base / "cache"), **options))
        assert run_ranks(train_each, ranks, [config]) == [[TOTAL_STEPS]] * ranks
    alone, four = ([row["train/loss"] for row in rows(folder, "train")] for folder in folders)
    torch.testing.assert_close(four, alone, rtol=1e-4, atol=0)
    held_out = [rows(folder, "held_out")[-1]["validation/held_out_loss"] for folder in folders]
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-4)
