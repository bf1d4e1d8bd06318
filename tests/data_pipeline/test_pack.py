"""Raw shards: repeatable bytes, WebDataset-readable, captions from json or txt, a broken tail is reported."""

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import webdataset

from data_pipeline.captions import Caption
from data_pipeline.manifest import list_shards
from data_pipeline.pack import RawClip, ShardDamage, count_records, read_shard, write_shards
from m4v_dist import storage
from m4v_dist.errors import ConfigError, DataError

CLIPS = [RawClip(f"c{n}", "mp4", bytes([n]) * 1000, (Caption(f"caption {n}"),), {"licence": "CC0"}) for n in range(5)]


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_records_are_read_back_as_they_were_packed(tmp_path: Path) -> None:
    paths = write_shards(CLIPS, f"{tmp_path}/x-%03d.tar", 2)
    assert [Path(path).name for path in paths] == ["x-000.tar", "x-001.tar", "x-002.tar"]
    assert [clip for path in paths for clip in read_shard(path)] == CLIPS
    assert [count_records(path) for path in paths] == [2, 2, 1]


def test_packing_twice_gives_the_same_bytes_and_webdataset_reads_them(tmp_path: Path) -> None:
    first = write_shards(CLIPS, f"{tmp_path}/a-%d.tar", 9)
    second = write_shards(CLIPS, f"{tmp_path}/b-%d.tar", 9)
    assert Path(first[0]).read_bytes() == Path(second[0]).read_bytes()
    samples = list(webdataset.WebDataset(first, shardshuffle=False))
    assert [sample["mp4"] for sample in samples] == [clip.data for clip in CLIPS]


