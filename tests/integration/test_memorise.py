"""A sampler that works gives back what the model learnt by heart.

A falling loss passes with a broken sampler, so this trains the tiny preset on two real clips until it knows them, and
samples both prompts: the videos must come out at 20 dB or more against the codec's reconstruction of their clip.
"""

import json
import math

import pytest
import torch
from torch import Tensor, nn

from m4v_dist.config.model_settings import KernelSettings, ModelSettings
from m4v_dist.config.schema import SamplingSettings
from m4v_dist.config.training_settings import ObjectiveSettings
from m4v_dist.model.build import build_model
from m4v_dist.objective.flow_matching import PyramidFlowMatching
from m4v_dist.objective.pyramid_schedule import PyramidSchedule
from m4v_dist.sampling.pyramid_sampler import sample_latents
from tests.integration.real_clips import NUM_LATENTS, SIZE_PX, RealClips, read_real_clips

NUM_STEPS = 220
LEARNING_RATE = 2e-3


@pytest.mark.slow
def test_two_memorised_clips_are_sampled_back_at_20_db() -> None:
    clips = read_real_clips()
    targets = [clips.codec.decode(item) for item in clips.latents]
    model = build_model(ModelSettings(preset="tiny"), KernelSettings(), seed=0)

    untrained = _psnr_table(_sample(model, clips), targets)
    _memorise(model, clips)
    measured = _psnr_table(_sample(model, clips), targets)

    figures = {"untrained_db": _diagonal(untrained), "memorised_db": _diagonal(measured), "all_pairs_db": measured}
    print(f"\nsampled against the codec's reconstruction: {json.dumps(figures)}")
    assert min(_diagonal(measured)) >= 20.0
    # It was learnt, and it is the prompt that picks the clip.
    assert max(_diagonal(untrained)) < 18.0
    for row, values in enumerate(measured):
        assert values[row] > max(value for column, value in enumerate(values) if column != row) + 6.0


def _memorise(model: nn.Module, clips: RealClips) -> None:
    objective = PyramidFlowMatching(
        ObjectiveSettings(cfg_dropout=0.0, history_noise_ramp_steps=0), clips.codec.normalization.normalize
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(NUM_STEPS):
        # Warm-up, then a cosine to 5 %: the last steps average out the noise of the draws.
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / NUM_STEPS))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 20) * decay
        objective(model, clips.batch(step)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _sample(model: nn.Module, clips: RealClips) -> list[Tensor]:
    settings = SamplingSettings(first_unit_steps=(10, 10, 10), later_unit_steps=(8, 8, 8))
    sampled = sample_latents(
        model,
        clips.texts,
        clips.null_text,
        schedule=PyramidSchedule(),
        num_latents=NUM_LATENTS,
        grid_height=SIZE_PX // 8,
        grid_width=SIZE_PX // 8,
        channels=16,
        first_unit_steps=settings.first_unit_steps,
        later_unit_steps=settings.later_unit_steps,
        first_unit_guidance=1.0,
        later_unit_guidance=1.0,
        generators=[torch.Generator().manual_seed(number) for number in range(len(clips.texts))],
    )
    codec = clips.codec
    return [codec.decode(codec.normalization.denormalize(item)) for item in sampled]


def _psnr_table(videos: list[Tensor], targets: list[Tensor]) -> list[list[float]]:
    """PSNR in dB of each sampled video (row) against each reconstruction (column), pixels in [-1, 1]."""
    return [[round(_psnr(video, target), 2) for target in targets] for video in videos]


def _psnr(video: Tensor, target: Tensor) -> float:
    error = (video.clamp(-1, 1) - target.clamp(-1, 1)).square().mean()
    return 10 * math.log10(4.0 / float(error))


def _diagonal(table: list[list[float]]) -> list[float]:
    return [row[number] for number, row in enumerate(table)]
