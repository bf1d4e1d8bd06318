"""`python -m jobs.benchmark data`: the data pipeline timed beside its peers, part by part, each in one run."""

import sys
from collections.abc import Callable, Iterator

from data_pipeline.decode import IMAGE_KINDS
from data_pipeline.manifest import list_shards
from data_pipeline.pack import ShardDamage, read_shard
from data_pipeline.precompute_plan import PrecomputePlan
from m4v_dist.bench.decode_times import decode_page, decode_times
from m4v_dist.bench.index_times import index_page, index_times
from m4v_dist.bench.loader_times import loader_page, loader_times
from m4v_dist.bench.precompute_times import precompute_page, precompute_times
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import DataError
from m4v_dist.launch.ray_session import ray_session


def data(config: RunConfig, dry_run: bool) -> str:
    """Time the parts that are asked for, and print a table of each.

    Raises:
        DataError: the sources hold no video.
    """
    parts: dict[str, Callable[[RunConfig], str]] = {
        "decode": decode, "precompute": precompute, "loader": loader, "index": index,
    }  # fmt: skip
    names = config.benchmark.data_parts
    if dry_run:
        return f"dry run: would time {', '.join(names)}"
    for name in names:
        sys.stdout.write(f"## {name}\n\n{parts[name](config)}\n\n")
    return f"timed {', '.join(names)}"


def decode(config: RunConfig) -> str:
    """Decoders on the videos of the sources, to the buckets of the precompute."""
    media = _some_videos(config)
    buckets = tuple((bucket.height_px, bucket.width_px) for bucket in config.precompute.buckets)
    times = decode_times(media, buckets, num_rounds=config.benchmark.num_rounds)
    sizes = ", ".join(f"{height} x {width}" for height, width in buckets)
    return f"{len(media)} clips to {sizes} px, one thread.\n\n{decode_page(times)}"


def precompute(config: RunConfig) -> str:
    """The precompute of `benchmark.num_clips` clips beside a bare loop, on `benchmark.worker_counts` cores."""
    plan = PrecomputePlan(config.sources, config.precompute, config.codec, config.text_encoder)
    times = precompute_times(
        _some_videos(config),
        plan,
        lambda: ray_session(config.launch, has_workers=False),
        num_clips=config.benchmark.num_clips,
        worker_counts=config.benchmark.worker_counts or (1, 2),
    )
    return precompute_page(times)


def loader(config: RunConfig) -> str:
    """Ours beside other loaders, on made-up records of two sizes, from a disk and from a local object store."""
    return loader_page(loader_times())


def index(config: RunConfig) -> str:
    """Resuming on made-up indexes of a million and of ten million records, and their memory."""
    return index_page(index_times())


def _some_videos(config: RunConfig) -> list[tuple[bytes, str]]:
    media = list(_videos(config))
    if not media:
        raise DataError("sources hold no video clip to time anything with; pack some, or name other shards.")
    return media


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
