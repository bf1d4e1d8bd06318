"""What an index of millions of records costs a rank: seconds until its first step is planned again, and memory.

The index is made up, column by column; there is no record behind it, and none is read. Each measurement is a fresh
process's, its imports left out.
"""

import resource
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow
import torch

from data_pipeline.cache_manifest import FORMAT_VERSION, NULL_PROMPT
from data_pipeline.index_table import FRAGMENT_COLUMNS, write_index_of
from data_pipeline.latent_cache import LatentCache
from data_pipeline.loader import LatentLoader
from data_pipeline.mixture import Cursor
from m4v_dist import storage, tensor_files
from m4v_dist.bench.loader_contestants import make_planner
from m4v_dist.bench.loader_subject import CASES, STRIDE, LoaderCase
from m4v_dist.bench.loader_times import in_fresh_process
from m4v_dist.bench.markdown import table

NUM_RECORDS = (1_000_000, 10_000_000)
_NUM_SLOTS = 256
_NUM_STEPS = 20
_SHARD_RECORDS = 1000


@dataclass(frozen=True)
class IndexTimes:
    """One size of index.

    Args:
        num_records: of it.
        index_bytes: size of the file.
        open_s: to open the cache.
        enter_s: to make the loader, load a state in mid-epoch, and enter the stage.
        plan_s: to plan the first step, of 256 slots.
        step_s: to plan each of the next ones.
        rss_bytes: growth of the process's resident memory by all of it, the most that was met after a step.
        private_bytes: the part of that which is no other process's as well.
    """

    num_records: int
    index_bytes: int
    open_s: float
    enter_s: float
    plan_s: float
    step_s: float
    rss_bytes: int
    private_bytes: int

    @property
    def resume_s(self) -> float:
        """From nothing to the first step's plan."""
        return self.open_s + self.enter_s + self.plan_s


def index_times(num_records: tuple[int, ...] = NUM_RECORDS) -> list[IndexTimes]:
    """Measure each size of index."""
    times = []
    for number in num_records:
        with tempfile.TemporaryDirectory() as folder:
            in_fresh_process(write_made_up_index, folder, number)
            times.append(in_fresh_process(_resume, folder, replace(CASES[0], num_records=number)))
    return times


def index_page(times: list[IndexTimes]) -> str:
    """The times and sizes as markdown."""
    rows = [
        [
            f"{row.num_records:,}", f"{row.index_bytes / 1e6:.0f}", f"{row.resume_s:.2f}", f"{row.open_s:.2f}",
            f"{row.enter_s:.2f}", f"{row.plan_s:.3f}", f"{row.step_s:.3f}", f"{row.rss_bytes / 2**20:.0f}",
            f"{row.private_bytes / 2**20:.0f}",
        ]
        for row in times
    ]  # fmt: skip
    heads = ["records", "index, MB", "resume, s", "open", "enter", "first plan", "next plans", "RSS growth, MiB"]
    return table([*heads, "private, MiB"], rows)


def write_made_up_index(folder: str, num_records: int) -> None:
    """Write the manifest and merged index of a cache of that many records, of which none is there."""
    case, numbers = CASES[0], np.arange(num_records)
    generator = np.random.default_rng(0)

    def repeated(value: int) -> np.ndarray:
        return np.full(num_records, value)

    keys = np.char.add("clip-of-a-large-corpus-", np.char.zfill(numbers.astype("U8"), 8))
    shards = np.char.add("vid-", np.arange(-(-num_records // _SHARD_RECORDS)).astype("U8"))
    columns = {
        "source": pyarrow.DictionaryArray.from_arrays(repeated(0).astype(np.int32), ["vid"]).cast(pyarrow.string()),
        "key": pyarrow.array(keys),
        "shard": pyarrow.DictionaryArray.from_arrays((numbers // _SHARD_RECORDS).astype(np.int32), shards).cast(
            pyarrow.string()
        ),
        "height_px": repeated(case.bucket.height_px),
        "width_px": repeated(case.bucket.width_px),
        "num_latents": generator.integers(1, case.latents[1] + 1, num_records),
        "offset_bytes": numbers % _SHARD_RECORDS * 1_400_000,
        "size_bytes": repeated(1_400_000),
        "checksum": pyarrow.array([generator.bytes(16).hex() for _ in range(num_records)]),
        "crc32": generator.integers(0, 2**32, num_records),
        # two captions each
        "num_text_tokens": _pairs(generator.integers(5, 128, 2 * num_records)),
        "caption_weights": _pairs(np.ones(2 * num_records)),
    }
    table = pyarrow.table({name: columns[name] for name in FRAGMENT_COLUMNS})
    manifest = {
        "format_version": FORMAT_VERSION, "fingerprint": {}, "spatial_stride": STRIDE, "null_prompt": NULL_PROMPT,
        "fragments": [], "sources": {"vid": {"media": "video"}}, "index": write_index_of(folder, [table], {}),
    }  # fmt: skip
    empty = {"tokens.0": torch.zeros(1, 4).bfloat16(), "pooled.0": torch.zeros(4)}
    tensor_files.write_tensors(storage.join(folder, NULL_PROMPT), empty)
    storage.write_json(storage.join(folder, "manifest.json"), manifest)


def _pairs(values: np.ndarray) -> pyarrow.ListArray:
    offsets = pyarrow.array(np.arange(0, len(values) + 1, 2, dtype=np.int32))
    return pyarrow.ListArray.from_arrays(offsets, pyarrow.array(values))


def _resume(folder: str, case: LoaderCase) -> IndexTimes:
    memory = _memory()
    started = time.perf_counter()
    cache = LatentCache.open(folder)
    opened = time.perf_counter()
    loader = LatentLoader(make_planner(cache, case, _NUM_SLOTS), rank=0, world_size=8)
    state = loader.state_dict()
    cursor = Cursor(epoch=3, position=case.num_records // 2)
    name = f"vid@{case.bucket.height_px}x{case.bucket.width_px}"
    loader.load_state_dict({**state, "next_step": 77, "cursors": {name: vars(cursor)}})
    loader.enter(0, 77)
    entered = time.perf_counter()
    loader.plan_ahead(1)
    planned = time.perf_counter()
    loader.plan_ahead(_NUM_STEPS)
    ended = time.perf_counter()
    peaks = [_memory()]
    for _ in range(_NUM_STEPS):
        loader.plan_ahead(1)
        peaks.append(_memory())
    grown = [max(values) - before for before, values in zip(memory, zip(*peaks, strict=True), strict=True)]
    return IndexTimes(
        num_records=case.num_records,
        index_bytes=cache.manifest["index"]["size_bytes"],
        open_s=opened - started,
        enter_s=entered - opened,
        plan_s=planned - entered,
        step_s=(ended - planned) / _NUM_STEPS,
        rss_bytes=grown[0],
        private_bytes=grown[1],
    )


def _memory() -> tuple[int, int]:
    """Resident bytes of this process, and those of them that are its own; the first is the peak where /proc is none."""
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return peak, peak
    values = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(values["VmRSS"].split()[0]) * 1024, int(values["RssAnon"].split()[0]) * 1024
