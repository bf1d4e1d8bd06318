"""kill -9 of a worker, then of the driver, in the middle: only uncommitted shards are redone, and nothing is lost."""

import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.chaos.nodes import driver, wait_for
from tests.data_pipeline.copied_shards import CopiedShards, files_of
from tests.data_pipeline.run_here import run_here
from tests.ray_environment import ray_environment
from tests.trainer.ranks import ROOT


def _committed(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (cache / "index").glob("*.parquet")}


def _workers(job: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """Actors of a job's own Ray: processes that have decoder children."""
    found = []
    for process in psutil.Process(job.pid).children(recursive=True):
        try:
            if any("data_pipeline.decoder" in " ".join(child.cmdline()) for child in process.children()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.chaos
def test_kill_9_of_worker_and_driver_costs_uncommitted_shards_only(tmp_path: Path) -> None:
    shards = CopiedShards(tmp_path, num_shards=16)
    shards.write()
    cache, log = tmp_path / "cache", tmp_path / "log"
    config = shards.config(str(cache))
    with ray_environment() as (_, env):
        env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with driver(config, env, log, module=("jobs.precompute_latents",)) as job:
            wait_for("two shards", lambda: len(_committed(cache)) >= 2 and _workers(job), job, log)
            (worker,) = _workers(job)
            worker.send_signal(signal.SIGKILL)
            before = len(_committed(cache))
            wait_for("two more from the worker's successor", lambda: len(_committed(cache)) >= before + 2, job, log)
            descendants = psutil.Process(job.pid).children(recursive=True)
            job.send_signal(signal.SIGKILL)
            job.wait()
        committed = _committed(cache)
        assert len(committed) < shards.num_shards and not (cache / "manifest.json").exists()
        # at once, while processes of the killed one may still be there; its lease is seen to be nobody's
        again = run_here(shards.plan(str(cache)))
        # Ray's agents outlive their raylet by a minute
        for process in descendants:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    after = _committed(cache)
    left_behind = {name for name in committed if after[name] != committed[name]}
    assert not left_behind, "committed shards were done again"
    assert again.report["kept"] == shards.num_shards and len(again.report["quarantined"]) == shards.num_shards
    assert 0 < again.report["num_shards_this_run"] <= shards.num_shards - len(committed)
    assert files_of(cache) == shards.undisturbed()
