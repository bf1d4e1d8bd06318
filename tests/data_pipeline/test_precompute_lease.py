"""Two precomputes on one cache: the second is refused, a dead one succeeded, and one that was overtaken fenced off."""

import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.cache_manifest import index_path, read_manifest
from data_pipeline.pipeline import run_precompute
from data_pipeline.precompute_plan import PrecomputePlan, ShardTask
from data_pipeline.precompute_progress import BadLimit, DoneShards
from m4v_dist import storage
from m4v_dist.errors import DataError, JobError, RunInUseError
from m4v_dist.lease import Holder, Lease, claim, newest_lease
from tests.data_pipeline.copied_shards import CopiedShards, files_of
from tests.data_pipeline.run_here import run_here, run_shards
from tests.data_pipeline.test_pipeline import no_session
from tests.object_store_server import object_store

ELSEWHERE = Holder("other", "gpu-7", "", 4321)
"""A job whose process cannot be seen from here."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> CopiedShards:
    shards = CopiedShards(tmp_path_factory.mktemp("shards"), num_shards=3)
    shards.write()
    return shards


def _lapsed(cache: str, lease: Lease) -> None:
    """Make a lease's heartbeat look as if it had stopped two hours ago."""
    old = replace(lease, heartbeat=time.time() - 7200)
    storage.write_json(f"{cache}/leases/lease_{lease.number:04d}.json", old.to_json())


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_second_job_is_refused_until_the_first_is_over_or_silent(
    shards: CopiedShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    with object_store(monkeypatch) as (bucket, _):
        cache = str(tmp_path / "cache") if place == "local" else f"{bucket}/cache"
        lease = claim(cache, ELSEWHERE, above=0, timeout_s=1.0)
        with pytest.raises(
            RunInUseError,
            match=r"is in use by attempt 1 of process 4321 on gpu-7, since 2.*lease_timeout_s=3600,",
        ) as caught:
            run_precompute(shards.plan(cache, lease_timeout_s=3600), no_session)
        assert caught.value.exit_code == 2
        assert storage.list_folder(cache) == ["leases"]
        _lapsed(cache, lease)
        # it is watched for a moment, then succeeded without help
        plan = shards.plan(cache, lease_timeout_s=1)
        assert run_here(plan).report["kept"] == 3
        # a job that ended keeps nobody out, whatever its time, and one that has nothing to do asks nobody
        claim(cache, ELSEWHERE, above=0, timeout_s=60.0)
        assert run_here(plan).did_nothing


def test_a_job_that_was_killed_on_this_machine_is_succeeded_at_once(shards: CopiedShards, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    claim(cache, replace(Holder.of_this_process(), pid=process.pid), above=0, timeout_s=3600.0)
    assert run_here(shards.plan(cache, lease_timeout_s=3600)).report["kept"] == 3


def test_a_job_that_was_overtaken_commits_no_shard_and_no_manifest(shards: CopiedShards, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")

    def overtaken_after_one(
        plan: PrecomputePlan, pending: list[ShardTask], lease: Lease, limit: BadLimit
    ) -> DoneShards:
        """As if this process had been stopped for hours behind its first shard."""
        done = run_shards(plan, pending[:1], lease, limit)
        _lapsed(cache, lease)
        claim(cache, ELSEWHERE, above=0, timeout_s=1.0)
        run_shards(plan, pending[1:], lease, limit)
        return done

    with pytest.raises(RunInUseError, match=r"attempt 1 has lost its lease to attempt 2 .*gpu-7"):
        run_precompute(shards.plan(cache), nullcontext, overtaken_after_one)
    assert storage.list_folder(f"{cache}/index") == ["clips-000.parquet"]
    assert read_manifest(cache) is None and not storage.exists(f"{cache}/report.json")
    newest = newest_lease(cache)
    assert newest is not None and newest.holder == ELSEWHERE and not newest.is_released


def test_a_worker_that_is_overtaken_while_it_encodes_writes_nothing(
    shards: CopiedShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its question before the shard was answered in time; the one before the tar is placed is not."""
    cache = str(tmp_path / "cache")
    from data_pipeline import shard_actor

    encode = shard_actor.ClipEncoder.encode

    def overtaken(*arguments: object) -> object:
        lease = newest_lease(cache)
        assert lease is not None
        if lease.holder != ELSEWHERE:
            _lapsed(cache, lease)
            claim(cache, ELSEWHERE, above=0, timeout_s=1.0)
        return encode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(shard_actor.ClipEncoder, "encode", overtaken)
    with pytest.raises(RunInUseError, match="has lost its lease"):
        run_here(shards.plan(cache))
    assert storage.list_folder(f"{cache}/index") == storage.list_folder(f"{cache}/shards") == []


@pytest.mark.parametrize("harm", ["tar", "fragment"])
def test_what_another_job_wrote_under_this_ones_name_is_found_before_the_manifest(
    shards: CopiedShards, tmp_path: Path, harm: str
) -> None:
    """An upload that began before its job was overtaken, and ended after."""
    cache = str(tmp_path / "cache")

    def harmed(plan: PrecomputePlan, pending: list[ShardTask], lease: Lease, limit: BadLimit) -> DoneShards:
        done = run_shards(plan, pending, lease, limit)
        if harm == "tar":
            storage.write_bytes(f"{cache}/shards/clips-001.tar", b"of other settings" * 1000)
        else:
            other = shards.plan(str(tmp_path / "other"), fps=6.0)
            run_here(other)
            storage.write_bytes(
                index_path(cache, "clips-001"), storage.read_bytes(index_path(f"{tmp_path}/other", "clips-001"))
            )
        return done

    with pytest.raises(DataError, match=r"clips-001.tar: .*another job wrote here. Remove .*clips-001.parquet"):
        run_precompute(shards.plan(cache), nullcontext, harmed)
    assert read_manifest(cache) is None
    storage.remove(index_path(cache, "clips-001"))
    run_here(shards.plan(cache))
    assert files_of(tmp_path / "cache") == shards.undisturbed()


def test_a_job_that_fails_gives_its_lease_back(shards: CopiedShards, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    with pytest.raises(JobError, match="max_bad_fraction"):
        run_here(shards.plan(cache, max_bad_fraction=0.1))
    lease = newest_lease(cache)
    assert lease is not None and lease.is_released
    assert run_here(shards.plan(cache)).report["kept"] == 3
