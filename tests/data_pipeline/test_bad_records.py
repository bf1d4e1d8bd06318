"""Bad records through the whole precompute: each is quarantined by name and reason, its neighbours are cached."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from data_pipeline.cache_check import check_cache
from data_pipeline.cache_drop import drop_records, plan_drop
from data_pipeline.cache_manifest import index_path
from data_pipeline.captions import Caption
from data_pipeline.latent_cache import LatentCache
from data_pipeline.manifest import read_index
from data_pipeline.pack import RawClip, write_shards
from data_pipeline.precompute_plan import PrecomputePlan
from data_pipeline.record_list import RecordName
from m4v_dist import storage
from m4v_dist.config.data_settings import (
    BucketSettings,
    CodecSettings,
    PrecomputeSettings,
    SourceSettings,
    TextEncoderSettings,
)
from m4v_dist.errors import DataError
from m4v_dist.frozen.video_file import encode_png
from tests.data_pipeline.made_cache import moving_blocks
from tests.data_pipeline.run_here import run_here

STILL = encode_png(moving_blocks(1, 1)[0])
LONG = "a fox that runs " * 6_250
"""100,000 characters."""


def make_plan(raw: Path, cache: Path, num_shards: int = 1, max_bad_fraction: float = 1.0) -> PrecomputePlan:
    source = SourceSettings(
        name="stills", shards=f"{raw}/stills-{{0..{num_shards - 1}}}.tar", media="image", licence="none"
    )
    precompute = PrecomputeSettings(
        cache=str(cache), buckets=(BucketSettings(height_px=64, width_px=64),), max_bad_fraction=max_bad_fraction
    )
    return PrecomputePlan((source,), precompute, CodecSettings(), TextEncoderSettings())


def write_members(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def record(key: str, **notes: object) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", STILL), (f"{key}.json", json.dumps(notes).encode())]


def test_each_bad_record_is_quarantined_by_its_reason_and_the_others_are_cached(tmp_path: Path) -> None:
    deep = "folder/" + "k" * 200
    write_members(
        tmp_path / "raw" / "stills-0.tar",
        [
            *record("several", captions=[{"text": "a fox", "weight": 2}, "ein Fuchs", {"text": LONG, "weight": 0.5}]),
            *record("empty_list", captions=[]),
            *record("negative", captions=[{"text": "a", "weight": -1}]),
            ("nan.png", STILL), ("nan.json", b'{"captions": [{"text": "a", "weight": NaN}]}'),
            *record("all_zero", captions=[{"text": "a", "weight": 0}]),
            *record("blank", caption="  "),
            ("latin.png", STILL), ("latin.txt", b"caf\xe9"),
            ("list.png", STILL), ("list.json", b"[1]"),
            ("two.png", STILL), ("two.jpg", STILL), ("two.txt", b"which?"),
            ("twice.png", STILL), ("twice.png", STILL), ("twice.txt", b"which?"),
            ("a\nb.png", STILL), ("a\nb.txt", b"a key of two lines"),
            *record("狐/fuchs", caption="a key with a slash"),
            *record(deep, caption="a key that no tar header holds"),
            *record("several", caption="again"),
        ],
    )  # fmt: skip
    plan = make_plan(tmp_path / "raw", tmp_path / "cache")
    report = run_here(plan).report
    assert {entry["key"]: entry["error"] for entry in report["quarantined"]} == {
        "empty_list": "captions is [], not a list of at least one",
        "negative": "captions[0] has the weight -1, not a finite number of at least 0",
        "nan": "captions[0] has the weight nan, not a finite number of at least 0",
        "all_zero": "the weights of captions add up to 0; one of them must be above 0",
        "blank": "caption is missing",
        "latin": "txt is no UTF-8 (byte 0xe9 at 3); write it anew in UTF-8",
        "list": "json is [1], not an object",
        "two": "2 media members: .jpg, .png; a record is one clip",
        "twice": "member .png stands twice",
        "a\\nb": "key is no UTF-8, or holds control characters",
        "several": "key stands twice in the shard",
    }
    assert report["num_cut_captions"] == 1 and report["kept"] == 3
    lines = storage.read_bytes(f"{tmp_path}/cache/quarantine.txt").decode().splitlines()
    assert len(lines) == 11 and all(len(line.split("\t")) == 4 for line in lines)
    cache = LatentCache.open(str(tmp_path / "cache"))
    assert [row.key for row in cache.rows("stills")] == [deep, "several", "狐/fuchs"]
    row = cache.rows("stills")[1]
    assert row.captions == ("a fox", "ein Fuchs", LONG.strip()) and row.caption_weights == (2.0, 1.0, 0.5)
    assert [len(cache.read(row, caption=k).text.tokens) for k in range(3)] == list(row.num_text_tokens)
    assert row.num_text_tokens[2] == 128
    assert check_cache(str(tmp_path / "cache"), 2, lambda: None).is_sound


def write_stills(raw: Path, keys: list[list[str]]) -> None:
    for number, of_shard in enumerate(keys):
        clips = [RawClip(key, "png", STILL, (Caption(f"{key} in {number}"),)) for key in of_shard]
        shutil.move(write_shards(clips, f"{raw}/new-%d.tar", 99)[0], raw / f"stills-{number}.tar")


def test_a_key_in_a_later_shard_of_its_source_is_quarantined_and_the_first_stands(tmp_path: Path) -> None:
    write_stills(tmp_path / "raw", [["a", "b"], ["c", "b", "d"], ["e", "a"]])
    plan = make_plan(tmp_path / "raw", tmp_path / "cache", num_shards=3)
    report = run_here(plan).report
    assert [(e["key"], e["shard"], e["error"]) for e in report["quarantined"]] == [
        ("b", "stills-1.tar", "key stands in stills-0.tar too"),
        ("a", "stills-2.tar", "key stands in stills-0.tar too"),
    ]
    assert (report["kept"], report["num_clips"]) == (5, 7)
    cache = LatentCache.open(str(tmp_path / "cache"))
    assert [row.captions[0] for row in cache.rows("stills")] == ["a in 0", "b in 0", "c in 1", "d in 1", "e in 2"]
    assert cache.manifest["sources"]["stills"]["records"] == 5
    assert check_cache(cache.path, 2, lambda: None).is_sound
    assert run_here(plan).did_nothing
    with pytest.raises(DataError, match="2 of 7 clips are quarantined"):
        run_here(make_plan(tmp_path / "raw", tmp_path / "other", num_shards=3, max_bad_fraction=0.1))


def test_shards_that_number_their_records_each_from_the_start_are_refused_before_any_work(tmp_path: Path) -> None:
    write_stills(tmp_path / "raw", [["k" * 150, "b"], ["k" * 150, "c"]])
    with pytest.raises(DataError, match=r"stills-0.tar and .*stills-1.tar both begin with the key 'kkk"):
        run_here(make_plan(tmp_path / "raw", tmp_path / "cache", num_shards=2))
    assert not (tmp_path / "cache").exists()


def test_what_was_dropped_comes_back_by_no_rerun_and_no_redone_shard(tmp_path: Path) -> None:
    raw, folder = tmp_path / "raw", str(tmp_path / "cache")
    write_stills(raw, [["a", "b", "c"], ["d"]])
    run_here(make_plan(raw, tmp_path / "cache"))
    drop_records(plan_drop(folder, [RecordName("stills", "b")]), "2026-01-02T03:04:05+00:00")
    report = run_here(make_plan(raw, tmp_path / "cache")).report
    assert (report["kept"], report["dropped"]) == (2, 1)
    result = run_here(make_plan(raw, tmp_path / "cache", num_shards=2))
    assert not result.did_nothing and (result.report["kept"], result.report["dropped"]) == (3, 1)
    write_stills(raw, [["a", "b", "c", "new"], ["d"]])
    result = run_here(make_plan(raw, tmp_path / "cache", num_shards=2))
    assert result.report["num_shards_this_run"] == 1
    assert (result.report["kept"], result.report["dropped"], result.report["num_clips"]) == (4, 1, 5)
    cache = LatentCache.open(folder)
    assert [row.key for row in cache.rows("stills")] == ["a", "c", "d", "new"]
    assert cache.manifest["sources"]["stills"]["dropped"] == 1
    assert check_cache(folder, 2, lambda: None).is_sound
    Path(index_path(folder, "stills-stills-0")).unlink()
    run_here(make_plan(raw, tmp_path / "cache", num_shards=2))
    assert len(read_index(index_path(folder, "stills-stills-0"))[0]) == 4
