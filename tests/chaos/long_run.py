"""The run that faults are done to: `tiny`, two steps of images, then thirteen of 31 latents (241 frames), on two ranks.

And the runs that it is compared with, trained on plain gloo ranks without Ray: one that nothing happens to, one that
leaves one step out on purpose.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m4v_dist.config.load import config_to_json, parse_config
from m4v_dist.config.schema import RunConfig
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.deepspeed_engine import ZeroEngine
from tests.data_pipeline.made_cache import MadeSource
from tests.integration.small_run import make_small_cache, rows, small_values, train_each
from tests.trainer.ranks import run_ranks

NUM_RANKS = 2
IMAGE_STEPS, LONG_STEPS = 2, 13
TOTAL_STEPS = IMAGE_STEPS + LONG_STEPS
NUM_LATENTS, NUM_FRAMES = 31, 241
SAVE_EVERY_STEPS, KEEP_LAST = 3, 2
LEFT_OUT_STEP = 7
"""Of the run that leaves one out; 0-based, in the middle of the long stage."""

SOURCES = (
    MadeSource("clips", "video", 8, NUM_LATENTS),
    MadeSource("stills", "image", 14, 1),
    MadeSource("unseen", "video", 3, NUM_LATENTS, split="held_out"),
)


def make_long_cache(folder: str) -> str:
    """A cache of 31-latent clips of 64 x 64 px, and of stills."""
    return make_small_cache(folder, SOURCES)


def long_values(folder: str, cache: str, zero_stage: int) -> dict[str, Any]:
    """Settings of the run; checkpoints stand at steps 2 (end of the images), 3, 6, 9, 12 and 15."""
    values = small_values(
        folder, cache, zero_stage=zero_stage, checkpoint_every_steps=SAVE_EVERY_STEPS, keep_last=KEEP_LAST
    )
    values["model"] = {"preset": "tiny"}
    values["precompute"]["num_frames"] = NUM_FRAMES
    image, video = values["curriculum"]
    image |= {"num_steps": IMAGE_STEPS, "micro_batch_slots": 6}
    video |= {"num_steps": LONG_STEPS, "micro_batch_slots": 6, "num_latents": NUM_LATENTS}
    values["launch"] = {"num_workers": NUM_RANKS, "max_failures": 1}
    return values


def long_config(folder: str, cache: str, zero_stage: int, *, seed: int = 7) -> RunConfig:
    """The same as a config."""
    values = long_values(folder, cache, zero_stage)
    values["run"]["seed"] = seed
    return parse_config(values, where="chaos")


# ---- what it is compared with


def _train_without_a_step(config: str) -> None:
    """Train on this rank with the optimizer told, at one step, to leave it out, though its loss is finite."""
    step, calls = ZeroEngine.step, iter(range(TOTAL_STEPS))

    def leaving_one_out(self: ZeroEngine, lr: float, *, fresh_scale: float = 1.0) -> float | None:
        if next(calls) != LEFT_OUT_STEP:
            return step(self, lr, fresh_scale=fresh_scale)
        ZeroEngine.step = step  # type: ignore[method-assign]
        self.discard()
        ZeroEngine.step = leaving_one_out  # type: ignore[method-assign]
        return None

    ZeroEngine.step = leaving_one_out  # type: ignore[method-assign]
    train_each([config])


@dataclass(frozen=True)
class References:
    """Folders of finished runs of one ZeRO stage: nothing happened to the one, the other left out LEFT_OUT_STEP."""

    undisturbed: str
    left_out: str


def train_references(base: Path, cache: str, zero_stage: int) -> References:
    """Train them."""
    found = References(str(base / "undisturbed"), str(base / "left_out"))
    assert train_here(long_config(found.undisturbed, cache, zero_stage)) == TOTAL_STEPS
    run_ranks(_train_without_a_step, NUM_RANKS, config_to_json(long_config(found.left_out, cache, zero_stage)))
    return found


def train_here(config: RunConfig) -> int:
    """Train a run without Ray; return how many steps it has done."""
    (steps, *_) = run_ranks(train_each, NUM_RANKS, [config_to_json(config)])
    return int(steps[0])


# ---- the comparison


@dataclass(frozen=True)
class Distance:
    """How far a finished run is from another one.

    Args:
        loss: largest relative difference of a step's loss, over all rows of both, redone steps included.
        weights: of all weights as one vector, the norm of the difference over the norm.
        average: the same of their moving average.
        norm: the same of the gradients' norms as of the losses.
        is_bit_identical: losses, gradient norms, weights, average, and all that was saved with them (loader, counters,
            shapes) but the number of ranks, to the last bit.
    """

    loss: float
    weights: float
    average: float
    norm: float
    is_bit_identical: bool

    @property
    def largest(self) -> float:
        """Of the four."""
        return max(self.loss, self.weights, self.average, self.norm)


def distance(
    folder: str, reference: str, *, checkpoints: str | None = None, but: frozenset[int] = frozenset()
) -> Distance:
    """Compare a run with a reference, both at their last step.

    Args:
        folder: of the run.
        reference: of the run that it is compared with.
        checkpoints: of the run, where they are not in its folder.
        but: steps whose losses are not compared.

    Raises:
        AssertionError: a run is not at its end, or a step is missing.
    """
    expected, found = (_losses(run) for run in (reference, folder))
    steps = set(range(TOTAL_STEPS))
    assert {step for step, *_ in expected} == {step for step, *_ in found} == steps, "a step is missing"
    by_step = {step: (loss, norm) for step, loss, norm in expected}
    pairs = [((loss, norm), by_step[step]) for step, loss, norm in found if step not in but]
    ends = [
        checkpoint.newest_committed(path)
        for path in (checkpoints or f"{folder}/checkpoints", f"{reference}/checkpoints")
    ]
    assert all(end is not None and checkpoint.step_of(end) == TOTAL_STEPS for end in ends), ends
    mine, theirs = (str(end) for end in ends)
    weights, weights_of = checkpoint.load_weights(mine), checkpoint.load_weights(theirs)
    average, average_of = checkpoint.load_ema_weights(mine), checkpoint.load_ema_weights(theirs)
    is_same_end = _is_same(weights, weights_of) and _is_same(average, average_of)
    return Distance(
        max(abs(loss - other) / abs(other) for (loss, _), (other, _) in pairs),
        _relative(weights, weights_of),
        _relative(average, average_of),
        max(abs(norm - other) / abs(other) for (_, norm), (_, other) in pairs),
        is_same_end and all(one == other for one, other in pairs) and _state(mine) == _state(theirs),
    )


def _losses(folder: str) -> list[tuple[int, float, float]]:
    return [(row["step"], row["train/loss"], row["train/grad_norm"]) for row in rows(folder, "train")]


def _state(path: str) -> dict[str, Any]:
    return {name: value for name, value in checkpoint.read_state(path).items() if name != "world_size"}


def _is_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert sorted(one) == sorted(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def _relative(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    difference = torch.stack([(one[name] - other[name]).double().norm() for name in other]).norm()
    return float(difference / torch.stack([tensor.double().norm() for tensor in other.values()]).norm())
