"""One set of records in every form that the loaders of `loader_times.py` read: a cache, MDS shards, raw files.

The tensors are drawn from a normal distribution; no codec made them.

Legend: `c` channels, `t` latents in time, `h` `w` grid, `n` text tokens, `d` text width.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_pipeline.cache_manifest import FORMAT_VERSION, NULL_PROMPT
from data_pipeline.cache_writer import CacheShardWriter, write_manifest
from data_pipeline.manifest import IndexRow
from m4v_dist import storage, tensor_files
from m4v_dist.batch import TextFeatures
from m4v_dist.config.data_settings import BucketSettings

STRIDE = 8


@dataclass(frozen=True)
class LoaderCase:
    """What the records are.

    Args:
        name: of the case.
        num_records: of them.
        latents: c t h w.
        text: n d.
        records_per_shard: of a tar.
    """

    name: str
    num_records: int
    latents: tuple[int, int, int, int]
    text: tuple[int, int]
    records_per_shard: int = 64

    @property
    def bucket(self) -> BucketSettings:
        """Its size in pixels."""
        return BucketSettings(height_px=self.latents[2] * STRIDE, width_px=self.latents[3] * STRIDE)

    @property
    def shards(self) -> list[str]:
        """Names of the tars."""
        return [f"vid-{number:05d}" for number in range(-(-self.num_records // self.records_per_shard))]


CASES = (
    LoaderCase("384p, 57 frames", 512, (16, 8, 48, 80), (40, 4096)),
    LoaderCase("384p image", 2048, (16, 1, 48, 80), (40, 1024), records_per_shard=256),
)
"""PyramidFlow's latents, with a caption of 40 tokens."""

POOLED_WIDTH = 768


def write_cache(case: LoaderCase, folder: str) -> None:
    """Write the records as a latent cache."""
    records = _records(case)
    for name in case.shards:
        writer = CacheShardWriter(folder, name)
        for _, (row, latents, text) in zip(range(case.records_per_shard), records, strict=False):
            writer.add(row, latents, [text])
        writer.commit({"fingerprint": "drawn"})
    channels = case.latents[0]
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": {"codec": "none, drawn latents"},
        "normalization": {
            name: [float("std" in name)] * channels for name in ("first_mean", "first_std", "later_mean", "later_std")
        },
        "spatial_stride": STRIDE,
        "null_prompt": NULL_PROMPT,
        "fragments": case.shards,
        "sources": {"vid": {"media": "video"}},
    }
    write_manifest(folder, manifest, TextFeatures(torch.zeros(1, case.text[1]), torch.zeros(POOLED_WIDTH)))


def write_raw_files(case: LoaderCase, folder: str) -> None:
    """Write two safetensors files for each record."""
    for row, latents, text in _records(case):
        for name, data in members_of(latents, text).items():
            storage.write_bytes(storage.join(folder, f"{row.key}.{name}.safetensors"), data)


def members_of(latents: Tensor, text: TextFeatures) -> dict[str, bytes]:
    """A record's tensors as the peers store them: the bytes that the cache's members hold."""
    texts = {"tokens.0": text.tokens.bfloat16(), "pooled.0": text.pooled.float()}
    return {
        "latents": tensor_files.tensors_to_bytes({"latents": latents}),
        "text": tensor_files.tensors_to_bytes(texts),
    }


def stored_records(case: LoaderCase) -> Iterator[dict[str, bytes]]:
    """The members of every record, in order."""
    for _, latents, text in _records(case):
        yield members_of(latents, text)


def upload(folder: str, remote: str) -> None:
    """Copy a local folder to an object store."""
    for base, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(base, name)
            with open(path, "rb") as file:
                storage.write_bytes(storage.join(remote, os.path.relpath(path, folder)), file.read())


def _records(case: LoaderCase) -> Iterator[tuple[IndexRow, Tensor, TextFeatures]]:
    generator = torch.Generator().manual_seed(0)
    num_frames = 8 * (case.latents[1] - 1) + 1
    height, width = case.bucket.height_px, case.bucket.width_px
    row = IndexRow(
        key="", source="vid", media="video", shard="", height_px=height, width_px=width, num_frames=num_frames,
        num_latents=case.latents[1], fps=24.0, captions=("drawn",), caption_weights=(1.0,),
        num_text_tokens=(case.text[0],), offset_bytes=0, size_bytes=0, checksum="", source_height_px=height,
        source_width_px=width, source_num_frames=num_frames, source_fps=24.0,
    )  # fmt: skip
    for number in range(case.num_records):
        latents = torch.randn(case.latents, generator=generator).bfloat16()
        text = TextFeatures(torch.randn(case.text, generator=generator), torch.randn(POOLED_WIDTH, generator=generator))
        yield replace(row, key=f"{number:08d}"), latents, text
