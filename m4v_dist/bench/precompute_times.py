"""The precompute timed beside a bare loop that decodes, encodes and writes the same clips on the same cores.

N actors against N plain processes of one thread each, both pinned to the same N cores; Ray's own processes, the driver
and the decoder children get no more. The loop reads a shard, decodes in its own process, encodes, and writes
safetensors into a tar: no index, no checksum, nothing read back, no retry. Start-up is taken out of both and stated:
the clock runs from when every worker is up and asked for its first shard to the end of the last one.
"""

import io
import json
import multiprocessing
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.actor_memory import CALLS_PER_ACTOR
from data_pipeline.captions import Caption
from data_pipeline.decode import decode_clip
from data_pipeline.encode import ClipEncoder
from data_pipeline.pack import RawClip, read_shard, write_shards
from data_pipeline.pipeline import run_precompute
from data_pipeline.precompute_plan import PrecomputePlan, ShardTask
from data_pipeline.precompute_progress import BadLimit, DoneShards, collect
from data_pipeline.ray_pool import ActorPool, run_on_ray
from data_pipeline.shard_actor import ShardActor
from m4v_dist import tensor_files
from m4v_dist.bench.markdown import table
from m4v_dist.errors import ConfigError
from m4v_dist.lease import Lease

CLIPS_PER_SHARD = 25
_START_LIMIT_S = 300.0


@dataclass(frozen=True)
class PrecomputeTimes:
    """One number of workers.

    Args:
        num_workers: actors, or plain processes; and cores.
        num_clips: of each.
        bare_s, precompute_s: wall time without start-up.
        start_s: from the job's begin to its actors' first shard: Ray, and the actors' imports and encoders.
        seconds_in: where the actors' time went, see report.json.
    """

    num_workers: int
    num_clips: int
    bare_s: float
    precompute_s: float
    start_s: float
    seconds_in: dict[str, float]


def precompute_times(
    media: Sequence[tuple[bytes, str]],
    plan: PrecomputePlan,
    session: Callable[[], AbstractContextManager[object]],
    *,
    num_clips: int,
    worker_counts: Sequence[int],
) -> list[PrecomputeTimes]:
    """Time both, for each number of workers.

    Args:
        media: (bytes, kind) of sound videos, repeated until there are enough.
        plan: sizes, rates and encoders; its sources and cache are replaced.
        session: starts Ray on this machine, see `run_precompute`; it inherits the pinned cores.
        num_clips: clips of each run.
        worker_counts: of actors, each with as many cores.

    Raises:
        ConfigError: there are fewer cores.
    """
    with tempfile.TemporaryDirectory(prefix="precompute-times-") as folder:
        chosen = (media[number % len(media)] for number in range(num_clips))
        clips = (RawClip(f"clip{n:06d}", kind, data, (Caption(f"clip {n}"),)) for n, (data, kind) in enumerate(chosen))
        paths = write_shards(clips, f"{folder}/raw/%05d.tar", CLIPS_PER_SHARD)
        return [_times(plan, session, folder, paths, num_clips, count) for count in worker_counts]


def precompute_page(times: Sequence[PrecomputeTimes]) -> str:
    """Clips a second, the ratio to the bare loop, and the scaling from the first row, as markdown."""
    first = times[0]
    rows = [
        [
            str(row.num_workers), str(row.num_clips), f"{row.num_clips / row.bare_s:.2f}",
            f"{row.num_clips / row.precompute_s:.2f}", f"{row.precompute_s / row.bare_s:.3f}",
            f"{first.precompute_s / row.precompute_s:.2f}", f"{first.bare_s / row.bare_s:.2f}", f"{row.start_s:.1f}",
            ", ".join(f"{name.removesuffix('_s')} {value:.1f}" for name, value in sorted(row.seconds_in.items())),
        ]
        for row in times
    ]  # fmt: skip
    head = [
        "workers = cores", "clips", "bare clips/s", "precompute clips/s", "time over bare", "scaling", "bare scaling",
        "start-up s", "actors' seconds",
    ]  # fmt: skip
    return table(head, rows)


