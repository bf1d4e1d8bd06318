"""A precompute in an object store that fails in three requests of ten, or stays down: in the end the cache is the same.

Minutes long, so no part of `make test`: python -m pytest -s -m chaos tests/chaos/test_precompute_store.py
"""

import threading
from pathlib import Path

import pytest

from m4v_dist import object_store, storage
from m4v_dist.errors import DataError
from tests.data_pipeline.copied_shards import CopiedShards, remote_files_of
from tests.data_pipeline.run_here import run_here
from tests.faulty_object_store import faulty_object_store, short_pauses
from tests.object_store_server import object_store as sound_object_store

pytestmark = [pytest.mark.chaos, pytest.mark.slow]


@pytest.mark.parametrize(
    ("kind", "faults"),
    [
        ("errors", {"error_fraction": 0.3}),
        ("cuts", {"cut_fraction": 0.3}),
        ("silences", {"silent": tuple(range(20, 500, 20)), "silence_s": 3.0}),
        ("errors", {"error_fraction": 0.1, "cut_fraction": 0.1, "silent": (40,), "silence_s": 3.0}),
    ],
)
def test_a_store_that_fails_often_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, faults: dict[str, object]
) -> None:
    shards = CopiedShards(tmp_path, num_shards=6)
    shards.write()
    # raw shards are read in many requests, as large ones are
    monkeypatch.setattr(storage, "_READ_BYTES", 4096)
    with faulty_object_store(monkeypatch, **faults) as (bucket, done):
        run_here(shards.plan(f"{bucket}/cache", shards.upload(bucket)))
        assert remote_files_of(f"{bucket}/cache") == shards.undisturbed()
        print(dict(done.num))
        assert done.num[kind] >= 5, done.num


def test_a_store_that_stays_down_fails_the_job_and_a_rerun_does_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = CopiedShards(tmp_path, num_shards=3)
    shards.write()
    with sound_object_store(monkeypatch) as (bucket, outage), short_pauses(monkeypatch):
        raw = shards.upload(bucket)
        monkeypatch.setattr(object_store, "RETRY_LIMIT_S", 1.0)
        outage.begin_at("clips-001.tar", 2.0, 10**6)
        # nor can it be asked whether the lease is still held, which would say more
        with pytest.raises(
            DataError, match=r"shards .*\(clips-001: OSError: .*Service Unavailable .*http://127.*clips-00"
        ):
            run_here(shards.plan(f"{bucket}/cache", raw))
        outage._min_refused, outage._until = 0, 0.0
        # what gives the lease back still asks; in a job of its own it would have ended with it
        for thread in threading.enumerate():
            if thread.name in {"lease", "the lease"}:
                thread.join()
        assert storage.list_folder(f"{bucket}/cache/index") == ["clips-000.parquet"]
        assert not storage.exists(f"{bucket}/cache/manifest.json")
        report = run_here(shards.plan(f"{bucket}/cache", raw, lease_timeout_s=1)).report
        assert report["num_shards_this_run"] == 2 and remote_files_of(f"{bucket}/cache") == shards.undisturbed()
