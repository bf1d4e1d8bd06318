"""A check of a whole cache finds each kind of damage, and nothing in a sound one."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import webdataset

from data_pipeline.cache_check import CheckReport, check_cache
from data_pipeline.cache_manifest import index_path
from data_pipeline.cache_writer import CacheShardWriter
from data_pipeline.manifest import read_index, write_index
from m4v_dist import storage
from m4v_dist.batch import TextFeatures
from m4v_dist.errors import DataError
from tests.data_pipeline.made_cache import MadeSource, made_row, make_cache

VIDEO = MadeSource("vid", "video", 5, 3)
SOURCES = [VIDEO, MadeSource("img", "image", 4, 1)]


@pytest.fixture
def folder(tmp_path: Path, made: str) -> str:
    return str(shutil.copytree(made, tmp_path / "cache"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(str(tmp_path_factory.mktemp("made")), SOURCES)


def check(folder: str) -> CheckReport:
    return check_cache(folder, 3, lambda: None)


def test_a_sound_cache_is_sound_and_every_record_is_read(folder: str) -> None:
    seen: list[int] = []
    report = check_cache(folder, 3, lambda: seen.append(1))
    assert report.is_sound and (report.num_records, len(seen), report.unused) == (9, 9, [])
    size = sum(row.size_bytes for name in ("vid", "img") for row in read_index(index_path(folder, name))[0])
    assert report.size_bytes == size


def test_what_the_check_calls_whole_webdataset_reads_to_the_end(folder: str) -> None:
    """The layout is checked by byte ranges; this is its slow twin."""
    for name, count in (("vid", 5), ("img", 4)):
        samples = list(webdataset.WebDataset(f"{folder}/shards/{name}.tar", shardshuffle=False))
        assert [sample["__key__"] for sample in samples] == [f"{name}{n:03d}" for n in range(count)]


def flip(folder: str) -> None:
    tar = Path(folder, "shards/vid.tar")
    row = read_index(index_path(folder, "vid"))[0][2]
    data = bytearray(tar.read_bytes())
    data[row.offset_bytes + row.size_bytes - 700] ^= 1
    tar.write_bytes(bytes(data))


def cut(folder: str) -> None:
    tar = Path(folder, "shards/vid.tar")
    row = read_index(index_path(folder, "vid"))[0][3]
    tar.write_bytes(tar.read_bytes()[: row.offset_bytes + 10])


def lose_the_tar(folder: str) -> None:
    Path(folder, "shards/img.tar").unlink()


def test_damaged_records_are_listed_and_the_others_are_whole(folder: str) -> None:
    flip(folder)
    report = check(folder)
    assert [str(record.name) for record in report.damaged] == ["vid/vid002"] and report.problems == []
    assert "checksum differs" in report.damaged[0].error and report.num_records == 9


@pytest.mark.parametrize(
    ("harm", "damaged", "problem"),
    [
        (cut, ["vid/vid003", "vid/vid004"], "no end mark of a tar follows"),
        (lose_the_tar, [f"img/img{n:03d}" for n in range(4)], "img.tar: is missing; 4 records"),
    ],
)
def test_a_cut_and_a_lost_shard_are_told_with_their_records(
    folder: str, harm: Callable[[str], None], damaged: list[str], problem: str
) -> None:
    harm(folder)
    report = check(folder)
    assert [str(record.name) for record in report.damaged] == damaged
    assert len(report.problems) == 1 and problem in report.problems[0]


def test_a_tar_with_other_bytes_behind_its_records_is_told(folder: str) -> None:
    """WebDataset would read them as a record more."""
    with open(f"{folder}/shards/vid.tar", "ab") as tar:
        tar.write(b"x" * 512)
    assert ["no end mark" in problem for problem in check(folder).problems] == [True]


def test_ranges_that_overlap_or_leave_a_gap_are_told_by_the_key(folder: str) -> None:
    path = index_path(folder, "vid")
    rows, notes = read_index(path)
    write_index(path, [rows[0], replace(rows[1], offset_bytes=rows[1].offset_bytes - 512), *rows[3:]], notes)
    problems = check(folder).problems
    assert "vid001 at byte" in problems[0] and "overlaps the record before it" in problems[0]
    assert "vid003 at byte" in problems[1] and "leaves bytes of no record before it" in problems[1]


def test_a_missing_and_a_garbled_fragment_are_told_and_the_rest_is_checked(folder: str) -> None:
    Path(index_path(folder, "img")).write_bytes(b"PAR1 not quite")
    report = check(folder)
    assert report.num_records == 5 and "img.parquet: is no index of this version" in report.problems[0]
    Path(index_path(folder, "img")).unlink()
    assert "img.parquet: this index fragment is missing" in check(folder).problems[0]


def test_a_merged_index_of_other_fragments_is_told(folder: str) -> None:
    rows, notes = read_index(index_path(folder, "img"))
    write_index(index_path(folder, "img"), rows, notes | {"more": "notes, so that its size differs"})
    (problem,) = check(folder).problems
    assert "index.arrow: is not made of these fragments" in problem


def test_files_that_nothing_names_are_told_and_are_no_damage(folder: str) -> None:
    shutil.copy(f"{folder}/shards/vid.tar", f"{folder}/shards/old.tar")
    shutil.copy(f"{folder}/index/vid.parquet", f"{folder}/index/new.parquet")
    Path(folder, "shards/vid.tar.tmp-0123abcd").write_bytes(b"half")
    report = check(folder)
    assert report.is_sound
    assert report.unused == ["shards/old.tar", "shards/vid.tar.tmp-0123abcd", "index/new.parquet"]


def test_latents_that_are_not_finite_or_of_another_size_are_damage(folder: str) -> None:
    writer = CacheShardWriter(folder, "vid")
    text = TextFeatures(torch.ones(3, 6), torch.ones(6))
    for number, latents in enumerate((torch.full((4, 3, 8, 8), torch.nan), torch.ones(4, 2, 8, 8))):
        row = replace(made_row(VIDEO, 2 * number), num_text_tokens=(3,))
        writer.add(row, latents.bfloat16(), [text])
    writer.commit({"fingerprint": "made"})
    errors = [record.error for record in check(folder).damaged]
    assert errors[0] == "latents are not finite"
    assert errors[1] == "latents are (4, 2, 8, 8), the index says (4, 3, 8, 8)"


def test_a_key_in_two_shards_of_a_source_is_told(folder: str) -> None:
    writer = CacheShardWriter(folder, "vid2")
    text = TextFeatures(torch.ones(3, 6), torch.ones(6))
    writer.add(made_row(VIDEO, 2), torch.ones(4, 3, 8, 8).bfloat16(), [text])
    writer.commit({"fingerprint": "made"})
    manifest = storage.read_json(f"{folder}/manifest.json")
    storage.write_json(f"{folder}/manifest.json", manifest | {"fragments": ["img", "vid", "vid2"]})
    assert check(folder).problems[0] == "vid/vid002 stands twice, in shard vid and in shard vid2"


def test_a_manifest_with_other_counts_than_the_index_is_told(folder: str) -> None:
    manifest = storage.read_json(f"{folder}/manifest.json")
    manifest["sources"]["vid"]["records"] = 7
    manifest["totals"] = {}
    storage.write_json(f"{folder}/manifest.json", manifest)
    problems = check(folder).problems
    assert "source vid is" in problems[0] and "'records': 5" in problems[0] and "totals {}" in problems[1]


def test_a_store_that_cannot_be_asked_is_no_damage(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of damaged records would else hold them all, and be dropped."""
    whole = storage.read_bytes

    def fail(path: str, offset: int = 0, length: int | None = None) -> bytes:
        if path.endswith(".tar") and length == read_index(index_path(folder, "img"))[0][0].size_bytes:
            raise TimeoutError("read timed out")
        return whole(path, offset, length)

    monkeypatch.setattr(storage, "read_bytes", fail)
    with pytest.raises(TimeoutError):
        check(folder)


def test_an_unfinished_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished latent cache"):
        check(str(tmp_path))
