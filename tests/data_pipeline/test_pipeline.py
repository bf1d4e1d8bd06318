"""The precompute: quarantine and neighbours, nothing to do the second time, equal bytes, refusals, Ray."""

import io
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import pack
from data_pipeline.cache_manifest import shard_path
from data_pipeline.captions import Caption
from data_pipeline.latent_cache import LatentCache
from data_pipeline.manifest import list_shards
from data_pipeline.pack import RawClip, write_shards
from data_pipeline.pipeline import run_precompute
from data_pipeline.plan_table import describe_plan
from data_pipeline.precompute_plan import PrecomputePlan, ShardTask, plan_tasks
from data_pipeline.precompute_progress import BadLimit, DoneShards, collect
from data_pipeline.shard_actor import ShardActor
from m4v_dist import storage
from m4v_dist.config.data_settings import (
    BucketSettings,
    CodecSettings,
    PrecomputeSettings,
    SourceSettings,
    TextEncoderSettings,
)
from m4v_dist.config.training_settings import LaunchSettings
from m4v_dist.errors import ConfigError, DataError, JobError, OutOfMemoryJobError, RetriesExhaustedError, StoreError
from m4v_dist.frozen.text_encoder import build_text_encoder
from m4v_dist.frozen.video_file import encode_mp4, encode_png
from m4v_dist.frozen.video_vae import build_codec
from m4v_dist.launch.ray_session import ray_session
from m4v_dist.lease import Lease
from tests.data_pipeline.made_cache import moving_blocks
from tests.data_pipeline.run_here import run_here, run_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two shards of clips and one of stills; in the first clip shard one broken file stands between sound ones."""
    folder = str(tmp_path_factory.mktemp("raw"))
    clips = [
        RawClip(f"c{n}", "mp4", encode_mp4(moving_blocks(n, 18 + n), 12.0), (Caption(f"blocks {n}"),)) for n in range(5)
    ]
    clips.insert(1, RawClip("broken", "mp4", clips[0].data[:300], (Caption("half a clip"),)))
    clips.append(RawClip("short", "mp4", encode_mp4(moving_blocks(8, 5), 12.0), (Caption("five frames"),)))
    clips.append(RawClip("mute", "mp4", clips[0].data, ()))
    write_shards(clips, f"{folder}/clips-%03d.tar", 4)
    stills = [RawClip(f"s{n}", "png", encode_png(moving_blocks(n, 1)[0]), (Caption(f"a still {n}"),)) for n in range(3)]
    write_shards(stills, f"{folder}/stills-%03d.tar", 9)
    return folder


def make_plan(shards: str, cache: Path, **changes: Any) -> PrecomputePlan:
    sources = (
        SourceSettings(name="clips", shards=f"{shards}/clips-{{000..001}}.tar", media="video", licence="none"),
        SourceSettings(name="stills", shards=f"{shards}/stills-000.tar", media="image", licence="none"),
    )
    values = {"num_frames": 17, "max_bad_fraction": 0.4, "num_retries": 1} | changes
    precompute = PrecomputeSettings(cache=str(cache), buckets=(BucketSettings(height_px=64, width_px=64),), **values)
    return PrecomputePlan(sources, precompute, CodecSettings(), TextEncoderSettings())


def copy_shards(shards: str, folder: Path) -> Path:
    """The raw shards once more, to be harmed."""
    folder.mkdir(exist_ok=True)
    for name in ("clips-000.tar", "clips-001.tar", "stills-000.tar"):
        shutil.copy(Path(shards, name), folder / name)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Files of a cache by path; who worked on it, in `leases/`, is no part of it."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {path: data for path, data in files.items() if not path.startswith("leases/")}


def times(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def check_report(report: dict[str, Any]) -> None:
    assert report["kept"] == 8 and report["num_clips"] == 11
    assert report["filtered"] == {"too_short": 1}
    bad = {entry["key"]: entry for entry in report["quarantined"]}
    assert set(bad) == {"broken", "mute"}
    assert bad["broken"]["shard"] == "clips-000.tar" and "the file is cut" in bad["broken"]["error"]
    assert report["decoders"] == {"decord": 5, "pillow": 3}
    assert bad["mute"]["error"] == "caption is missing" and bad["mute"]["source"] == "clips"


def no_session() -> AbstractContextManager[None]:
    """A `ray_session` of a run that must not start Ray."""
    raise AssertionError("workers started for nothing")


def local_session() -> AbstractContextManager[None]:
    """A `ray_session` as jobs.precompute_latents gives it."""
    return ray_session(LaunchSettings(), has_workers=False)


@pytest.fixture
def ray_folders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The folders of the local Rays that a test starts, in order; what it leaves is removed."""
    folders: list[Path] = []
    make_folder = tempfile.mkdtemp

    def noted(*args: Any, **kwargs: Any) -> str:
        folder = make_folder(*args, **kwargs)
        if Path(folder).name.startswith("ray-"):
            folders.append(Path(folder))
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", noted)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    yield folders
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
def test_ray_fills_the_cache_and_does_nothing_the_second_time(
    shards: str, tmp_path: Path, ray_folders: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    plan = make_plan(shards, tmp_path / "cache")
    result = run_precompute(plan, local_session)
    assert not result.did_nothing
    check_report(result.report)
    (ray_folder,) = ray_folders
    assert not ray_folder.exists() and "Ray's logs stay" not in caplog.text
    before = times(tmp_path / "cache")
    again = run_precompute(plan, no_session)
    assert again.did_nothing and times(tmp_path / "cache") == before
    fingerprint = build_codec(plan.codec).fingerprint() | build_text_encoder(plan.text_encoder).fingerprint()
    cache = LatentCache.open(plan.precompute.cache, fingerprint)
    assert [row.key for row in cache.rows("clips")] == [f"c{n}" for n in range(5)]
    record = cache.read(cache.rows("clips")[2])
    assert record.latents.shape == (16, 3, 8, 8)
    scores = json.loads(cache.rows("clips")[0].scores)
    assert 0.2 < scores["brightness"] < 0.8 and scores["motion"] > 0.01
    assert cache.rows("stills")[0].num_latents == 1 and cache.media("stills") == "image"
    # a shard that cannot be written ends the job with its name, after the others
    (tmp_path / "second" / "shards" / "stills-stills-000.tar").mkdir(parents=True)
    with pytest.raises(DataError, match="stills-stills-000"):
        run_precompute(make_plan(shards, tmp_path / "second"), local_session)
    assert ray_folders[1].exists() and f"Ray's logs stay in {ray_folders[1]}" in caplog.text


def test_a_rerun_elsewhere_gives_equal_bytes(shards: str, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        check_report(run_here(make_plan(shards, tmp_path / name)).report)
        found.append({k: v for k, v in contents(tmp_path / name).items() if k != "report.json"})
    assert len(found[0]) == 10 and found[0] == found[1]


def test_a_restart_redoes_uncommitted_shards_only(shards: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    run_here(make_plan(shards, cache))
    whole, before = contents(cache), times(cache)
    # killed between placing the second tar and committing it, with a half-written file beside
    (cache / "index" / "clips-clips-001.parquet").unlink()
    (cache / "manifest.json").unlink()
    (cache / "shards" / "clips-clips-001.tar.tmp-12345678").write_bytes(b"half")
    result = run_here(make_plan(shards, cache))
    assert result.report["num_shards_this_run"] == 1
    check_report(result.report)
    after = times(cache)
    assert {k: v for k, v in contents(cache).items() if k != "report.json"} == {
        k: v for k, v in whole.items() if k != "report.json"
    }
    assert after["shards/clips-clips-000.tar"] == before["shards/clips-clips-000.tar"]
    assert after["shards/clips-clips-001.tar"] != before["shards/clips-clips-001.tar"]


def test_a_shard_that_changed_is_done_again(shards: str, tmp_path: Path) -> None:
    raw = copy_shards(shards, tmp_path / "raw")
    run_here(make_plan(str(raw), tmp_path / "cache"))
    write_shards(
        [RawClip("new", "png", encode_png(moving_blocks(50, 1)[0]), (Caption("new"),))], f"{raw}/stills-%03d.tar", 9
    )
    result = run_here(make_plan(str(raw), tmp_path / "cache"))
    assert result.report["num_shards_this_run"] == 1 and result.report["kept"] == 6
    assert [row.key for row in LatentCache.open(str(tmp_path / "cache")).rows("stills")] == ["new"]


def test_too_many_bad_clips_end_the_job_after_the_report(shards: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match=r"2 of 11 clips are quarantined .*max_bad_fraction=0.17"):
        run_here(make_plan(shards, cache, max_bad_fraction=0.17))
    assert (cache / "quarantine.txt").read_text().count("\n") == 2
    check_report(storage.read_json(f"{cache}/report.json"))
    with pytest.raises(DataError, match="no finished latent cache"):
        LatentCache.open(str(cache))
    # the work stands: with a higher limit nothing is encoded again
    assert run_here(make_plan(shards, cache)).report["num_shards_this_run"] == 0
    assert LatentCache.open(str(cache)).manifest["sources"]["clips"]["records"] == 5


def test_a_job_that_has_failed_by_then_ends_before_its_end(shards: str, tmp_path: Path) -> None:
    # 4 clips a shard at most and 3 shards: one bad clip is one of at most 12, above 8 %, and stands in the first shard
    for num_committed in (1, 0):
        with pytest.raises(DataError, match=r"1 clips are quarantined, and 3 shards .*=0.08, .*after 1 shards"):
            run_here(make_plan(shards, tmp_path / "cache", max_bad_fraction=0.08))
        report = storage.read_json(f"{tmp_path}/cache/report.json")
        assert report["num_shards_this_run"] == num_committed and report["num_shards"] == 1
    assert run_here(make_plan(shards, tmp_path / "cache")).report["num_shards_this_run"] == 2


def test_a_cache_of_other_settings_is_refused_by_the_field(shards: str, tmp_path: Path) -> None:
    run_here(make_plan(shards, tmp_path / "cache"))
    before = times(tmp_path / "cache")
    with pytest.raises(DataError, match=r"fps: cache 24.0, config 6.0"):
        run_here(make_plan(shards, tmp_path / "cache", fps=6.0))
    assert times(tmp_path / "cache") == before


def test_a_shard_whose_worker_died_too_often_is_given_up(shards: str, tmp_path: Path) -> None:
    plan = make_plan(shards, tmp_path / "cache")
    task = plan_tasks(plan, {})[0]
    actor = ShardActor(plan)
    note = tmp_path / "cache" / "attempts" / task.name
    note.parent.mkdir(parents=True)
    note.write_text("3")  # as three workers leave it that were killed in this shard
    batch = {"task": [json.dumps(asdict(task))]}
    assert actor(batch)["error"] == [""] and not note.exists()
    note.write_text("4")
    assert actor(batch)["error"][0].startswith("RetriesExhaustedError: ") and task.path in actor(batch)["error"][0]
    actor.close()


def test_no_clip_kept_is_an_error(shards: str, tmp_path: Path) -> None:
    plan = make_plan(shards, tmp_path / "cache", min_frames=33, num_frames=33)
    only_clips = PrecomputePlan(plan.sources[:1], plan.precompute, plan.codec, plan.text_encoder)
    with pytest.raises(DataError, match="none of 8 clips was kept"):
        run_here(only_clips)


def test_a_missing_shard_stops_before_workers_start(shards: str, tmp_path: Path) -> None:
    raw = copy_shards(shards, tmp_path / "raw")
    (raw / "clips-001.tar").unlink()
    with pytest.raises(DataError, match=r"1 of 2 shards .*clips-001.tar; correct .*or bring the files back") as caught:
        run_precompute(make_plan(str(raw), tmp_path / "cache"), no_session)
    assert "no folder" not in str(caught.value)


def test_a_missing_folder_of_shards_is_named_with_what_packs_it(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"there is no folder {tmp_path}/runs/demo/shards; .*`make demo` packs"):
        list_shards("runs/demo/shards/clips-{000..002}.tar")
    copy_shards(shards, tmp_path)
    assert list_shards("clips-000.tar") == ["clips-000.tar"]
    with pytest.raises(DataError, match="bring the files back"):
        list_shards("clips-009.tar")


def test_equal_file_names_of_two_folders_get_two_outputs(shards: str, tmp_path: Path) -> None:
    plan = make_plan(shards, tmp_path / "cache")
    for folder in ("a", "b"):
        still = RawClip(f"{folder}0", "png", encode_png(moving_blocks(0, 1)[0]), (Caption("a still"),))
        (written,) = write_shards([still], f"{tmp_path}/{folder}/%d.tar", 1)
        Path(written).rename(tmp_path / folder / "x.tar")
    source = plan.sources[1].model_copy(update={"shards": f"{tmp_path}/{{a,b}}/x.tar"})
    both = PrecomputePlan((source,), plan.precompute, plan.codec, plan.text_encoder)
    names = [task.name for task in plan_tasks(both, {})]
    assert len(set(names)) == 2 and all(name.startswith("stills-x-") for name in names)


def test_a_dry_run_counts_and_writes_nothing(shards: str, tmp_path: Path) -> None:
    text = describe_plan(make_plan(shards, tmp_path / "cache"))
    assert [line.split()[:4] for line in text.splitlines()[1:3]] == [
        ["clips", "2", "2", "8"],
        ["stills", "1", "1", "3"],
    ]
    assert not (tmp_path / "cache").exists()


class _Broken(io.RawIOBase):
    """A reader of an object store whose server stops answering after `good` bytes: then it raises `error`."""

    def __init__(self, data: bytes, good: int, error: OSError) -> None:
        self._stream, self._left, self._error = io.BytesIO(data), good, error

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if self._left <= 0:
            raise self._error
        data = self._stream.read(size)
        self._left -= len(data)
        return data


@pytest.mark.parametrize(
    "error", [TimeoutError("read timed out"), StoreError("clips-001.tar: EndpointConnectionError")], ids=repr
)
def test_a_read_that_the_store_fails_fails_its_shard_and_commits_nothing(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    plan = make_plan(shards, tmp_path / "cache")

    @contextmanager
    def open_read(path: str) -> Iterator[io.RawIOBase]:
        yield _Broken(Path(path).read_bytes(), 20000 if path.endswith("clips-001.tar") else 1 << 30, error)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "open_read", open_read)
        assert isinstance(next(iter(pack.read_shard(f"{shards}/clips-001.tar"))), RawClip)
        with pytest.raises(DataError, match=rf"1 of 3 shards .*clips-clips-001: {type(error).__name__}: {error}"):
            run_here(plan)
    assert storage.list_folder(f"{tmp_path}/cache/index") == ["clips-clips-000.parquet", "stills-stills-000.parquet"]
    assert not (tmp_path / "cache" / "attempts" / "clips-clips-001").exists()
    result = run_here(plan)
    assert result.report["num_shards_this_run"] == 1
    check_report(result.report)


def test_a_damaged_shard_is_counted_apart_and_past_the_limit_ends_the_job(shards: str, tmp_path: Path) -> None:
    raw = copy_shards(shards, tmp_path / "raw")
    whole = (raw / "clips-000.tar").read_bytes()
    (raw / "clips-000.tar").write_bytes(whole[: whole.index(b"c2.mp4") + 2000])
    cache = tmp_path / "cache"
    # one bad clip of two that were read: it alone would not pass the limit of three shards as large
    with pytest.raises(DataError, match=r"1 of 3 shards are damaged.*=0.32, .*after 1 shards .*clips-000.tar of clips"):
        run_here(make_plan(str(raw), cache, max_bad_fraction=0.32))
    report = storage.read_json(f"{cache}/report.json")
    (damaged,) = report["damaged_shards"]
    assert (damaged["shard"], damaged["source"], damaged["num_clips_before"]) == ("clips-000.tar", "clips", 2)
    assert [entry["key"] for entry in report["quarantined"]] == ["broken"]
    assert damaged["error"] == "tar breaks off: ReadError: unexpected end of data"
    assert "clips\tclips-000.tar\t(rest of the shard)\t" in (cache / "quarantine.txt").read_text()
    assert run_here(make_plan(str(raw), cache)).report["kept"] == 6


def test_only_a_death_leaves_a_note_of_an_attempt(shards: str, tmp_path: Path) -> None:
    plan = make_plan(shards, tmp_path / "cache")
    task = plan_tasks(plan, {})[0]
    actor = ShardActor(plan)
    # its tar cannot be placed
    Path(shard_path(plan.precompute.cache, task.name)).mkdir(parents=True)
    for _ in range(5):
        found = actor({"task": [json.dumps(asdict(task))]})
        assert found["exit_code"] == [3] and "Error" in found["error"][0]
        assert storage.list_folder(f"{tmp_path}/cache/attempts") == []
    actor.close()


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([3, 4, 6], OutOfMemoryJobError), ([3, 6], RetriesExhaustedError), ([3, 3], DataError), ([2, 3], ConfigError)],
)
def test_the_exit_code_of_failed_shards_does_not_hang_on_their_order(
    codes: list[int], expected: type[JobError]
) -> None:
    rows = [{"name": f"s{code}", "outcome": "", "error": f"from {code}", "exit_code": code} for code in codes]
    for ordered in (rows, rows[::-1]):
        with pytest.raises(expected, match=f"from {expected.exit_code}"):
            collect(ordered, len(rows))


@pytest.mark.parametrize("name", ["report.json", "null_prompt.safetensors"])
def test_a_file_beside_the_shards_that_is_gone_is_written_again(name: str, shards: str, tmp_path: Path) -> None:
    plan = make_plan(shards, tmp_path / "cache")
    run_here(plan)
    (tmp_path / "cache" / name).unlink()
    result = run_here(plan)
    assert not result.did_nothing and result.report["num_shards_this_run"] == 0
    LatentCache.open(plan.precompute.cache)
    assert run_here(plan).did_nothing


def test_a_broken_decord_ends_the_job_before_any_work(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "decord.py").write_text("raise ImportError('no libdecord here')")
    monkeypatch.syspath_prepend(str(tmp_path / "broken"))
    plan = make_plan(shards, tmp_path / "cache")
    with pytest.raises(ConfigError, match="no libdecord here"):
        run_precompute(plan, no_session)
    with pytest.raises(ConfigError, match="no libdecord here"):
        describe_plan(plan)
    assert not (tmp_path / "cache").exists()
    # stills go without it
    run_here(replace(plan, sources=plan.sources[1:]))


def test_a_decord_that_is_broken_on_a_worker_alone_quarantines_nothing(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(shards, tmp_path / "cache")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "decord.py").write_text("raise ImportError('no libdecord here')")

    def on_a_broken_node(plan: PrecomputePlan, pending: list[ShardTask], lease: Lease, limit: BadLimit) -> DoneShards:
        monkeypatch.syspath_prepend(str(tmp_path / "broken"))
        return run_shards(plan, pending, lease, limit)

    with pytest.raises(ConfigError, match="2 of 3 shards could not be done .*no libdecord here"):
        run_precompute(plan, nullcontext, on_a_broken_node)
    assert not (tmp_path / "cache" / "quarantine.txt").exists()


def test_two_sources_of_one_set_of_shards_give_it_in_two_sizes(shards: str, tmp_path: Path) -> None:
    """Of equal aspect ratio: without buckets of its own every clip would go to the first size."""
    small, large = BucketSettings(height_px=64, width_px=64), BucketSettings(height_px=128, width_px=128)
    pattern = f"{shards}/clips-{{000..001}}.tar"
    sources = tuple(
        SourceSettings(name=name, shards=pattern, media="video", licence="none", buckets=buckets)
        for name, buckets in (("small", (small,)), ("large", (large,)), ("any", ()))
    )
    plan = make_plan(shards, tmp_path / "cache")
    plan = replace(plan, sources=sources, precompute=plan.precompute.model_copy(update={"buckets": (small, large)}))
    run_here(plan)
    cache = LatentCache.open(str(tmp_path / "cache"))
    sizes = {name: {(row.height_px, row.width_px) for row in cache.rows(name)} for name in cache.sources}
    assert sizes == {"small": {(64, 64)}, "large": {(128, 128)}, "any": {(64, 64)}}
    assert [row.key for row in cache.rows("small")] == [row.key for row in cache.rows("large")]
    assert cache.read(cache.rows("large")[0]).latents.shape[-2:] == (16, 16)
    assert run_here(plan).did_nothing
    # Other buckets are other bytes, so the source's shards are redone; the others are not.
    moved = replace(plan, sources=(sources[0].model_copy(update={"buckets": (large,)}), *sources[1:]))
    before, after = ({task.name: task.fingerprint for task in plan_tasks(p, {})} for p in (plan, moved))
    assert {name for name in before if before[name] != after[name]} == {"small-clips-000", "small-clips-001"}


def test_a_merged_index_that_is_gone_or_spoilt_is_merged_anew_by_a_rerun(shards: str, tmp_path: Path) -> None:
    plan = make_plan(shards, tmp_path)
    run_here(plan)
    index = tmp_path / "index.arrow"
    merged, fragments = index.read_bytes(), {p: p.stat().st_mtime_ns for p in (tmp_path / "index").iterdir()}
    for spoil in (index.unlink, lambda: index.write_bytes(merged[:-1])):
        spoil()
        assert not run_here(plan).did_nothing
        assert index.read_bytes() == merged
        assert {p: p.stat().st_mtime_ns for p in (tmp_path / "index").iterdir()} == fragments
    assert run_here(plan).did_nothing


def test_while_its_shards_are_done_anew_a_cache_is_unfinished(shards: str, tmp_path: Path) -> None:
    plan = make_plan(shards, tmp_path)
    run_here(plan)
    next((tmp_path / "index").iterdir()).unlink()

    def die(*_: object) -> None:
        assert not (tmp_path / "index.arrow").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_precompute(plan, nullcontext, die)
    with pytest.raises(DataError, match="no finished latent cache"):
        LatentCache.open(str(tmp_path))
