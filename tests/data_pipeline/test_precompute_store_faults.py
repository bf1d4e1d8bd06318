"""A precompute whose shards and cache are in an object store that fails: the cache is the one made without faults."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline import shard_actor
from m4v_dist import storage
from m4v_dist.errors import DataError, StoreError
from tests.data_pipeline.copied_shards import CopiedShards, remote_files_of
from tests.data_pipeline.run_here import run_here
from tests.faulty_object_store import killable_object_store
from tests.object_store_server import object_store as sound_object_store

NUM_SHARDS = 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> CopiedShards:
    shards = CopiedShards(tmp_path_factory.mktemp("shards"), NUM_SHARDS)
    shards.write()
    return shards


@pytest.fixture(scope="module")
def undisturbed(shards: CopiedShards) -> dict[str, bytes]:
    return shards.undisturbed()


@pytest.fixture
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw shards are read in many requests, as large ones are."""
    monkeypatch.setattr(storage, "_READ_BYTES", 4096)


def test_a_server_that_is_killed_and_comes_back_changes_nothing(
    shards: CopiedShards, undisturbed: dict[str, bytes], small_reads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killable_object_store(monkeypatch) as (bucket, front):
        raw = shards.upload(bucket)
        encode, restarts = shard_actor.ClipEncoder.encode, []

        def encode_and_kill(*arguments: object) -> object:
            """Twice, in the middle of a shard whose rest is being read; it is down when the tar is to be placed."""
            if front.num_kills < 2:
                front.kill()
                restarts.append(threading.Timer(1.0, front.start))
                restarts[-1].start()
            return encode(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(shard_actor.ClipEncoder, "encode", encode_and_kill)
        run_here(shards.plan(f"{bucket}/cache", raw))
        for restart in restarts:
            restart.join()
        assert front.num_kills == 2 and remote_files_of(f"{bucket}/cache") == undisturbed


@pytest.fixture
def refusing_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with sound_object_store(monkeypatch) as (bucket, outage):

        def refuse(environment: object, start_response: object) -> list[bytes]:
            start_response("403 Forbidden", [("Content-Type", "application/xml")])  # type: ignore[operator]
            return [b"<Error><Code>InvalidAccessKeyId</Code><Message>no such key</Message></Error>"]

        outage._application = refuse
        yield bucket


def test_wrong_credentials_are_named_with_the_endpoint_and_the_way_out(
    shards: CopiedShards, refusing_store: str, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=r"s3://bucket-\d+/raw.*asked at http://127.*AWS_ACCESS_KEY_ID") as caught:
        run_here(shards.plan(str(tmp_path / "cache"), f"{refusing_store}/raw"))
    assert caught.value.exit_code == 3


def test_a_bucket_that_is_not_there_is_named(
    shards: CopiedShards, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with sound_object_store(monkeypatch), pytest.raises(DataError, match=r"no bucket s3://nowhere .*at http://127"):
        run_here(shards.plan(str(tmp_path / "cache"), "s3://nowhere/raw"))
