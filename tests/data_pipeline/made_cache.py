"""Helpers of these tests: a latent cache of made-up latents, written by the real writer, and real small clips."""

from dataclasses import dataclass

import numpy as np
import torch

from data_pipeline.cache_manifest import FORMAT_VERSION, NULL_PROMPT
from data_pipeline.cache_writer import CacheShardWriter, write_manifest
from data_pipeline.manifest import IndexRow
from m4v_dist.batch import TextFeatures

FINGERPRINT = {
    "codec": "test",
    "codec_weights_sha256": "aa",
    "text_encoder": "test",
    "text_encoder_weights_sha256": "bb",
}


@dataclass(frozen=True)
class MadeSource:
    """A source to make up: its records all have `num_latents` latents of a size x size px bucket.

    Caption k of a record has weight k + 1, and k more tokens than the first; its tokens hold k + 1.
    """

    name: str
    media: str
    num_records: int
    num_latents: int
    size_px: int = 64
    split: str = "train"
    num_captions: int = 1


def record_value(source: str, position: int) -> float:
    """What every latent of a made-up record is filled with (plus its time index)."""
    return float(8 * position + (100 if source.startswith("i") else 0))


def make_cache(folder: str, sources: list[MadeSource]) -> str:
    """Write a finished cache; latents of record i hold `record_value + time index`."""
    for source in sources:
        writer = CacheShardWriter(folder, source.name)
        for position in range(source.num_records):
            side = source.size_px // 8
            latents = torch.full((4, source.num_latents, side, side), record_value(source.name, position))
            latents += torch.arange(source.num_latents)[:, None, None]
            row = made_row(source, position)
            texts = [
                TextFeatures(torch.full((num_tokens, 6), float(k + 1)), torch.full((6,), float(k + 1)))
                for k, num_tokens in enumerate(row.num_text_tokens)
            ]
            writer.add(row, latents.bfloat16(), texts)
        writer.commit({"fingerprint": "made"})
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": FINGERPRINT,
        "normalization": {name: [1.0] * 4 for name in ("first_mean", "first_std", "later_mean", "later_std")},
        "spatial_stride": 8,
        "null_prompt": NULL_PROMPT,
        "fragments": sorted(source.name for source in sources),
        "sources": {source.name: {"media": source.media} for source in sources},
    }
    write_manifest(folder, manifest, TextFeatures(torch.zeros(2, 6), torch.zeros(6)))
    return folder


def made_row(source: MadeSource, position: int) -> IndexRow:
    """An index row before it is placed in a shard."""
    num_frames = 8 * (source.num_latents - 1) + 1
    captions = range(source.num_captions)
    return IndexRow(
        key=f"{source.name}{position:03d}", source=source.name, media=source.media, shard="",
        height_px=source.size_px, width_px=source.size_px, num_frames=num_frames, num_latents=source.num_latents,
        fps=24.0, captions=tuple(f"caption {position}" + ", again" * k for k in captions),
        caption_weights=tuple(k + 1.0 for k in captions), num_text_tokens=tuple(3 + position % 2 + k for k in captions),
        offset_bytes=0, size_bytes=0,
        checksum="", source_height_px=90, source_width_px=120, source_num_frames=num_frames, source_fps=24.0,
    )  # fmt: skip


def moving_blocks(seed: int, num_frames: int, height: int = 96, width: int = 128) -> np.ndarray:
    """Frames t h w c uint8 of coloured blocks that move to the right, a pixel a frame."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 255, (height // 16, width // 16, 3)).astype(np.uint8)
    picture = coarse.repeat(16, 0).repeat(16, 1)
    return np.stack([np.roll(picture, shift, axis=1) for shift in range(num_frames)])
