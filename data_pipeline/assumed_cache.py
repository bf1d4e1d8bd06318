"""A cache that is not there yet, as a plan may assume it: every record as long as can be, texts at their longest.

Only numbers are asked of it: nothing can be read.
"""

from collections.abc import Sequence

import torch

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
    return LatentCache(path, manifest, rows, TextFeatures(torch.zeros(1, 1), torch.zeros(1)))


def _row(
    source: SourceSettings, bucket: BucketSettings, number: int, *, num_frames: int, num_text_tokens: int
) -> IndexRow:
    frames = num_frames if source.media == "video" else 1
    return IndexRow(
        key=f"assumed-{number}", source=source.name, media=source.media, shard="none",
        height_px=bucket.height_px, width_px=bucket.width_px, num_frames=frames, num_latents=(frames - 1) // 8 + 1,
        fps=0.0, caption="", num_text_tokens=num_text_tokens, offset_bytes=0, size_bytes=0, checksum="",
        source_height_px=bucket.height_px, source_width_px=bucket.width_px, source_num_frames=frames, source_fps=0.0,
    )  # fmt: skip
