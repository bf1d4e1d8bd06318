"""`python -m jobs.check_codec`: cached clips beside their reconstruction, with PSNR, to `<run>/codec/`."""

import sys
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipeline.codec_check import CodecComparison, compare_source
from data_pipeline.decode import DecodeRule
from data_pipeline.latent_cache import LatentCache
from data_pipeline.manifest import list_shards
from jobs import cli
from m4v_dist import storage
from m4v_dist.config.schema import RunConfig, SourceSettings
from m4v_dist.frozen.video_file import write_mp4
from m4v_dist.frozen.video_vae import Codec, build_codec

SHOWN_PER_SOURCE = 3
"""Clips of each video source that are written as mp4; PSNR is measured on all."""


def check_codec(config: RunConfig, dry_run: bool) -> str:
    """Measure every cached video clip and write some of them side by side.

    Raises:
        DataError: no cache, a cache of another codec, or clips that are gone.
    """
    videos = [source for source in config.sources if source.media == "video"]
    folder = storage.join(config.run.folder, "codec")
    if dry_run:
        return f"would compare the clips of {', '.join(source.name for source in videos)} and write to {folder}"
    codec = build_codec(config.codec)
    cache = LatentCache.open(config.precompute.cache, codec.fingerprint())
    shown: list[dict[str, Any]] = []
    measured: dict[str, list[CodecComparison]] = {}
    for source in videos:
        comparisons = _compare(config, cache, codec, source)
        measured.setdefault(source.split, []).extend(comparisons)
        for comparison in comparisons[:SHOWN_PER_SOURCE]:
            file = f"{len(shown):02d}.mp4"
            pair = np.concatenate([comparison.frames, comparison.reconstruction], axis=2)  # t h (two w) c
            write_mp4(storage.join(folder, file), pair, comparison.row.fps)
            shown.append(_entry(comparison, file))
    bucket = config.precompute.buckets[0]
    means = {split: _mean(comparisons) for split, comparisons in sorted(measured.items())}
    result = {
        "codec": codec.name,
        "height_px": bucket.height_px,
        "width_px": bucket.width_px,
        "mean_psnr": means,
        "clips": shown,
    }
    storage.write_json(storage.join(folder, "codec.json"), result)
    figures = "; ".join(
        f"{split}: {mean['first_db']:.1f} dB first, {mean['later_db']:.1f} dB later frames, {mean['num_clips']} clips"
        for split, mean in means.items()
    )
    return f"{figures}; {len(shown)} pairs in {folder}"


def _compare(config: RunConfig, cache: LatentCache, codec: Codec, source: SourceSettings) -> list[CodecComparison]:
    precompute = config.precompute
    buckets = tuple((bucket.height_px, bucket.width_px) for bucket in precompute.buckets)
    rule = DecodeRule(buckets, precompute.num_frames, precompute.fps)
    shards = list_shards(source.shards)
    comparisons = compare_source(cache, source.name, shards, codec, rule, precompute.timeout_s)
    return list(tqdm(comparisons, desc=source.name, total=len(cache.rows(source.name)), unit="clip"))


def _entry(comparison: CodecComparison, file: str) -> dict[str, Any]:
    return {
        "file": file,
        "key": comparison.row.key,
        "source": comparison.row.source,
        "caption": comparison.row.caption,
        "psnr_first_db": comparison.psnr_first_db,
        "psnr_later_db": comparison.psnr_later_db,
    }


def _mean(comparisons: list[CodecComparison]) -> dict[str, float | int]:
    later = [comparison.psnr_later_db for comparison in comparisons if comparison.psnr_later_db is not None]
    first = [comparison.psnr_first_db for comparison in comparisons]
    return {"first_db": float(np.mean(first)), "later_db": float(np.mean(later)), "num_clips": len(comparisons)}


if __name__ == "__main__":
    sys.exit(cli.main("check_codec", check_codec, "Show what the codec keeps of the cached clips."))
