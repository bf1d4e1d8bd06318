"""Curation from raw shards to the cache: what is kept and why, duplicates, poison, and what a rerun does."""

import json
import shutil
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline import decoder_pool
from data_pipeline.captions import Caption
from data_pipeline.clip_list import ClipList, SurveyedClip, list_path, read_clips, survey_path
from data_pipeline.curation import _Copies, make_lists, survey_tasks, unsurveyed
from data_pipeline.decode import DecodeRule, decode_clip
from data_pipeline.filters import reason_by_thresholds
from data_pipeline.latent_cache import LatentCache
from data_pipeline.pack import RawClip, write_shards
from data_pipeline.pipeline import run_precompute
from data_pipeline.plan_table import describe_plan
from data_pipeline.precompute_plan import PrecomputePlan, describe_cache, plan_tasks
from m4v_dist import storage
from m4v_dist.config.curation_settings import CurationSettings, CurationThresholds
from m4v_dist.config.data_settings import (
    BucketSettings,
    CodecSettings,
    PrecomputeSettings,
    SourceSettings,
    TextEncoderSettings,
)
from m4v_dist.config.training_settings import LaunchSettings
from m4v_dist.errors import DataError
from m4v_dist.frozen.video_file import encode_mp4, encode_png
from m4v_dist.frozen.video_vae import build_codec, frames_from_uint8
from m4v_dist.launch.ray_session import ray_session
from tests.data_pipeline.made_scenes import plain, texture
from tests.data_pipeline.run_here import run_here
from tests.object_store_server import object_store

