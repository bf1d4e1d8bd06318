"""The loader on an object store that fails, stalls, cuts its answers, and is killed: the data of a sound one."""

import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.index_table import INDEX
from data_pipeline.latent_cache import LatentCache
from data_pipeline.loader import LatentLoader
from m4v_dist import object_store, storage
from m4v_dist.errors import DataError
from tests.data_pipeline.made_cache import make_cache
from tests.data_pipeline.test_loader import SOURCES, enter_video_stage, make_loader, take
from tests.data_pipeline.test_loader_property import contents
from tests.object_store_server import (
    Application,
    Faults,
    StoreProcess,
    cut,
    cut_honestly,
    fail,
    faulty_object_store,
    stall,
    store_environment,
)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(str(tmp_path_factory.mktemp("cache")), SOURCES)


@pytest.fixture
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where copies of the index go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def store(local: str, own_temporary_folder: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Faults]]:
    """The cache in a store."""
    with faulty_object_store(monkeypatch) as (bucket, faults):
        for path in Path(local).rglob("*.*"):
            storage.write_bytes(f"{bucket}/cache/{path.relative_to(local)}", path.read_bytes())
        faults.requests.clear()
        yield f"{bucket}/cache", faults


def hasten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that does not answer for a second is asked again."""
    import s3fs

    config = {"connect_timeout": 1, "read_timeout": 1, "retries": {"max_attempts": 1, "mode": "standard"}}
    monkeypatch.setattr(object_store, "s3", lambda: s3fs.S3FileSystem(config_kwargs=config, use_listings_cache=False))


def taken(loader: LatentLoader) -> list[Any]:
    return contents(take(enter_video_stage(loader), 6))


def test_a_cache_is_opened_by_few_requests_and_no_fragment(store: tuple[str, Faults]) -> None:
    folder, faults = store
    cache = LatentCache.open(folder)
    reads = [request for request in faults.requests if request.startswith("GET") and ".arrow" in request]
    assert len(reads) == 1 and len(faults.requests) <= 8
    assert not [request for request in faults.requests if ".parquet" in request]
    # another rank of the host finds the copy
    faults.requests.clear()
    assert LatentCache.open(folder).digest("vid") == cache.digest("vid")
    assert not [request for request in faults.requests if INDEX in request]


@pytest.mark.parametrize(
    "make_faults",
    [
        lambda: [fail] * 6,
        lambda: [cut] * 4,
        lambda: [cut_honestly, fail, cut_honestly],
        lambda: [stall(2.0)] * 3,
    ],
    ids=["500s", "broken connections", "short answers", "stalls"],
)
def test_what_a_store_spoils_for_a_moment_is_read_again(
    local: str,
    store: tuple[str, Faults],
    monkeypatch: pytest.MonkeyPatch,
    make_faults: Callable[[], list[Any]],
) -> None:
    folder, faults = store
    hasten(monkeypatch)
    expected = taken(make_loader(local))
    loader = make_loader(folder)
    planned = make_faults()
    faults.plan("/shards/", planned)
    assert taken(loader) == expected
    assert faults.num_spoilt == len(planned)
    assert loader.num_bad_records == 0
    assert loader.reads["num_reread"] == planned.count(cut_honestly)


def test_several_reads_are_in_flight(store: tuple[str, Faults]) -> None:
    """The first three reads are answered once all three are there: one after the other, they never would be."""
    folder, faults = store
    meeting = threading.Barrier(3, timeout=60)

    def meet(application: Application) -> Application:
        def answer(environment: dict[str, Any], start_response: Callable[..., Any]) -> Any:
            meeting.wait()
            return application(environment, start_response)

        return answer

    loader = make_loader(folder, reads_in_flight=3)
    faults.plan("/shards/", [meet] * 3)
    loader.enter(0, 0)
    take(loader, 1)
    assert faults.num_spoilt == 3 and not meeting.broken


@pytest.mark.slow
def test_a_store_that_is_killed_and_started_again_costs_time_and_nothing_else(
    local: str, own_temporary_folder: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = taken(make_loader(local))
    server = StoreProcess(local)
    try:
        for name, value in store_environment(server.port).items():
            monkeypatch.setenv(name, value)
        storage._s3().clear_instance_cache()
        hasten(monkeypatch)
        loader = enter_video_stage(make_loader("s3://bucket", prefetch_steps=1))
        steps = loader.steps()
        batches = [next(steps) for _ in range(2)]
        server.kill()
        restart = threading.Timer(1.0, server.start)
        restart.start()
        batches += [next(steps) for _ in range(4)]
        restart.join()
        loader.close()
        assert contents(batches) == expected and loader.num_bad_records == 0
    finally:
        server.kill()
        storage._s3().clear_instance_cache()


def test_an_object_that_is_cut_for_good_is_a_damaged_record(local: str, store: tuple[str, Faults]) -> None:
    folder, _ = store
    place = LatentCache.open(local).table("vid").place(6)
    path = f"{folder}/shards/vid.tar"
    storage.write_bytes(path, storage.read_bytes(path)[: place.offset_bytes + 100])
    loader = enter_video_stage(make_loader(folder, max_bad_fraction=0.9))
    take(loader, 8)
    assert list(loader.bad_records) == ["vid/vid006"] and "cut short" in loader.bad_records["vid/vid006"]
    # two steps that had both begun to read it: each read it three times
    assert loader.reads["num_reread"] in (2, 4)


def test_a_bucket_that_is_not_there_is_no_cache(store: tuple[str, Faults]) -> None:
    with pytest.raises((DataError, OSError), match="no-such-bucket"):
        LatentCache.open("s3://no-such-bucket-at-all/cache")
