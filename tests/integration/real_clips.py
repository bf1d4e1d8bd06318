"""Real clips that ship in a package, two unless told, small: latents and captions, and batches drawn from them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.demo_clips import DemoClip, package_file, read_clip_list
from m4v_dist.batch import LatentBatch, Slot, TextFeatures, derive_seed
from m4v_dist.config.data_settings import CodecSettings, TextEncoderSettings
from m4v_dist.frozen.text_encoder import build_text_encoder
from m4v_dist.frozen.video_file import decode_animation, resize_cover
from m4v_dist.frozen.video_vae import Codec, build_codec, frames_from_uint8

CLIPS = Path(__file__).parents[2] / "jobs" / "configs" / "demo_clips.json"
STEMS = ("video_ltx2_3_ic_lora-2", "video_wan_vace_14B_v2v-1")
SIZE_PX = 64
NUM_LATENTS = 3
NUM_SLOTS = 8


@dataclass(frozen=True)
class RealClips:
    """Latents (c t h w, un-normalised) and text of each clip, the empty prompt, and the codec of the latents."""

    stems: tuple[str, ...]
    latents: tuple[Tensor, ...]
    texts: tuple[TextFeatures, ...]
    null_text: TextFeatures
    codec: Codec

    def batch(self, step: int) -> LatentBatch:
        """The slots of a step: all clips in turn, all pyramid stages 1:2:1, units and draws from the step's seed."""
        slots = []
        for index in range(NUM_SLOTS):
            clip = index % len(self.stems)
            unit = 1 + derive_seed("unit", step, index) % NUM_LATENTS
            stage = (0, 1, 1, 2)[index // len(self.stems) % 4]
            seed = derive_seed(step, index)
            slots.append(Slot(step, index, "clips", clip, self.stems[clip], unit, stage, seed, 1, 1))
        return LatentBatch(
            slots=tuple(slots),
            latents=tuple(self.latents[slot.record][:, : slot.unit] for slot in slots),
            text=tuple(self.texts[slot.record] for slot in slots),
            null_text=self.null_text,
            weights=(1.0,) * NUM_SLOTS,
            global_num_slots=NUM_SLOTS,
        )


def read_real_clips(stems: tuple[str, ...] = STEMS) -> RealClips:
    """Encode clips of the demo's list and their captions."""
    clips = {clip.stem: clip for clip in read_clip_list(str(CLIPS))}
    codec, encoder = build_codec(CodecSettings()), build_text_encoder(TextEncoderSettings())
    return RealClips(
        stems=stems,
        latents=tuple(codec.encode(_frames(clips[stem])) for stem in stems),
        texts=tuple(encoder.encode([clips[stem].caption for stem in stems])),
        null_text=encoder.encode([""])[0],
        codec=codec,
    )


def _frames(clip: DemoClip) -> Tensor:
    """17 frames of a clip, every second one: t h w c in [-1, 1]."""
    frames, _ = decode_animation(package_file(clip.file).read_bytes())
    small = resize_cover(frames[: 2 * 17 : 2], SIZE_PX, SIZE_PX)
    return frames_from_uint8(torch.from_numpy(small))
