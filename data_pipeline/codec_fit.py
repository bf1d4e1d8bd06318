"""Fit the pca codec on clips of installed packages, and measure it on clips that it never saw.

The training split of a curated list is fitted on; the held-out split is measured at each size, first and later frames
apart.

Legend: `t` frames, `h` `w` pixels, `c` colours.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data_pipeline.codec_check import psnr_db
from data_pipeline.demo_clips import package_file
from m4v_dist import storage
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.frozen.pca_codec import BLOCK, PcaCodec, fit_pca_weights
from m4v_dist.frozen.video_file import centre_crop, decode_animation, read_video, resize_cover
from m4v_dist.frozen.video_vae import Codec, frames_from_uint8, frames_to_uint8

logger = logging.getLogger(__name__)
SIZES_PX = (64, 128, 256)
MAX_FRAMES = 89
MAX_CHANNELS = 3 * BLOCK**2
"""A first frame's block has no more directions."""


def load_clip(clip: Mapping[str, Any], size_px: int) -> Tensor:
    """Read a listed clip, covered and cropped to a square, 8k+1 frames from its start.

    Args:
        clip: an entry of the list; `file` is `package/folder/file`.
        size_px: side of the square.

    Returns:
        t h w c, float32 in [-1, 1].

    Raises:
        DataError: the package or its file is missing.
    """
    path = package_file(clip["file"])
    frames, _ = decode_animation(path.read_bytes()) if path.suffix == ".webp" else read_video(str(path))
    num_frames = (min(len(frames), MAX_FRAMES) - 1) // 8 * 8 + 1
    square = centre_crop(resize_cover(frames[:num_frames], size_px, size_px), size_px, size_px)
    return frames_from_uint8(torch.from_numpy(square.copy()))


def measure(codec: Codec, clips: Sequence[Mapping[str, Any]], size_px: int) -> dict[str, float]:
    """Mean PSNR in dB over clips, of first frames and of later frames, on uint8 frames."""
    first, later = [], []
    for clip in tqdm(clips, desc=f"held-out clips at {size_px} px", unit="clip"):
        frames = load_clip(clip, size_px)
        reconstruction = frames_to_uint8(codec.decode(codec.encode(frames))).numpy()
        original = frames_to_uint8(frames).numpy()
        first.append(psnr_db(original[:1], reconstruction[:1]))
        later.append(psnr_db(original[1:], reconstruction[1:]))
    return {"first_frames_db": round(sum(first) / len(first), 2), "later_frames_db": round(sum(later) / len(later), 2)}


@dataclass(frozen=True)
class FitPlan:
    """What a fit reads: found in the installed packages, not decoded yet.

    Args:
        training: entries of the list that the basis is fitted on.
        held_out: entries that it is measured on.
        versions: of the packages that ship the clips.
    """

    training: tuple[Mapping[str, Any], ...]
    held_out: tuple[Mapping[str, Any], ...]
    versions: Mapping[str, str]

    def __str__(self) -> str:
        return f"{len(self.training)} clips at {SIZES_PX} px and measure on {len(self.held_out)} held-out clips"


def plan_fit(clip_list: str, channels: int) -> FitPlan:
    """Check all that a fit needs; nothing is decoded or written.

    Args:
        clip_list: JSON list of clips with stem, package, file and split.
        channels: of a latent.

    Raises:
        ConfigError: channels out of range.
        DataError: no such list, a split is empty, or a clip's package or file is missing.
    """
    if not 1 <= channels <= MAX_CHANNELS:
        raise ConfigError(f"channels={channels}: a first frame's block gives 1 to {MAX_CHANNELS}.")
    if not storage.exists(clip_list):
        raise DataError(f"{clip_list} does not exist; give a JSON list of clips.")
    clips = storage.read_json(clip_list)["clips"]
    training, held_out = (tuple(c for c in clips if c["split"] == split) for split in ("train", "held_out"))
    if not training or not held_out:
        raise DataError(f"{clip_list}: {len(training)} training and {len(held_out)} held-out clips; list both.")
    for clip in (*training, *held_out):
        package_file(clip["file"])
    versions = {package: metadata.version(package) for package in sorted({clip["package"] for clip in clips})}
    return FitPlan(training, held_out, versions)


def fit_codec(plan: FitPlan, out: str, channels: int) -> str:
    """Fit, measure, write; return one line that says what was done.

    Args:
        plan: what to read.
        out: safetensors file to write.
        channels: of a latent.
    """
    provenance: dict[str, object] = {
        "method": "PCA of 8x8x1 and 8x8x8 RGB blocks, scale of each channel r * sqrt(deviation)",
        "packages": dict(plan.versions),
        "training_clips": [clip["stem"] for clip in plan.training],
        "held_out_clips": [clip["stem"] for clip in plan.held_out],
        "sizes_px": list(SIZES_PX),
    }
    started = time.monotonic()
    pairs = [(clip, size) for clip in plan.training for size in SIZES_PX]
    clips = (load_clip(clip, size) for clip, size in tqdm(pairs, desc="fit"))
    weights = fit_pca_weights(clips, channels, provenance)
    seconds = time.monotonic() - started
    codec = PcaCodec.from_bytes(weights.to_bytes())
    figures = {f"{size}px": measure(codec, plan.held_out, size) for size in SIZES_PX}
    weights.provenance["held_out_psnr"] = figures
    storage.write_bytes(out, weights.to_bytes())
    logger.info("provenance: %s", json.dumps(weights.provenance, indent=2))
    return (
        f"{out}: fitted on {len(plan.training)} clips in {seconds:.0f} s; PSNR on {len(plan.held_out)} held-out clips "
        f"{figures}"
    )
