"""Paths behind one door: whole writes, reads that notice a cut, a store that cannot be asked."""

import errno
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from m4v_dist import object_store, storage
from m4v_dist.errors import NoSpaceError, StoreError
from m4v_dist.retries import RetryCount, count_retries
from tests.object_store_server import Outage
from tests.object_store_server import object_store as local_object_store


@pytest.mark.parametrize(
    ("ask", "path"),
    [
        (storage.list_folder, "s3://bucket"),
        (storage.list_folder, "s3://bucket/folder"),
        (storage.exists, "s3://bucket/folder/file"),
        (storage.size_bytes, "s3://bucket/folder/file"),
        (storage.read_bytes, "s3://bucket/folder/file"),
    ],
)
def test_a_store_that_cannot_be_asked_is_not_an_empty_one(
    ask: Callable[[str], object], path: str, no_credentials: None
) -> None:
    with pytest.raises(StoreError, match=f"^{path}: NoCredentialsError.*AWS_ACCESS_KEY_ID"):
        ask(path)


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "a.json")
    storage.write_json(path, {"step": 1})

    def full(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write_json(path, {"step": 2})
    assert storage.read_json(path) == {"step": 1}


def test_a_read_past_the_end_says_what_was_asked_and_what_there_is(tmp_path: Path) -> None:
    path = str(tmp_path / "shard.tar")
    storage.write_bytes(path, b"0123456789")
    assert storage.read_bytes(path, 2, 3) == b"234"
    with pytest.raises(EOFError, match=r"asked for 5 bytes at offset 8, got 2"):
        storage.read_bytes(path, 8, 5)


def test_torn_lines_are_counted() -> None:
    rows, num_torn = storage.parse_json_lines(b'{"a": 1}\n\n{"b": \n\xff\xfe\n3\n{"c": 2}\n')
    assert rows == [{"a": 1}, {"c": 2}] and num_torn == 3


# ---- one writer of several, full disks, and a store that is down for a while


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Outage]]:
    with local_object_store(monkeypatch) as bucket_and_outage:
        yield bucket_and_outage


def test_one_of_two_creators_wins_and_its_file_stays(store: tuple[str, Outage], tmp_path: Path) -> None:
    for folder in (str(tmp_path), f"{store[0]}/claims"):
        assert storage.create_bytes(f"{folder}/1.json", b"first")
        assert not storage.create_bytes(f"{folder}/1.json", b"second")
        assert storage.read_bytes(f"{folder}/1.json") == b"first"
        assert storage.list_sizes(folder) == {"1.json": 5}, "nothing is left beside it"
    assert storage.list_sizes(f"{store[0]}/none") == storage.list_sizes(f"{tmp_path}/none") == {}


def test_a_mount_without_hard_links_has_one_creator_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    assert storage.create_bytes(f"{tmp_path}/1.json", b"first")
    assert not storage.create_bytes(f"{tmp_path}/1.json", b"second")
    assert storage.read_bytes(f"{tmp_path}/1.json") == b"first" and storage.list_folder(str(tmp_path)) == ["1.json"]


def test_a_store_that_is_down_for_a_while_is_asked_until_it_answers(
    store: tuple[str, Outage], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, outage = store
    storage.write_bytes(f"{bucket}/a", b"before")
    outage.is_down = True

    def mend(count: RetryCount) -> None:
        while not count.num_retries:
            time.sleep(0.01)
        outage.is_down = False

    with count_retries() as count:
        threading.Thread(target=mend, args=(count,)).start()
        storage.write_chunks(f"{bucket}/b", lambda: [b"0123", memoryview(b"456")], 7)
    assert storage.read_bytes(f"{bucket}/b", 2, 3) == b"234" and storage.read_bytes(f"{bucket}/a") == b"before"
    assert outage.num_refused > 0
    outage.is_down = True
    monkeypatch.setattr(object_store, "RETRY_LIMIT_S", 0.1)
    with pytest.raises(OSError):
        storage.exists(f"{bucket}/b")


def test_chunks_that_fail_leave_no_object(store: tuple[str, Outage]) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise RuntimeError("source is gone")

    with pytest.raises(RuntimeError, match="source is gone"):
        storage.write_chunks(f"{store[0]}/half", chunks, 8)
    assert not storage.exists(f"{store[0]}/half")


def test_a_full_disk_is_an_error_with_path_need_and_room_and_leaves_nothing(tmp_path: Path) -> None:
    """By the limit on a file's size, which the system reports as it does a full disk."""
    path = str(tmp_path / "big")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(NoSpaceError, match=r"/big: .*2,097,152 bytes are needed, [\d,]+ are free"):
            storage.write_bytes(path, bytes(2**21))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert storage.list_folder(str(tmp_path)) == []