def test_no_half_written_shard_stays_under_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stands twice"):
        write_shards([CLIPS[0], CLIPS[1], CLIPS[0]], f"{tmp_path}/x-%d.tar", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-0.tar"]


@pytest.mark.parametrize(
    "record", [RawClip("a.b", "mp4", b"", (Caption("c"),)), RawClip("a", "exe", b"", (Caption("c"),))]
)
def test_keys_with_dots_and_unknown_kinds_are_refused(tmp_path: Path, record: RawClip) -> None:
    with pytest.raises(ValueError, match="a"):
        write_shards([record], f"{tmp_path}/x-%d.tar", 2)


def test_a_caption_comes_from_json_or_text_file(tmp_path: Path) -> None:
    members = {
        "a.mp4": b"1", "a.json": b'{"text": "from text", "author": "me"}',
        "b.mp4": b"2", "b.txt": b" from a file \n",
        "c.mp4": b"3", "c.json": b"not json",
        "d.mp4": b"4", "d.txt": b"  ",
        "e.JPG": b"5", "e.json": b'{"caption": "upper case"}',
        "f.json": b'{"caption": "no media"}',
    }  # fmt: skip
    clips = list(read_shard(write_tar(tmp_path / "x.tar", members)))
    assert all(isinstance(clip, RawClip) for clip in clips)
    found = {clip.key: (clip.kind, [c.text for c in clip.captions]) for clip in clips if isinstance(clip, RawClip)}
    assert found == {
        "a": ("mp4", ["from text"]), "b": ("mp4", ["from a file"]), "c": ("mp4", []), "d": ("mp4", []),
        "e": ("jpg", ["upper case"]), "f": (None, ["no media"]),
    }  # fmt: skip
    faults = {clip.key: clip.fault for clip in clips if isinstance(clip, RawClip) and clip.fault}
    assert list(faults) == ["c"] and "json is no JSON" in faults["c"]


def test_a_broken_tail_is_reported_after_what_is_whole(tmp_path: Path) -> None:
    (path,) = write_shards(CLIPS, f"{tmp_path}/x-%d.tar", 9)
    data = Path(path).read_bytes()
    # inside a member, and exactly between two, where tarfile alone sees a whole archive
    for size in (5000, len(data) // 2):
        Path(path).write_bytes(data[:size])
        found = list(read_shard(path))
        assert found[0] == CLIPS[0] and isinstance(found[-1], ShardDamage)
    Path(path).write_bytes(b"this is no tar at all")
    assert [type(item) for item in read_shard(path)] == [ShardDamage]


def test_missing_shards_are_named(tmp_path: Path) -> None:
    write_shards(CLIPS, f"{tmp_path}/x-%03d.tar", 2)
    assert len(list_shards(f"{tmp_path}/x-{{000..002}}.tar")) == 3
    with pytest.raises(DataError, match=r"2 of 5 shards .*x-003.tar, .*x-004.tar"):
        list_shards(f"{tmp_path}/x-{{000..004}}.tar")
    with pytest.raises(DataError, match="no such shard"):
        list(read_shard(f"{tmp_path}/none.tar"))


@pytest.mark.parametrize("error", [TimeoutError("read timed out"), OSError(5, "Input/output error")])
def test_storage_that_fails_is_no_damage_of_the_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    (path,) = write_shards(CLIPS, f"{tmp_path}/x-%d.tar", 9)

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= 5000:
                raise error
            return super().read(size)

    @contextmanager
    def open_read(path: str) -> Iterator[io.BytesIO]:
        yield Failing(Path(path).read_bytes() * 3)

    monkeypatch.setattr(storage, "open_read", open_read)
    with pytest.raises(type(error)):
        list(read_shard(path))


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_shard_is_refused(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    (path,) = write_shards(CLIPS, f"{tmp_path}/x-%d.tar", 9)
    Path(path).write_bytes(compress(Path(path).read_bytes()))
    with pytest.raises(DataError, match="x-0.tar: is compressed"):
        list(read_shard(path))


def test_braces_that_do_not_balance_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"sources.shards='x-\{000\.\.003.tar': braces do not balance"):
        list_shards("x-{000..003.tar")


def read_by_key(path: str) -> dict[str, RawClip]:
    clips = [clip for clip in read_shard(path) if isinstance(clip, RawClip)]
    assert len({clip.key for clip in clips}) == len(clips)
    return {clip.key: clip for clip in clips}


def test_a_record_with_a_fault_is_told_apart_and_its_neighbours_are_read(tmp_path: Path) -> None:
    """Where WebDataset ends the shard, or takes one of two in silence."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in [
            ("a.mp4", b"1"), ("a.mp4", b"2"), ("a.txt", b"twice"),
            ("b.mp4", b"1"), ("b.webm", b"2"), ("b.txt", b"two kinds"),
            ("c.mp4", b"1"), ("c.txt", b"caf\xe9"),
            ("d.mp4", b"1"), ("d.json", b'["a list"]'),
            ("no_extension", b"1"),
            ("z.mp4", b"1"), ("z.txt", b"whole"),
        ]:  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    clips = read_by_key(str(tmp_path / "x.tar"))
    assert {key: clip.fault for key, clip in clips.items()} == {
        "a": "member .mp4 stands twice",
        "b": "2 media members: .mp4, .webm; a record is one clip",
        "c": "txt is no UTF-8 (byte 0xe9 at 3); write it anew in UTF-8",
        "d": "json is ['a list'], not an object",
        "no_extension": None,
        "z": None,
    }
    assert clips["no_extension"].kind is None and clips["z"].captions == (Caption("whole"),)


def test_keys_of_every_language_with_folders_and_of_any_length_are_kept(tmp_path: Path) -> None:
    keys = ["Füchse/крыша", "狐/屋根", "a/b.c/d", "long/" + "k" * 300, "with space", "no\u00a0break", "🦊"]
    (path,) = write_shards([RawClip(key, "mp4", b"1", (Caption(key),)) for key in keys], f"{tmp_path}/x-%d.tar", 99)
    assert list(read_by_key(path)) == keys
    assert [sample["__key__"] for sample in webdataset.WebDataset(path, shardshuffle=False)] == keys


def test_a_key_that_no_list_can_hold_is_a_fault(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("two\nlines.mp4", "a\ttab.mp4", b"caf\xe9.mp4".decode("utf-8", "surrogateescape"), "ok.mp4"):
            tar.addfile(tarfile.TarInfo(name))
    clips = read_by_key(str(tmp_path / "x.tar"))
    assert list(clips) == ["two\\nlines", "a\\ttab", "caf\\udce9", "ok"]
    assert [clip.fault is None for clip in clips.values()] == [False, False, False, True]


def test_captions_and_weights_are_packed_and_read_back(tmp_path: Path) -> None:
    captions = (Caption("a fox", 2.0), Caption("ein Fuchs auf dem Dach", 0.5))
    (path,) = write_shards([RawClip("a", "mp4", b"1", captions, {"licence": "CC0"})], f"{tmp_path}/x-%d.tar", 1)
    clip = read_by_key(path)["a"]
    assert clip.captions == captions and clip.metadata == {"licence": "CC0"}
    with pytest.raises(ValueError, match=r"a: captions\[0\] has the weight nan"):
        write_shards([RawClip("a", "mp4", b"1", (Caption("x", float("nan")),))], f"{tmp_path}/y-%d.tar", 1)