LIMITS = CurationThresholds(min_height_px=64, min_width_px=64, min_sharpness=5.0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two sources of video that share a clip, in three shards, and one of stills."""
    folder = str(tmp_path_factory.mktemp("raw"))
    shared = encode_mp4(texture(1, 25), 24.0)
    first = [
        RawClip(
            "joined",
            "mp4",
            encode_mp4(np.concatenate([texture(2, 25), texture(3, 25), texture(4, 6)]), 24.0),
            (Caption("two"),),
        ),
        RawClip("shared", "mp4", shared, (Caption("a clip that both sources hold"),)),
        RawClip("black", "mp4", encode_mp4(plain(0, 25), 24.0), (Caption("nothing"),)),
        RawClip("static", "mp4", encode_mp4(texture(5, 25, shift_px=0), 24.0), (Caption("a still as a film"),)),
        RawClip("poison", "mp4", shared[:400], (Caption("half a film"),)),
        RawClip("mute", "mp4", shared, ()),
        RawClip("long", "mp4", encode_mp4(texture(6, 50), 24.0), (Caption("a long scene"),)),
    ]
    write_shards(first, f"{folder}/one-%03d.tar", 4)
    write_shards(
        [
            RawClip("copy", "mp4", shared, (Caption("the same"),)),
            RawClip("own", "mp4", encode_mp4(texture(7, 25), 24.0), (Caption("own"),)),
        ],
        f"{folder}/two-%03d.tar", 9,
    )  # fmt: skip
    stills = [
        RawClip("sharp", "png", encode_png(texture(8, 1)[0]), (Caption("sharp"),)),
        RawClip("grey", "png", encode_png(plain(128, 1)[0]), (Caption("grey"),)),
        RawClip("again", "png", encode_png(texture(8, 1)[0]), (Caption("sharp"),)),
    ]
    write_shards(stills, f"{folder}/stills-%03d.tar", 9)
    return folder


def make_plan(shards: str, cache: Path, limits: CurationThresholds = LIMITS, **curation: Any) -> PrecomputePlan:
    sources = (
        SourceSettings(name="one", shards=f"{shards}/one-{{000..001}}.tar", media="video", licence="none"),
        SourceSettings(name="two", shards=f"{shards}/two-000.tar", media="video", licence="none"),
        SourceSettings(name="stills", shards=f"{shards}/stills-000.tar", media="image", licence="none"),
    )
    precompute = PrecomputeSettings(
        cache=str(cache), buckets=(BucketSettings(height_px=64, width_px=64),), num_frames=25, max_bad_fraction=0.4,
        num_retries=1,
    )  # fmt: skip
    settings = CurationSettings(**{"enabled": True, "thresholds": limits} | curation)
    return PrecomputePlan(sources, precompute, CodecSettings(), TextEncoderSettings(), settings)


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def changed(before: dict[str, int], after: dict[str, int], under: str) -> set[str]:
    names = {name for name in before.keys() | after.keys() if name.startswith(under)}
    return {name.removeprefix(under) for name in names if before.get(name) != after.get(name)}


def keys(cache: Path, source: str) -> list[str]:
    return [row.key for row in LatentCache.open(str(cache)).rows(source)]


@pytest.fixture(scope="module")
def curated(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cache; tests that change it copy it first."""
    cache = tmp_path_factory.mktemp("curated") / "cache"
    run_here(make_plan(shards, cache))
    return cache


def test_what_is_kept_and_why_the_rest_is_not(curated: Path) -> None:
    assert keys(curated, "one") == ["joined", "joined-f000025", "long", "shared"]
    assert keys(curated, "two") == ["own"]
    assert keys(curated, "stills") == ["sharp"]
    report = storage.read_json(f"{curated}/report.json")
    assert report["per_source"]["one"] == {
        "kept": 4, "quarantined": 2, "too_short": 1, "black": 1, "static": 1, "rest_of_scene": 1,
    }  # fmt: skip
    assert report["per_source"]["two"] == {"kept": 1, "quarantined": 0, "duplicate": 1}
    assert report["per_source"]["stills"] == {"kept": 1, "quarantined": 0, "flat": 1, "duplicate": 1}
    bad = {entry["key"]: entry["error"] for entry in report["quarantined"]}
    assert set(bad) == {"poison", "mute"} and bad["poison"].startswith("survey: ")
    assert "poison" in (curated / "quarantine.txt").read_text()


def test_clips_are_cut_where_the_list_says_and_carry_its_scores(curated: Path) -> None:
    cache = LatentCache.open(str(curated))
    rows = {row.key: row for row in cache.rows("one")}
    assert rows["joined"].num_frames == rows["joined-f000025"].num_frames == 25
    listed, _ = read_clips(list_path(str(curated), "one-one-000"))
    for clip in listed:
        if not clip.reason:
            assert json.loads(rows[clip.clip_key].scores) == clip.scores()
    # the scene behind the joint is that scene, up to what two compressions make of it
    codec = build_codec(CodecSettings())
    alone = encode_mp4(texture(3, 25), 24.0)
    rule = DecodeRule(((64, 64),), 25, 24.0)
    expected = codec.encode(frames_from_uint8(torch.from_numpy(decode_clip(alone, "mp4", rule).frames.copy())))
    found = cache.read(rows["joined-f000025"]).latents.float()
    other = cache.read(rows["joined"]).latents.float()
    assert (found - expected).abs().mean() < 0.1 * (other - expected).abs().mean()


def test_duplicates_are_listed_with_what_is_kept_for_them(curated: Path, shards: str) -> None:
    lines = (curated / "curation" / "duplicates.txt").read_text().splitlines()
    assert [line.split("\t") for line in lines] == [
        ["two", f"{shards}/two-000.tar", "copy", "one", f"{shards}/one-000.tar", "shared"],
        ["stills", f"{shards}/stills-000.tar", "again", "stills", f"{shards}/stills-000.tar", "sharp"],
    ]


def test_the_manifest_records_settings_and_counts(curated: Path) -> None:
    curation = storage.read_json(f"{curated}/manifest.json")["curation"]
    assert curation["counts"]["two"] == {"duplicate": 1, "kept": 1, "quarantined": 0}
    assert curation["thresholds"]["one"]["min_sharpness"] == 5.0
    assert curation["survey"]["cut_ratio"] == 2.2 and curation["long_scenes"] == "first"


def test_a_rerun_does_nothing_and_other_thresholds_redo_only_the_shards_concerned(
    curated: Path, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(shutil.copytree(curated, tmp_path / "cache"))
    before = times(cache)
    assert run_here(make_plan(shards, cache)).did_nothing
    assert times(cache) == before
    # no more survey, whatever the thresholds
    monkeypatch.setattr("tests.data_pipeline.run_here.SurveyActor", None)
    # another reason, the same records: nothing is encoded
    result = run_here(make_plan(shards, cache, LIMITS.model_copy(update={"max_static_share": 1.0})))
    after = times(cache)
    assert result.report["num_shards_this_run"] == 0
    assert result.report["filtered"]["too_still"] == 1 and "static" not in result.report["filtered"]
    assert changed(before, after, "index/") == changed(before, after, "shards/") == set()
    assert changed(before, after, "curation/") == {"lists/one-one-000.parquet", "scores.json"}
    # the static clip is kept now: its shard alone is done anew
    limits = LIMITS.model_copy(update={"max_static_share": 1.0, "min_motion": 0.0})
    assert run_here(make_plan(shards, cache, limits)).report["num_shards_this_run"] == 1
    assert changed(after, times(cache), "shards/") == {"one-one-000.tar"}
    assert "static" in keys(cache, "one")
    # another piece of the long scene, in the other shard
    result = run_here(make_plan(shards, cache, limits, long_scenes="split"))
    assert result.report["num_shards_this_run"] == 1
    assert {"long", "long-f000025"} <= set(keys(cache, "one"))


def test_a_shard_that_changed_is_surveyed_anew_and_others_are_not(curated: Path, shards: str, tmp_path: Path) -> None:
    raw = Path(shutil.copytree(shards, tmp_path / "raw"))
    cache = Path(shutil.copytree(curated, tmp_path / "cache"))
    before = times(cache)
    write_shards([RawClip("new", "png", encode_png(texture(50, 1)[0]), (Caption("new"),))], f"{raw}/stills-%03d.tar", 9)
    assert run_here(make_plan(str(raw), cache)).report["num_shards_this_run"] == 1
    surveys = {name for name in changed(before, times(cache), "curation/") if "/" not in name}
    assert surveys == {"stills-stills-000.parquet", "duplicates.txt", "scores.json"}
    assert keys(cache, "stills") == ["new"]


def test_a_survey_that_was_lost_is_made_again_alike(curated: Path, shards: str, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(curated, tmp_path / "cache"))
    plan = make_plan(shards, cache)
    path = Path(survey_path(str(cache), "two-two-000"))
    data = path.read_bytes()
    path.unlink()
    assert [task.name for task in unsurveyed(plan, plan_tasks(plan, describe_cache(plan)))] == ["two-two-000"]
    result = run_here(plan)
    assert path.read_bytes() == data and result.report["num_shards_this_run"] == 0


def test_lists_do_not_hang_on_who_was_surveyed_first(curated: Path, shards: str) -> None:
    plan = make_plan(shards, curated)
    tasks = plan_tasks(plan, describe_cache(plan))
    listed = make_lists(plan, tasks, writes=False)
    # sources in another order in the config: then the other copy is kept
    turned = replace(plan, sources=(plan.sources[1], plan.sources[0], plan.sources[2]))
    of_turned = make_lists(turned, plan_tasks(turned, describe_cache(plan)), writes=False)
    assert listed["two-two-000"].dropped == {"duplicate": 1} and of_turned["two-two-000"].dropped == {}
    assert of_turned["one-one-000"].dropped == listed["one-one-000"].dropped | {"duplicate": 1}
    everything = make_lists(make_plan(shards, curated, remove_duplicates=False), tasks, writes=False)
    assert "duplicate" not in everything["two-two-000"].dropped | everything["stills-stills-000"].dropped


def test_a_shard_of_two_sources_is_surveyed_once_and_is_no_duplicate_of_itself(
    curated: Path, shards: str, tmp_path: Path
) -> None:
    plan = make_plan(shards, tmp_path / "cache")
    both = replace(plan, sources=(*plan.sources[:2], plan.sources[1].model_copy(update={"name": "large"})))
    tasks = plan_tasks(both, describe_cache(both))
    assert [task.name for task in survey_tasks(both, tasks)] == ["one-one-000", "one-one-001", "large-two-000"]
    for task in survey_tasks(both, tasks):
        path = survey_path(str(curated), task.name.replace("large-", "two-"))
        storage.write_bytes(survey_path(str(tmp_path / "cache"), task.name), Path(path).read_bytes())
    assert unsurveyed(both, tasks) == []
    listed = make_lists(both, tasks)
    assert listed["two-two-000"].dropped == listed["large-two-000"].dropped == {"duplicate": 1}
    assert listed["two-two-000"].kept == listed["large-two-000"].kept == 1


def test_too_many_clips_that_cannot_be_surveyed_end_the_job_before_anything_is_encoded(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(shards, tmp_path / "cache")
    plan = replace(plan, precompute=plan.precompute.model_copy(update={"max_bad_fraction": 0.01}))
    monkeypatch.setattr("tests.data_pipeline.run_here.ShardActor", None)
    with pytest.raises(DataError, match=r"1 of at most 15 clips are quarantined, past .*one-001.tar of one: survey: "):
        run_here(plan)
    assert "poison" in (tmp_path / "cache" / "quarantine.txt").read_text()


def test_surveys_lists_and_what_is_kept_are_the_same_in_an_object_store(
    curated: Path, shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with object_store(monkeypatch) as (bucket, _):
        storage.write_bytes(f"{bucket}/raw/two-000.tar", Path(shards, "two-000.tar").read_bytes())
        plan = make_plan(shards, curated)
        source = plan.sources[1].model_copy(update={"shards": f"{bucket}/raw/two-000.tar"})
        precompute = plan.precompute.model_copy(update={"cache": f"{bucket}/cache"})
        remote = replace(plan, sources=(source,), precompute=precompute)
        assert run_here(remote).report["kept"] == 2
        assert run_here(remote).did_nothing
        assert read_clips(survey_path(f"{bucket}/cache", "two-two-000")) == read_clips(
            survey_path(str(curated), "two-two-000")
        )
        assert [row.key for row in LatentCache.open(f"{bucket}/cache").rows("two")] == ["copy", "own"]


def test_a_source_may_have_thresholds_of_its_own(curated: Path, shards: str) -> None:
    plan = make_plan(shards, curated)
    own = plan.sources[0].model_copy(update={"thresholds": LIMITS.model_copy(update={"min_height_px": 100})})
    strict = replace(plan, sources=(own, *plan.sources[1:]))
    listed = make_lists(strict, plan_tasks(strict, describe_cache(plan)), writes=False)
    assert listed["one-one-000"].kept == listed["one-one-001"].kept == 0
    # with its first copy gone the second stands
    assert listed["two-two-000"].kept == 2


def test_a_clip_that_kills_its_child_is_tried_alone_and_then_never_again(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bomb of a film: a child that reads it dies; its neighbours are surveyed."""
    bomb = encode_mp4(texture(60, 25), 24.0) + b"bomb"
    records = [
        RawClip("before", "mp4", encode_mp4(texture(61, 25), 24.0), (Caption("a"),)),
        RawClip("bomb", "mp4", bomb, (Caption("b"),)),
        RawClip("after", "mp4", encode_mp4(texture(62, 25), 24.0), (Caption("c"),)),
    ]
    write_shards(records, f"{tmp_path}/one-%03d.tar", 9)
    plan = make_plan(str(tmp_path), tmp_path / "cache")
    source = plan.sources[0].model_copy(update={"shards": f"{tmp_path}/one-000.tar"})
    plan = replace(plan, sources=(source,))
    asked: list[tuple[str, bool]] = []
    run = decoder_pool._Child.run

    def run_and_die(self: Any, verb: str, data: bytes, settings: dict[str, Any]) -> Any:
        asked.append((verb, data == bomb))
        if data == bomb:
            (self._process or self._start()).kill()
        return run(self, verb, data, settings)

    monkeypatch.setattr(decoder_pool._Child, "run", run_and_die)
    report = run_here(plan).report
    assert keys(tmp_path / "cache", "one") == ["after", "before"]
    (bad,) = report["quarantined"]
    assert bad["key"] == "bomb" and bad["error"].startswith("survey: decoder died: signal 9")
    assert asked.count(("survey", True)) == 2 and asked.count(("decode", True)) == 0
    assert run_here(plan).did_nothing and asked.count(("survey", True)) == 2


@pytest.mark.ray
@pytest.mark.slow
def test_both_passes_on_ray_give_what_they_give_here(curated: Path, shards: str, tmp_path: Path) -> None:
    shown: list[str] = []
    plan = make_plan(shards, tmp_path / "cache", num_actors=2)

    def session() -> AbstractContextManager[None]:
        return ray_session(LaunchSettings(), has_workers=False)

    result = run_precompute(plan, session, show_lists=shown.append)
    assert result.report["num_shards_this_run"] == 4 and shown == [str(tmp_path / "cache")]
    for name in sorted(times(curated)):
        if name != "report.json" and not name.startswith("leases/"):
            assert (tmp_path / "cache" / name).read_bytes() == (curated / name).read_bytes(), name
    assert run_precompute(plan, session).did_nothing


def test_a_shard_of_which_nothing_can_be_surveyed_keeps_nothing(tmp_path: Path) -> None:
    write_shards([RawClip("mute", "mp4", b"x", ())], f"{tmp_path}/one-%03d.tar", 9)
    write_shards(
        [RawClip("own", "mp4", encode_mp4(texture(7, 25), 24.0), (Caption("own"),))], f"{tmp_path}/two-%03d.tar", 9
    )
    plan = make_plan(str(tmp_path), tmp_path / "cache")
    one = plan.sources[0].model_copy(update={"shards": f"{tmp_path}/one-000.tar"})
    settings = plan.precompute.model_copy(update={"max_bad_fraction": 0.5})
    report = run_here(replace(plan, sources=(one, plan.sources[1]), precompute=settings)).report
    assert (report["kept"], report["num_clips"], len(report["quarantined"])) == (1, 2, 1)
    with pytest.raises(DataError, match="none of 1 clips was kept"):
        run_here(
            replace(
                plan,
                sources=(plan.sources[1].model_copy(update={"thresholds": CurationThresholds(min_seconds=9.0)}),),
                precompute=settings.model_copy(update={"cache": str(tmp_path / "other")}),
            )
        )


def test_copies_are_found_whatever_their_hashes_end_in() -> None:
    copies = _Copies()
    hashes = [f"{number:032x}" for number in (5, 7, 5, 5 << 120, 7, 0)]
    for row, content_hash in enumerate(hashes):
        copies.add("video", surveyed(content_hash=content_hash), 3 * row, 2**31 + row)
    assert copies.first_of() == {(6, 2**31 + 2): (0, 2**31), (12, 2**31 + 4): (3, 2**31 + 1)}
    copies.add("image", surveyed(content_hash=hashes[0]), 99, 0)
    copies.add("video", surveyed(content_hash=hashes[0], first_frame=4), 99, 1)
    assert len(copies.first_of()) == 2 and _Copies().first_of() == {}


def test_a_list_that_is_not_the_drivers_is_refused(curated: Path) -> None:
    with pytest.raises(DataError, match="was changed while this job ran"):
        ClipList.of(str(curated), "one-one-000", "another digest")
    with pytest.raises(DataError, match=r"curation/lists/none.parquet: is missing"):
        ClipList.of(str(curated), "none", "a digest")


def test_a_survey_of_other_columns_is_refused(curated: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes((curated / "index" / "one-one-000.parquet").read_bytes())
    with pytest.raises(DataError, match=r"x.parquet: is no survey or clip list of this version"):
        read_clips(str(path))


def test_a_dry_run_says_what_would_be_surveyed_and_writes_nothing(curated: Path, shards: str, tmp_path: Path) -> None:
    text = describe_plan(make_plan(shards, tmp_path / "cache")).splitlines()
    assert text[1].split() == ["one", "2", "2", "7", text[1].split()[4]]
    assert text[-1] == "curation: 4 of 4 shards would be surveyed, and the clips that pass it encoded"
    assert not (tmp_path / "cache").exists()
    before = times(curated)
    text = describe_plan(make_plan(shards, curated)).splitlines()
    assert text[1].split()[:4] == ["one", "2", "0", "4"]
    assert text[-1] == "curation: all 4 shards are surveyed; 6 clips are kept, 7 dropped"
    # other thresholds are judged without being written
    strict = LIMITS.model_copy(update={"min_height_px": 100})
    assert describe_plan(make_plan(shards, curated, strict)).splitlines()[1].split()[:4] == ["one", "2", "2", "0"]
    assert times(curated) == before


def surveyed(**changes: Any) -> SurveyedClip:
    values: dict[str, Any] = {
        "key": "k", "clip_key": "k", "content_hash": "h", "scene": 0, "part": 0, "first_frame": 0, "num_frames": 48,
        "seconds": 2.0, "fps": 24.0, "height_px": 360, "width_px": 640, "motion": 0.1, "static_share": 0.0,
        "black_share": 0.0, "brightness": 0.5, "contrast": 0.2, "sharpness": 300.0, "bars_share": 0.0,
    }  # fmt: skip
    return SurveyedClip(**values | changes)


@pytest.mark.parametrize(
    ("change", "reason", "of_an_image"),
    [
        ({}, None, None),
        ({"height_px": 127}, "too_small", "too_small"),
        ({"width_px": 127}, "too_small", "too_small"),
        ({"seconds": 0.99}, "too_short", None),
        ({"black_share": 0.21}, "black", "black"),
        ({"brightness": 0.03}, "too_dark", "too_dark"),
        ({"brightness": 0.97}, "too_bright", "too_bright"),
        ({"contrast": 0.02}, "flat", "flat"),
        ({"bars_share": 0.31}, "bars", "bars"),
        ({"sharpness": 9.0}, "blurred", "blurred"),
        ({"static_share": 0.81}, "static", None),
        ({"motion": 0.001}, "too_still", None),
        ({"motion": 2.1}, "too_fast", None),
        ({"part": 1}, "rest_of_scene", None),
        ({"height_px": 9, "sharpness": 0.0}, "too_small", "too_small"),
    ],
)
def test_each_threshold_has_a_reason(change: dict[str, Any], reason: str | None, of_an_image: str | None) -> None:
    limits = CurationThresholds()
    assert reason_by_thresholds(surveyed(**change), "video", limits, splits=False) == reason
    if "part" not in change:
        still = surveyed(**change | {"fps": 0.0})
        assert reason_by_thresholds(still, "image", limits, splits=False) == of_an_image


def test_a_film_in_a_source_of_images_is_none_and_a_split_keeps_later_pieces() -> None:
    assert reason_by_thresholds(surveyed(), "image", CurationThresholds(), splits=False) == "not_an_image"
    assert reason_by_thresholds(surveyed(part=3), "video", CurationThresholds(), splits=True) is None
