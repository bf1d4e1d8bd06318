"""`python -m jobs.benchmark data`: the data pipeline timed beside its peers, part by part, each in one run."""

import sys
from collections.abc import Callable, Iterator

from data_pipeline.decode import IMAGE_KINDS
from data_pipeline.manifest import list_shards
from data_pipeline.pack import ShardDamage, read_shard
from m4v_dist.bench.decode_times import decode_page, decode_times
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import DataError


def data(config: RunConfig, dry_run: bool) -> str:
    """Time the parts that are asked for, and print a table of each.

    Raises:
        DataError: the sources hold no video.
    """
    parts: dict[str, Callable[[RunConfig], str]] = {"decode": decode}
    names = config.benchmark.data_parts
    if dry_run:
        return f"dry run: would time {', '.join(names)}"
    for name in names:
        sys.stdout.write(f"## {name}\n\n{parts[name](config)}\n\n")
    return f"timed {', '.join(names)}"


def decode(config: RunConfig) -> str:
    """Decoders on the videos of the sources, to the buckets of the precompute."""
    media = list(_videos(config))
    if not media:
        raise DataError("sources hold no video clip to time a decoder with; pack some, or name other shards.")
    buckets = tuple((bucket.height_px, bucket.width_px) for bucket in config.precompute.buckets)
    times = decode_times(media, buckets, num_rounds=config.benchmark.num_rounds)
    sizes = ", ".join(f"{height} x {width}" for height, width in buckets)
    return f"{len(media)} clips to {sizes} px, one thread.\n\n{decode_page(times)}"


def _videos(config: RunConfig) -> Iterator[tuple[bytes, str]]:
    """The first `benchmark.num_clips` videos of the sources."""
    left = config.benchmark.num_clips
    for source in config.sources:
        if source.media != "video":
            continue
        for path in list_shards(source.shards):
            for raw in read_shard(path):
                if isinstance(raw, ShardDamage) or raw.kind is None or raw.kind in IMAGE_KINDS:
                    continue
                if left == 0:
                    return
                left -= 1
                yield raw.data, raw.kind
