"""A cache that is not there yet, as a plan may assume it: every record as long as can be, texts at their longest.

Only numbers are asked of it, and nothing can be read; `write_assumed_cache` writes it with random latents, to time
training on.
"""

from collections.abc import Sequence

import torch

from data_pipeline.cache_manifest import FORMAT_VERSION, NULL_PROMPT
from data_pipeline.cache_writer import CacheShardWriter, write_manifest
from data_pipeline.latent_cache import LatentCache
from data_pipeline.manifest import IndexRow
from m4v_dist.batch import TextFeatures
from m4v_dist.config.data_settings import BucketSettings, SourceSettings

SPATIAL_STRIDE = 8
"""Pixels per latent: of every codec here."""


def assumed_cache(
    path: str,
    sources: Sequence[SourceSettings],
    buckets: Sequence[BucketSettings],
    *,
    num_frames: int,
    num_text_tokens: int,
    num_records: int,
) -> LatentCache:
    """Return a cache of made-up rows.

    Args:
        path: where the cache will be.
        sources: of the run.
        buckets: of sources that name none; each source has as many records in each of its own.
        num_frames: of every video, 8k+1.
        num_text_tokens: of every caption.
        num_records: of each source and bucket.
    """
    rows = {
        source.name: [
            _row(source, bucket, number, num_frames=num_frames, num_text_tokens=num_text_tokens)
            for number in range(num_records)
            for bucket in source.buckets or buckets
        ]
        for source in sources
    }
    manifest = {
        "spatial_stride": SPATIAL_STRIDE,
        "sources": {source.name: {"media": source.media} for source in sources},
    }
    return LatentCache.of_rows(path, manifest, rows, TextFeatures(torch.zeros(1, 1), torch.zeros(1)))


def write_assumed_cache(cache: LatentCache, *, latent_channels: int, text_width: int, pooled_width: int) -> None:
    """Write every record of an assumed cache to its path, latents and texts drawn from a normal distribution.

    No codec and no encoder made it, and its fingerprint says so: no run takes it for data.

    Args:
        cache: of `assumed_cache`.
        latent_channels, text_width, pooled_width: what the model takes.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    sources = cache.manifest["sources"]
    for source in sources:
        writer = CacheShardWriter(cache.path, source)
        for row in cache.rows(source):
            grid = (row.height_px // SPATIAL_STRIDE, row.width_px // SPATIAL_STRIDE)
            latents = draw(latent_channels, row.num_latents, *grid)  # c t h w
            texts = [TextFeatures(draw(num, text_width), draw(pooled_width)) for num in row.num_text_tokens]
            writer.add(row, latents.bfloat16(), texts)
        writer.commit({"fingerprint": "assumed"})
    ones, zeros = [1.0] * latent_channels, [0.0] * latent_channels
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": {"codec": "none, random latents", "text_encoder": "none, random features"},
        "normalization": {"first_mean": zeros, "first_std": ones, "later_mean": zeros, "later_std": ones},
        "spatial_stride": SPATIAL_STRIDE,
        "null_prompt": NULL_PROMPT,
        "fragments": sorted(sources),
        "sources": sources,
    }
    write_manifest(cache.path, manifest, TextFeatures(draw(1, text_width), draw(pooled_width)))


def _row(
    source: SourceSettings, bucket: BucketSettings, number: int, *, num_frames: int, num_text_tokens: int
) -> IndexRow:
    frames = num_frames if source.media == "video" else 1
    return IndexRow(
        key=f"assumed-{number}", source=source.name, media=source.media, shard="none",
        height_px=bucket.height_px, width_px=bucket.width_px, num_frames=frames, num_latents=(frames - 1) // 8 + 1,
        fps=0.0, captions=("",), caption_weights=(1.0,), num_text_tokens=(num_text_tokens,),
        offset_bytes=0, size_bytes=0, checksum="",
        source_height_px=bucket.height_px, source_width_px=bucket.width_px, source_num_frames=frames, source_fps=0.0,
    )  # fmt: skip