def _times(
    plan: PrecomputePlan, session: Callable[[], AbstractContextManager[object]], folder: str, paths: list[str],
    num_clips: int, num_workers: int,
) -> PrecomputeTimes:  # fmt: skip
    source = plan.sources[0].model_copy(
        update={"name": "timed", "shards": f"{folder}/raw/{{{_range(len(paths))}}}.tar", "media": "video"}
    )
    settings = {"cache": f"{folder}/cache{num_workers}", "num_actors": num_workers, "min_actors": None}
    plan = replace(
        plan, sources=(source,), precompute=plan.precompute.model_copy(update={**settings, "cpus_per_actor": 1.0})
    )
    with _cores(num_workers):
        bare_s, num_bare = _time_bare(plan, paths, num_workers)
        started = time.time()
        begun: list[float] = []
        ended: list[float] = []

        def run(plan: PrecomputePlan, pending: list[ShardTask], lease: Lease, limit: BadLimit) -> DoneShards:
            return collect(
                _rows(plan, pending, lease, f"{folder}/ready{num_workers}", begun, ended), len(pending), limit
            )

        report = run_precompute(plan, session, run).report
    if not report["kept"] == num_bare == num_clips:
        raise ConfigError(f"of {num_clips} clips {num_bare} and {report['kept']} were kept; time sound clips only.")
    return PrecomputeTimes(
        num_workers, num_clips, bare_s, max(ended) - min(begun), min(begun) - started, report["seconds_in"]
    )


def _range(count: int) -> str:
    return f"00000..{count - 1:05d}" if count > 1 else "00000,"


@contextmanager
def _cores(count: int) -> Iterator[None]:
    """Pin this thread, and whatever it starts, to the first cores."""
    all_cores = os.sched_getaffinity(0)
    if len(all_cores) < count:
        raise ConfigError(f"{count} workers want {count} cores, but there are {len(all_cores)}; time fewer.")
    os.sched_setaffinity(0, set(sorted(all_cores)[:count]))
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_cores)


class TimedActor(ShardActor):
    """A `ShardActor` that waits with its first shard until all are up, and says when each began and ended.

    Args:
        plan, lease: see `ShardActor`.
        ready: folder with a file for each actor that is up.
    """

    def __init__(self, plan: PrecomputePlan, lease: Lease, ready: str) -> None:
        super().__init__(plan, lease)
        self._ready, self._num_actors = Path(ready), plan.precompute.num_actors
        self._ready.mkdir(exist_ok=True)
        (self._ready / str(os.getpid())).touch()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        _await(self._ready, self._num_actors)
        begun = time.time()
        rows = super().__call__(batch)
        return rows | {"begun": [begun], "ended": [time.time()]}


def _rows(
    plan: PrecomputePlan, pending: list[ShardTask], lease: Lease, ready: str, begun: list[float], ended: list[float]
) -> Iterator[Any]:
    pool = ActorPool.of(plan.precompute, CALLS_PER_ACTOR)
    for row in run_on_ray(TimedActor, (plan, lease, ready), [json.dumps(asdict(task)) for task in pending], pool):
        begun.append(row["begun"])
        ended.append(row["ended"])
        yield row


def _await(ready: Path, count: int) -> None:
    deadline = time.monotonic() + _START_LIMIT_S
    while len(os.listdir(ready)) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{ready}: {os.listdir(ready)} of {count} workers were up after {_START_LIMIT_S:g} s")
        time.sleep(0.01)


def _time_bare(plan: PrecomputePlan, paths: list[str], num_workers: int) -> tuple[float, int]:
    """Wall time of the loop over all shards, shared out in turn, and the clips that it wrote."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="bare-") as folder, context.Pool(num_workers) as pool:
        shares = [(plan, paths[number::num_workers], folder, num_workers) for number in range(num_workers)]
        found = pool.map(_bare_loop, shares, chunksize=1)
    return max(end for _, end, _ in found) - min(begin for begin, _, _ in found), sum(count for _, _, count in found)


def _bare_loop(share: tuple[PrecomputePlan, list[str], str, int]) -> tuple[float, float, int]:
    """One process: when it began and ended, and the clips that it wrote."""
    import torch

    from m4v_dist.frozen.text_encoder import build_text_encoder
    from m4v_dist.frozen.video_vae import build_codec

    plan, paths, folder, num_workers = share
    torch.set_num_threads(1)
    rule = plan.decode_rule(plan.sources[0].name)
    encoder = ClipEncoder(build_codec(plan.codec), build_text_encoder(plan.text_encoder), "cpu")
    ready = Path(folder, "ready")
    ready.mkdir(exist_ok=True)
    (ready / str(os.getpid())).touch()
    _await(ready, num_workers)
    begun, count = time.time(), 0
    for path in paths:
        with tarfile.open(Path(folder, Path(path).name), "w") as tar:
            for raw in read_shard(path):
                assert isinstance(raw, RawClip)
                encoded = encoder.encode(decode_clip(raw.data, str(raw.kind), rule), [raw.captions[0].text], raw.key)
                (text,) = encoded.texts
                tensors = {"latents": encoded.latents, "tokens": text.tokens, "pooled": text.pooled}
                data = tensor_files.tensors_to_bytes(tensors)
                member = tarfile.TarInfo(f"{raw.key}.safetensors")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
                count += 1
    return begun, time.time(), count
