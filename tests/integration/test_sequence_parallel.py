"""Training steps with ranks that share a sequence, through `train_on_rank`: the run of one rank, at each ZeRO stage."""

from pathlib import Path
from typing import Any

import pytest

from m4v_dist.config.load import config_to_json, parse_config
from m4v_dist.config.schema import RunConfig
from tests.integration.small_run import make_small_cache, rows, small_values, train_each
from tests.trainer.ranks import run_ranks

NUM_STEPS = 3
"""One of images, then two of clips and images."""

pytestmark = pytest.mark.slow


def _config(
    folder: str, cache: str, *, num_workers: int, sequence_parallel: int, num_steps: int = NUM_STEPS, **trainer: Any
) -> RunConfig:
    values = small_values(folder, cache, checkpoint_every_steps=100, **trainer)
    values["launch"] |= {"num_workers": num_workers, "sequence_parallel": sequence_parallel}
    for stage, steps in zip(values["curriculum"], (1, num_steps - 1), strict=True):
        stage["num_steps"] = steps
    # One slot a forward, so that an image leaves a rank without frames.
    values["curriculum"][0]["micro_batch_slots"] = 1
    return parse_config(values, where="sequence run")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders one; zero1 and zero2 on two ranks that share their sequences, zero3 on two times two.

    zero1 is begun by one rank and gone on with from its checkpoint.
    """
    base = tmp_path_factory.mktemp("sequence")
    cache = make_small_cache(str(base / "cache"))

    def job(name: str, num_workers: int, sequence_parallel: int, stage: int, num_steps: int = NUM_STEPS) -> str:
        sizes = {"num_workers": num_workers, "sequence_parallel": sequence_parallel, "num_steps": num_steps}
        return config_to_json(_config(f"{base}/{name}", cache, **sizes, zero_stage=stage))

    assert run_ranks(train_each, 1, [job("one", 1, 1, 2), job("zero1", 1, 1, 1, 2)]) == [[NUM_STEPS, 2]]
    assert run_ranks(train_each, 2, [job(f"zero{stage}", 2, 2, stage) for stage in (1, 2)]) == [[NUM_STEPS] * 2] * 2
    assert run_ranks(train_each, 4, [job("zero3", 4, 2, 3)]) == [[NUM_STEPS]] * 4
    return base


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_a_run_on_shared_sequences_is_the_run_of_one_rank(runs: Path, name: str) -> None:
    """The same slots, noise and losses; float32 sums in another order, over three steps of AdamW."""
    expected, found = (rows(str(runs / folder), "train") for folder in ("one", name))
    assert [row["step"] for row in found] == list(range(NUM_STEPS))
    for one, shared in zip(expected, found, strict=True):
        assert shared["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4)
        assert shared["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=1e-3)
        for key in one:
            # sequence ranks count once: means, records and samples are those of one rank
            if key.startswith(("train/loss_", "train/text_dropped")) or key.endswith(("samples_seen", "tokens_seen")):
                assert shared[key] == pytest.approx(one[key], rel=1e-3), key
    held_out = [rows(str(runs / folder), "held_out")[-1]["validation/held_out_loss"] for folder in ("one", name)]
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-4)
