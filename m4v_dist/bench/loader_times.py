"""How fast loaders hand out the same records from a local disk and from an object store, side by side in one run.

Every contestant runs in a fresh process, with each number of workers, in turn within each round; its best number
counts. Records and bytes a second are of the whole epoch, its first batch included. The object store is moto's server
in a process of its own: slow, and equally so for all.
"""

import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TypeVar

from m4v_dist import storage
from m4v_dist.bench.loader_contestants import CONTESTANTS, Task, check_is_whole, has_streaming, write_mds
from m4v_dist.bench.loader_subject import CASES, LoaderCase, upload, write_cache, write_raw_files
from m4v_dist.bench.markdown import table
from m4v_dist.errors import ConfigError

_BUCKET = "benchmark"

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class LoaderTimes:
    """One contestant on one case and storage.

    Args:
        place: local disk or S3.
        case: name of the records.
        name: of the contestant.
        num_workers: that was its best.
        first_batch_s: from a running process with its imports to the first batch.
        records_per_s, mb_per_s: of a whole epoch; 1e6 bytes.
    """

    place: str
    case: str
    name: str
    num_workers: int
    first_batch_s: float
    records_per_s: float
    mb_per_s: float


def loader_times(
    cases: Sequence[LoaderCase] = CASES,
    *,
    num_rounds: int = 3,
    workers: Sequence[int] = (0, 1, 2),
    batch_size: int = 8,
    with_store: bool = True,
) -> list[LoaderTimes]:
    """Time all contestants that are installed.

    Args:
        cases: what they read.
        num_rounds: epochs that each does, of which the median counts.
        workers: numbers of worker processes that are tried.
        batch_size: records.
        with_store: an object store too.

    Raises:
        ConfigError: an object store is asked for, and moto is not installed.
    """
    times = []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            _write_all(case, folder)
            times += _times_at("local disk", case, folder, "", num_rounds, workers, batch_size)
            if with_store:
                with moto_server() as endpoint:
                    remote = f"s3://{_BUCKET}/{os.path.basename(folder)}"
                    upload(folder, remote)
                    http = f"{endpoint}/{remote.removeprefix('s3://')}"
                    times += _times_at("S3 (moto)", case, remote, http, num_rounds, workers, batch_size)
    return times


def loader_page(times: Sequence[LoaderTimes]) -> str:
    """The times, and ours over the best of the others, as markdown."""
    rows = []
    for row in times:
        others = [
            other.records_per_s for other in times
            if (other.place, other.case) == (row.place, row.case) and other.name != "ours"
        ]  # fmt: skip
        ratio = f"{row.records_per_s / max(others):.2f}" if row.name == "ours" and others else ""
        rows.append([
            row.place, row.case, row.name, str(row.num_workers), f"{row.first_batch_s:.2f}", f"{row.records_per_s:.0f}",
            f"{row.mb_per_s:.0f}", ratio,
        ])  # fmt: skip
    left_out = "" if has_streaming() else "\n\nLeft out: mosaicml-streaming is not installed."
    heads = ["from", "records", "loader", "workers", "first batch, s", "records/s", "MB/s", "over the best other"]
    return table(heads, rows) + left_out


def _write_all(case: LoaderCase, folder: str) -> None:
    write_cache(case, f"{folder}/cache")
    write_raw_files(case, f"{folder}/raw")
    if has_streaming():
        write_mds(case, f"{folder}/mds")


def _times_at(
    place: str, case: LoaderCase, folder: str, http: str, num_rounds: int, workers: Sequence[int], batch_size: int
) -> list[LoaderTimes]:
    names = [name for name in CONTESTANTS if name != "mosaicml-streaming" or has_streaming()]
    found: dict[tuple[str, int], list[tuple[float, float, int]]] = {}
    for _ in range(num_rounds):
        for num_workers in workers:
            for name in names:
                with tempfile.TemporaryDirectory() as scratch:
                    task = Task(case, folder, scratch, http, num_workers, batch_size)
                    found.setdefault((name, num_workers), []).append(in_fresh_process(_one_epoch, name, task))
    times = []
    for name in names:
        best = min(workers, key=lambda number: statistics.median(seconds for _, seconds, _ in found[name, number]))
        rounds = found[name, best]
        seconds, num_bytes = statistics.median(s for _, s, _ in rounds), rounds[0][2]
        first = statistics.median(first for first, _, _ in rounds)
        num_records = case.num_records // batch_size * batch_size
        times.append(LoaderTimes(place, case.name, name, best, first, num_records / seconds, num_bytes / 1e6 / seconds))
    return times


def _one_epoch(name: str, task: Task) -> tuple[float, float, int]:
    """Seconds to the first batch and to the last, and bytes, of one contestant."""
    # the peers' default; a process that was spawned would spawn its workers too, slowly
    multiprocessing.set_start_method("fork", force=True)
    started = time.perf_counter()
    first, num_bytes = 0.0, 0
    for batch in CONTESTANTS[name](task):
        first = first or time.perf_counter() - started
        num_bytes += check_is_whole(batch, task.case)
    return first, time.perf_counter() - started, num_bytes


def in_fresh_process(function: Callable[..., Answer], *arguments: object) -> Answer:
    """What a function of a module returns in a new interpreter, which may start processes of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@contextmanager
def moto_server() -> Iterator[str]:
    """An object store in a process of its own, in this process's environment; yields its address.

    Raises:
        ConfigError: moto is not installed.
    """
    if find_spec("moto") is None:
        raise ConfigError(
            "the loader's benchmark on an object store needs moto; install the dev extra, or leave it out."
        )
    with tempfile.NamedTemporaryFile() as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            endpoint = _endpoint_of(server, log.name)
            with _environment({
                "AWS_ENDPOINT_URL": endpoint, "S3_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "an-access-key-id",
                "AWS_SECRET_ACCESS_KEY": "a-secret-access-key", "AWS_DEFAULT_REGION": "us-east-1",
            }):  # fmt: skip
                subprocess.run(["curl", "-sf", "-X", "PUT", f"{endpoint}/{_BUCKET}"], check=True, stdout=log)
                yield endpoint
        finally:
            server.kill()
            server.wait()


def _endpoint_of(server: "subprocess.Popen[bytes]", log: str) -> str:
    while server.poll() is None:
        found = re.search(rb"Running on (http://\S+)", storage.read_bytes(log))
        if found:
            return found.group(1).decode()
        time.sleep(0.1)
    raise RuntimeError(f"moto's server ended at once: {storage.read_bytes(log).decode(errors='replace')[-500:]}")


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
