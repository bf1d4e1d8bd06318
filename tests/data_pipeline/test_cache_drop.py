"""Dropped records are read no more, stay dropped, and a list with a name too many changes nothing."""

from pathlib import Path

import pytest

from data_pipeline.cache_check import check_cache
from data_pipeline.cache_drop import drop_records, plan_drop
from data_pipeline.cache_manifest import index_path
from data_pipeline.latent_cache import LatentCache
from data_pipeline.manifest import read_index
from data_pipeline.record_list import ListedRecord, RecordName, read_record_list, write_listed
from m4v_dist import storage
from m4v_dist.errors import DataError
from tests.data_pipeline.made_cache import MadeSource, make_cache

SOURCES = [MadeSource("vid", "video", 5, 3), MadeSource("img", "image", 4, 1)]
LISTED = [RecordName("vid", "vid001"), RecordName("img", "img003"), RecordName("vid", "vid004")]
WHEN = "2026-01-02T03:04:05+00:00"


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return make_cache(str(tmp_path), SOURCES)


def files(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_dropped_records_are_gone_and_the_others_read_as_before(folder: str) -> None:
    before = LatentCache.open(folder)
    drop_records(plan_drop(folder, LISTED), WHEN)
    after = LatentCache.open(folder)
    assert [row.key for row in after.rows("vid")] == ["vid000", "vid002", "vid003"]
    assert [row.key for row in after.rows("img")] == ["img000", "img001", "img002"]
    for row in after.rows("vid"):
        assert after.read(row).latents.equal(before.read(row).latents)
    assert after.digest("vid") != before.digest("vid")


def test_who_was_dropped_and_when_stands_in_notes_and_manifest(folder: str) -> None:
    drop_records(plan_drop(folder, LISTED), WHEN)
    rows, notes = read_index(index_path(folder, "vid"))
    assert [(entry["key"], entry["source"], entry["when"]) for entry in notes["dropped"]] == [
        ("vid001", "vid", WHEN), ("vid004", "vid", WHEN),
    ]  # fmt: skip
    assert notes["fingerprint"] == "made" and notes["kept"] == len(rows) == 3
    manifest = storage.read_json(f"{folder}/manifest.json")
    assert {name: (s["records"], s["dropped"]) for name, s in manifest["sources"].items()} == {
        "vid": (3, 2), "img": (3, 1),
    }  # fmt: skip
    assert manifest["totals"]["64x64"]["records"] == 6
    report = check_cache(folder, 2, lambda: None)
    assert report.is_sound and report.num_dropped == 3


def test_a_list_given_twice_or_in_two_parts_changes_nothing_more(folder: str, tmp_path: Path) -> None:
    drop_records(plan_drop(folder, LISTED[:2]), WHEN)
    drop_records(plan_drop(folder, LISTED), WHEN)
    once = files(folder)
    plan = plan_drop(folder, LISTED)
    assert (plan.num_records, plan.num_before) == (0, 3)
    drop_records(plan, "2027-01-01T00:00:00+00:00")
    assert files(folder) == once


def test_a_drop_that_was_killed_half_way_is_ended_by_the_same_list(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = storage.write_bytes

    def fail(path: str, data: bytes) -> None:
        if path.endswith("vid.parquet"):
            raise OSError("killed")
        whole(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "write_bytes", fail)
        with pytest.raises(OSError, match="killed"):
            drop_records(plan_drop(folder, LISTED), WHEN)
    assert [len(LatentCache.open(folder).rows(name)) for name in ("img", "vid")] == [3, 5]
    drop_records(plan_drop(folder, LISTED), WHEN)
    manifest = storage.read_json(f"{folder}/manifest.json")
    assert [manifest["sources"][name]["dropped"] for name in ("img", "vid")] == [1, 2]


def test_names_that_the_cache_never_held_are_refused_and_nothing_changes(folder: str) -> None:
    before = files(folder)
    with pytest.raises(DataError, match=r"holds no record vid/vid009, other/x; nothing was dropped.*img, vid"):
        plan_drop(folder, [*LISTED, RecordName("vid", "vid009"), RecordName("other", "x")])
    assert files(folder) == before


def test_a_whole_source_may_be_dropped(folder: str) -> None:
    drop_records(plan_drop(folder, [RecordName("img", f"img{n:03d}") for n in range(4)]), WHEN)
    cache = LatentCache.open(folder)
    assert cache.sources == ("vid",) and cache.rows("img") == []
    assert check_cache(folder, 2, lambda: None).is_sound


def test_a_list_has_names_or_the_columns_of_the_pipeline_s_own_lists(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("# look at these\nvid/a/b c\n\nimg\tstills-000.tar\ts1\tcannot be decoded\r\nvid/a/b c\n")
    assert read_record_list(str(path)) == [RecordName("vid", "a/b c"), RecordName("img", "s1")]
    write_listed(str(path), [ListedRecord(RecordName("vid", "füchse/1"), "vid-000", "two\nlines")])
    assert path.read_text() == "vid\tvid-000\tfüchse/1\ttwo\\nlines\n"
    assert read_record_list(str(path)) == [RecordName("vid", "füchse/1")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"vid/a\nvid b\n", "line 2: 'vid b' is no record"),
        (b"vid/\n", "line 1: 'vid/' is no record"),
        (b"vid\ta\n", "line 1: has 2 columns"),
        (b"vid/caf\xe9\n", "is no UTF-8"),
    ],
)
def test_a_line_that_is_no_record_is_told_with_its_number(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(DataError, match=f"list.txt.*{message}"):
        read_record_list(str(tmp_path / "list.txt"))
    with pytest.raises(DataError, match="no such list"):
        read_record_list(str(tmp_path / "none.txt"))
