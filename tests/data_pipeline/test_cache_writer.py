"""A shard on a disk that is full: a clear error, nothing under a final name, and no commit."""

import errno
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.cache_manifest import index_path, shard_path
from data_pipeline.cache_writer import CacheShardWriter
from data_pipeline.captions import Caption
from data_pipeline.latent_cache import LatentCache
from data_pipeline.manifest import read_index, write_index
from data_pipeline.pack import RawClip, write_shards
from m4v_dist import storage
from m4v_dist.batch import TextFeatures
from m4v_dist.errors import DataError, NoSpaceError
from tests.data_pipeline.made_cache import MadeSource, made_row, make_cache

SOURCE = MadeSource("vid", "video", 3, 3)


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """The limit on a file's size, which the system reports as it does a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_one(folder: str, num_records: int = 1) -> None:
    writer = CacheShardWriter(folder, "vid")
    try:
        text = TextFeatures(torch.ones(3, 6), torch.ones(6))
        for number in range(num_records):
            writer.add(made_row(SOURCE, 2 * number), torch.ones(4, 3, 8, 64).bfloat16(), [text])
        writer.commit({"fingerprint": "one"})
    finally:
        writer.abandon()


@pytest.mark.parametrize("size_bytes", [0, 9_000, 20_000])
def test_a_full_disk_leaves_no_file_and_names_file_need_and_room(tmp_path: Path, size_bytes: int) -> None:
    """Met while a record is added, in its first bytes and in later ones, and when the tar is closed."""
    message = r"shards/vid.tar.*: [\d,]+ bytes are needed, [\d,]+ are free"
    with largest_file(size_bytes), pytest.raises(NoSpaceError, match=message):
        write_one(str(tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    write_one(str(tmp_path))
    assert len(read_index(index_path(str(tmp_path), "vid"))[0]) == 1


def test_a_disk_that_fills_up_before_the_index_fragment_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path)
    place = storage.put_file

    def fill(local_path: str, path: str) -> None:
        place(local_path, path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(storage, "put_file", fill)
    try:
        with pytest.raises(NoSpaceError, match=r"index/vid.parquet: .* bytes are needed"):
            write_one(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert storage.list_folder(f"{folder}/index") == [] and storage.exists(shard_path(folder, "vid"))


def test_a_disk_that_fills_up_while_a_shard_is_done_anew_keeps_the_old_one_readable(tmp_path: Path) -> None:
    folder = make_cache(str(tmp_path), [SOURCE])
    with largest_file(9_000), pytest.raises(NoSpaceError):
        write_one(folder, num_records=3)
    cache = LatentCache.open(folder)
    assert [len(cache.read(row).text.tokens) for row in cache.rows("vid")] == [3, 4, 3]
    assert not [name for name in os.listdir(f"{folder}/shards") if ".tmp-" in name]


def test_a_remote_shard_is_drafted_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    writer = CacheShardWriter("s3://nowhere/cache", "vid")
    text = TextFeatures(torch.ones(3, 6), torch.ones(6))
    with largest_file(2_000), pytest.raises(NoSpaceError, match=rf"{tmp_path}/vid.tar.tmp-.* bytes are needed"):
        writer.add(made_row(SOURCE, 0), torch.ones(4, 3, 8, 64).bfloat16(), [text])
    writer.abandon()
    assert os.listdir(tmp_path) == []


def test_packing_to_a_full_disk_keeps_the_shards_before_and_no_half_one(tmp_path: Path) -> None:
    clips = [RawClip(f"c{n}", "mp4", bytes(3_000 * (n + 1)), (Caption("x"),)) for n in range(4)]
    with largest_file(10_240), pytest.raises(NoSpaceError, match="x-2.tar.*: 20,480 bytes are needed"):
        write_shards(clips, f"{tmp_path}/x-%d.tar", 1)
    assert sorted(os.listdir(tmp_path)) == ["x-0.tar", "x-1.tar"]


def test_an_error_that_is_no_full_disk_stays_itself(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), storage.naming_full_disk(str(tmp_path / "x"), 7):
        raise PermissionError(errno.EACCES, "no")


def test_a_fragment_that_was_cut_or_changed_is_refused_by_name(tmp_path: Path) -> None:
    """Or read as it was: some bytes of a Parquet file mean nothing."""
    folder = make_cache(str(tmp_path), [SOURCE])
    path = Path(index_path(folder, "vid"))
    whole, expected = path.read_bytes(), read_index(str(path))
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"vid.parquet: is no index of this version"):
            read_index(str(path))
    num_refused = 0
    for position in range(0, len(whole), 29):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            found = read_index(str(path))
        except DataError as error:
            assert "vid.parquet: is no index of this version" in str(error)
            num_refused += 1
        else:
            assert found == expected, position
    assert num_refused > 20


def test_an_index_holds_texts_of_every_kind(tmp_path: Path) -> None:
    path = str(tmp_path / "x.parquet")
    long = "a fox " * 20_000
    rows = [
        replace(made_row(SOURCE, 0), captions=("狐", long)),
        replace(made_row(SOURCE, 1), captions=("\U0001f98a", "two\nlines\tand a tab")),
    ]
    write_index(path, rows, {})
    assert read_index(path)[0] == rows
