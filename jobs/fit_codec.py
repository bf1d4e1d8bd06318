"""`python -m jobs.fit_codec`: fit the embedded pca codec on real clips and state its PSNR on clips it never saw.

The one verb without `--config`: it makes a file that ships with the package, belongs to no run, and needs nothing of a
run's TOML. Clips come from a curated list (stem, package file, split); the training split is fitted on, the held-out
split is measured at 64, 128 and 256 px, first and later frames apart.
"""

import argparse
import json
import logging
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data_pipeline.demo_clips import package_file
from m4v_dist import storage
from m4v_dist.errors import DataError, JobError
from m4v_dist.frozen.pca_codec import EMBEDDED_WEIGHTS, PcaCodec, fit_pca_weights
from m4v_dist.frozen.video_file import centre_crop, decode_animation, read_video, resize_cover
from m4v_dist.frozen.video_vae import Codec, frames_from_uint8, frames_to_uint8

LOG = logging.getLogger("fit_codec")
CLIP_LIST = str(Path(__file__).parent / "configs" / "demo_clips.json")
SIZES_PX = (64, 128, 256)
MAX_FRAMES = 89


def load_clip(clip: dict[str, Any], size_px: int) -> Tensor:
    """A listed clip as float frames t h w c in [-1, 1], covered and cropped to a square, 8k+1 frames from its start."""
    path = package_file(clip["file"])
    frames, _ = decode_animation(path.read_bytes()) if path.suffix == ".webp" else read_video(str(path))
    num_frames = (min(len(frames), MAX_FRAMES) - 1) // 8 * 8 + 1
    square = centre_crop(resize_cover(frames[:num_frames], size_px, size_px), size_px, size_px)
    return frames_from_uint8(torch.from_numpy(square.copy()))


def psnr_db(frames: Tensor, reconstruction: Tensor) -> float:
    """PSNR of two float clips in [-1, 1], measured on their uint8 frames."""
    error = frames_to_uint8(frames).double() - frames_to_uint8(reconstruction).double()
    return float(10 * torch.log10(255.0**2 / error.square().mean().clamp_min(1e-12)))


def measure(codec: Codec, clips: list[dict[str, Any]], size_px: int) -> dict[str, float]:
    """Mean PSNR over clips of first frames and of later frames."""
    first, later = [], []
    for clip in tqdm(clips, desc=f"held-out clips at {size_px} px", unit="clip"):
        frames = load_clip(clip, size_px)
        reconstruction = codec.decode(codec.encode(frames))
        first.append(psnr_db(frames[:1], reconstruction[:1]))
        later.append(psnr_db(frames[1:], reconstruction[1:]))
    return {"first_frames_db": round(sum(first) / len(first), 2), "later_frames_db": round(sum(later) / len(later), 2)}


def fit(clip_list: str, out: str, channels: int) -> str:
    """Fit, measure, write; return one line that says what was done."""
    clips = storage.read_json(clip_list)["clips"]
    training = [clip for clip in clips if clip["split"] == "train"]
    held_out = [clip for clip in clips if clip["split"] == "held_out"]
    if not training or not held_out:
        raise DataError(f"{clip_list}: {len(training)} training and {len(held_out)} held-out clips; list both.")
    packages = sorted({clip["package"] for clip in clips})
    provenance: dict[str, object] = {
        "method": "PCA of 8x8x1 and 8x8x8 RGB blocks, scale of each channel r * sqrt(deviation)",
        "packages": {package: metadata.version(package) for package in packages},
        "training_clips": [clip["stem"] for clip in training],
        "held_out_clips": [clip["stem"] for clip in held_out],
        "sizes_px": list(SIZES_PX),
    }
    started = time.monotonic()
    progress = tqdm(((c, s) for c in training for s in SIZES_PX), total=len(training) * len(SIZES_PX), desc="fit")
    weights = fit_pca_weights((load_clip(clip, size) for clip, size in progress), channels, provenance)
    seconds = time.monotonic() - started
    codec = PcaCodec.from_bytes(weights.to_bytes())
    weights.provenance["held_out_psnr"] = {f"{size}px": measure(codec, held_out, size) for size in SIZES_PX}
    storage.write_bytes(out, weights.to_bytes())
    LOG.info("provenance: %s", json.dumps(weights.provenance, indent=2))
    figures = weights.provenance["held_out_psnr"]
    return (
        f"{out}: fitted on {len(training)} clips in {seconds:.0f} s; PSNR on {len(held_out)} held-out clips {figures}"
    )


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m jobs.fit_codec", description=__doc__.split("\n")[0])
    parser.add_argument("--clips", default=CLIP_LIST, help="JSON list of clips with file and split")
    parser.add_argument("--out", default=EMBEDDED_WEIGHTS, help="safetensors file to write")
    parser.add_argument("--channels", type=int, default=16, help="latent channels")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        sys.stdout.write(f"fit_codec: {fit(arguments.clips, arguments.out, arguments.channels)}\n")
    except JobError as error:
        sys.stderr.write(f"fit_codec: {type(error).__name__}: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
