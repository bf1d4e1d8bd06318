"""A sampler that works gives back what the model learnt by heart.

A falling loss passes with a broken sampler, so this trains the tiny preset on two real clips until it knows them, and
samples both prompts: the videos must come out at 20 dB or more against the codec's reconstruction of their clip.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.demo_clips import DemoClip, package_file, read_clip_list
from m4v_dist.batch import LatentBatch, Slot, TextFeatures, derive_seed
from m4v_dist.config.schema import (
    CodecSettings,
    KernelSettings,
    ModelSettings,
    ObjectiveSettings,
    SamplingSettings,
    TextEncoderSettings,
)
from m4v_dist.frozen.text_encoder import build_text_encoder
from m4v_dist.frozen.video_file import decode_animation, resize_cover
from m4v_dist.frozen.video_vae import Codec, build_codec, frames_from_uint8
from m4v_dist.model.build import build_model
from m4v_dist.objective.flow_matching import PyramidFlowMatching
from m4v_dist.objective.pyramid_schedule import PyramidSchedule
from m4v_dist.sampling.pyramid_sampler import sample_latents

CLIPS = Path(__file__).parents[2] / "jobs" / "configs" / "demo_clips.json"
STEMS = ("video_ltx2_3_ic_lora-2", "video_wan_vace_14B_v2v-1")
SIZE_PX = 64
NUM_LATENTS = 3
NUM_STEPS = 220
NUM_SLOTS = 8
LEARNING_RATE = 2e-3


@pytest.mark.slow
def test_two_memorised_clips_are_sampled_back_at_20_db() -> None:
    clips = {clip.stem: clip for clip in read_clip_list(str(CLIPS))}
    codec, encoder = build_codec(CodecSettings()), build_text_encoder(TextEncoderSettings())
    latents = [codec.encode(_frames(clips[stem])) for stem in STEMS]
    targets = [codec.decode(item) for item in latents]
    texts = encoder.encode([clips[stem].caption for stem in STEMS])
    null_text = encoder.encode([""])[0]
    model = build_model(ModelSettings(preset="tiny"), KernelSettings(), seed=0)

    untrained = _psnr_table(_sample(model, texts, null_text, codec), targets)
    _memorise(model, latents, texts, null_text, codec)
    measured = _psnr_table(_sample(model, texts, null_text, codec), targets)

    figures = {"untrained_db": _diagonal(untrained), "memorised_db": _diagonal(measured), "all_pairs_db": measured}
    print(f"\nsampled against the codec's reconstruction: {json.dumps(figures)}")
    assert min(_diagonal(measured)) >= 20.0
    # It was learnt, and it is the prompt that picks the clip.
    assert max(_diagonal(untrained)) < 18.0
    for row, values in enumerate(measured):
        assert values[row] > max(value for column, value in enumerate(values) if column != row) + 6.0


def _frames(clip: DemoClip) -> Tensor:
    """17 frames of a clip, every second one: t h w c in [-1, 1]."""
    frames, _ = decode_animation(package_file(clip.file).read_bytes())
    small = resize_cover(frames[: 2 * 17 : 2], SIZE_PX, SIZE_PX)
    return frames_from_uint8(torch.from_numpy(small))


def _memorise(
    model: nn.Module,
    latents: list[Tensor],
    texts: list[TextFeatures],
    null_text: TextFeatures,
    codec: Codec,
) -> None:
    objective = PyramidFlowMatching(
        ObjectiveSettings(cfg_dropout=0.0, history_noise_ramp_steps=0), codec.normalization.normalize
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(NUM_STEPS):
        # Warm-up, then a cosine to 5 %: the last steps average out the noise of the draws.
        decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / NUM_STEPS))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 20) * decay
        objective(model, _batch(step, latents, texts, null_text)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _batch(step: int, latents: list[Tensor], texts: list[TextFeatures], null_text: TextFeatures) -> LatentBatch:
    slots = []
    for index in range(NUM_SLOTS):
        clip = index % len(STEMS)
        unit = 1 + derive_seed("unit", step, index) % NUM_LATENTS
        stage = (0, 1, 1, 2)[index // len(STEMS) % 4]
        slots.append(Slot(step, index, "clips", clip, STEMS[clip], unit, stage, derive_seed(step, index), 1, 1))
    return LatentBatch(
        slots=tuple(slots),
        latents=tuple(latents[slot.record][:, : slot.unit] for slot in slots),
        text=tuple(texts[slot.record] for slot in slots),
        null_text=null_text,
        weights=(1.0,) * NUM_SLOTS,
        global_num_slots=NUM_SLOTS,
    )


def _sample(model: nn.Module, texts: list[TextFeatures], null_text: TextFeatures, codec: Codec) -> list[Tensor]:
    settings = SamplingSettings(first_unit_steps=(10, 10, 10), later_unit_steps=(8, 8, 8))
    sampled = sample_latents(
        model,
        texts,
        null_text,
        schedule=PyramidSchedule(),
        num_latents=NUM_LATENTS,
        grid_height=SIZE_PX // 8,
        grid_width=SIZE_PX // 8,
        channels=16,
        first_unit_steps=settings.first_unit_steps,
        later_unit_steps=settings.later_unit_steps,
        first_unit_guidance=1.0,
        later_unit_guidance=1.0,
        generators=[torch.Generator().manual_seed(number) for number in range(len(texts))],
    )
    return [codec.decode(codec.normalization.denormalize(item)) for item in sampled]


def _psnr_table(videos: list[Tensor], targets: list[Tensor]) -> list[list[float]]:
    """PSNR in dB of each sampled video (row) against each reconstruction (column), pixels in [-1, 1]."""
    return [[round(_psnr(video, target), 2) for target in targets] for video in videos]


def _psnr(video: Tensor, target: Tensor) -> float:
    error = (video.clamp(-1, 1) - target.clamp(-1, 1)).square().mean()
    return 10 * math.log10(4.0 / float(error))


def _diagonal(table: list[list[float]]) -> list[float]:
    return [row[number] for number, row in enumerate(table)]
