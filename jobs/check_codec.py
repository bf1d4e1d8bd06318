"""`python -m jobs.check_codec`: cached clips beside their reconstruction, with PSNR, to `<run>/codec/`."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipeline.codec_check import CodecComparison, compare_source
from data_pipeline.decode import DecodeRule
from data_pipeline.latent_cache import LatentCache
from data_pipeline.manifest import list_shards
from jobs import cli
from m4v_dist import storage
from m4v_dist.config.data_settings import SourceSettings
from m4v_dist.config.schema import RunConfig
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
    measured: list[Measured] = []
    for source in videos:
        for number, comparison in enumerate(_compare(config, cache, codec, source)):
            measured.append(
                Measured(
                    source.split,
                    comparison.row.height_px,
                    comparison.row.width_px,
                    comparison.psnr_first_db,
                    comparison.psnr_later_db,
                )
            )
            if number < SHOWN_PER_SOURCE:
                file = f"{len(shown):02d}.mp4"
                pair = np.concatenate([comparison.frames, comparison.reconstruction], axis=2)  # t h (two w) c
                write_mp4(storage.join(folder, file), pair, comparison.row.fps)
                shown.append(_entry(comparison, file))
    means = mean_psnr(measured, [source.split for source in videos])
    storage.write_json(storage.join(folder, "codec.json"), {"codec": codec.name, "mean_psnr": means, "clips": shown})
    return f"{'; '.join(map(_describe, means))}; {len(shown)} pairs in {folder}"


@dataclass(frozen=True)
class Measured:
    """PSNR of one clip: `later_db` is None for a still."""

    split: str
    height_px: int
    width_px: int
    first_db: float
    later_db: float | None


def mean_psnr(measured: Sequence[Measured], splits: Sequence[str]) -> list[dict[str, Any]]:
    """Mean PSNR of each split and size; a split without clips has one entry, and what was not measured is None."""
    rows: list[dict[str, Any]] = []
    for split in sorted(set(splits)):
        sizes = sorted({(clip.height_px, clip.width_px) for clip in measured if clip.split == split})
        no_size: list[tuple[int | None, int | None]] = [(None, None)]
        for height_px, width_px in sizes or no_size:
            clips = [c for c in measured if (c.split, c.height_px, c.width_px) == (split, height_px, width_px)]
            rows.append(
                {
                    "split": split,
                    "height_px": height_px,
                    "width_px": width_px,
                    "num_clips": len(clips),
                    "first_db": _mean([clip.first_db for clip in clips]),
                    "later_db": _mean([clip.later_db for clip in clips if clip.later_db is not None]),
                }
            )
    return rows


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _describe(mean: dict[str, Any]) -> str:
    if not mean["num_clips"]:
        return f"{mean['split']}: no clips"
    first, later = ("not measured" if db is None else f"{db:.1f} dB" for db in (mean["first_db"], mean["later_db"]))
    size = f"{mean['height_px']} x {mean['width_px']} px"
    return f"{mean['split']}, {size}: {first} first, {later} later frames, {mean['num_clips']} clips"


def _compare(config: RunConfig, cache: LatentCache, codec: Codec, source: SourceSettings) -> Iterator[CodecComparison]:
    precompute = config.precompute
    buckets = tuple((bucket.height_px, bucket.width_px) for bucket in precompute.buckets)
    rule = DecodeRule(
        buckets, precompute.num_frames, precompute.fps, precompute.decoder, int(precompute.max_decode_gib * 2**30)
    )
    comparisons = compare_source(cache, source.name, list_shards(source.shards), codec, rule, precompute.timeout_s)
    yield from tqdm(comparisons, desc=source.name, total=len(cache.rows(source.name)), unit="clip")


def _entry(comparison: CodecComparison, file: str) -> dict[str, Any]:
    return {
        "file": file,
        "key": comparison.row.key,
        "source": comparison.row.source,
        "caption": comparison.row.captions[0],
        "height_px": comparison.row.height_px,
        "width_px": comparison.row.width_px,
        "psnr_first_db": comparison.psnr_first_db,
        "psnr_later_db": comparison.psnr_later_db,
    }


if __name__ == "__main__":
    sys.exit(cli.main("check_codec", check_codec, "Show what the codec keeps of the cached clips."))
