"""`jobs.inspect_cache` on a cache that the real codec made: each subject, its exit code, and what it leaves behind."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.cache_manifest import index_path
from data_pipeline.captions import Caption
from data_pipeline.latent_cache import LatentCache
from data_pipeline.manifest import read_index, write_index
from data_pipeline.pack import RawClip, write_shards
from data_pipeline.precompute_plan import PrecomputePlan
from jobs import inspect_cache
from m4v_dist.config.load import load_config
from m4v_dist.frozen.video_file import decode_image, encode_mp4, encode_png, read_video
from m4v_dist.lease import hold
from tests.data_pipeline.made_cache import moving_blocks
from tests.data_pipeline.run_here import run_here
from tests.jobs.tiny_run import TOML


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips, of which one has two captions, and a still."""
    folder = tmp_path_factory.mktemp("made")
    clips = [
        RawClip(f"deep/c{n}", "mp4", encode_mp4(moving_blocks(n, 18), 16.0), (Caption(f"b {n}"),)) for n in range(3)
    ]
    clips[1] = replace(clips[1], captions=(Caption("blocks", 3.0), Caption("Blöcke → rechts")))
    write_shards(clips, f"{folder}/shards/clips-%03d.tar", 9)
    still = RawClip("s", "png", encode_png(moving_blocks(7, 1)[0]), (Caption("a still"),))
    write_shards([still], f"{folder}/shards/unseen-%03d.tar", 9)
    text = TOML.format(folder=folder).replace(
        'media = "video"\nlicence = "made up"\nsplit', 'media = "image"\nlicence = "made up"\nsplit'
    )
    (folder / "tiny.toml").write_text(text)
    config = load_config(str(folder / "tiny.toml"), [])
    run_here(PrecomputePlan(config.sources, config.precompute, config.codec, config.text_encoder))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the cache, with a config that names it."""
    shutil.copytree(made / "cache", tmp_path / "cache")
    (tmp_path / "tiny.toml").write_text((made / "tiny.toml").read_text().replace(str(made), str(tmp_path)))
    return tmp_path


def run(folder: Path, subject: str, *overrides: str) -> int:
    return inspect_cache.main([subject, "--config", str(folder / "tiny.toml"), *overrides])


def test_the_table_has_a_row_for_each_source_and_bucket(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "table") == 0
    lines = capfd.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:9]] == ["clips", "64x64", "3", "27", "6", "3.4", "4", "19"]
    assert [cell.strip() for cell in lines[3].split("|")[1:8]] == ["unseen", "64x64", "1", "1", "1", "0.0", "1"]
    assert "kept by decoder, dropped ones too: decord 3, pillow 1" in lines
    assert "4 records of 2 sources" in lines[-1] and not (folder / "run").exists()
    assert run(folder, "table", 'inspect.from_sources=["stills"]') == 2
    assert "has no stills; it has clips, unseen" in capfd.readouterr().err


def test_histograms_are_one_picture_of_all_that_the_index_knows(folder: Path) -> None:
    assert run(folder, "histograms") == 0
    svg = (folder / "run/inspect/histograms.svg").read_text()
    for title in ("frames of a clip", "tokens of a caption", "captions of a clip", "score motion", "KiB of a record"):
        assert title in svg
    assert run(folder, "histograms") == 0
    assert (folder / "run/inspect/histograms.svg").read_text() == svg


def test_records_are_decoded_to_what_they_were_made_of(folder: Path) -> None:
    assert run(folder, "decode", "inspect.num_records=9") == 0
    decoded = folder / "run/inspect/decoded"
    records = json.loads((decoded / "records.json").read_text())["records"]
    assert [record["key"] for record in records] == ["deep/c0", "deep/c1", "deep/c2", "s"]
    assert records[1]["captions"] == [{"text": "blocks", "weight": 3.0}, {"text": "Blöcke → rechts", "weight": 1.0}]
    frames, fps = read_video(str(decoded / records[0]["file"]))
    assert frames.shape == (9, 64, 64, 3) and fps == 8.0
    assert decode_image((decoded / records[3]["file"]).read_bytes()).shape == (1, 64, 64, 3)
    # the mean colour of a block transform's frame is its source's
    source = moving_blocks(0, 1)[0][:, 16:112].astype(float)
    assert abs(frames[0].astype(float).mean() - source.mean()) < 12
    sheet = decode_image((decoded / "contact_sheet.png").read_bytes())
    assert sheet.shape[1] > sheet.shape[2] / 2 and sheet.std() > 20


def test_keys_name_what_is_decoded_and_a_draw_is_the_same_each_time(folder: Path) -> None:
    def keys(*overrides: str) -> list[str]:
        assert run(folder, "decode", *overrides) == 0
        records = json.loads((folder / "run/inspect/decoded/records.json").read_text())["records"]
        assert len(list((folder / "run/inspect/decoded").iterdir())) == len(records) + 2
        return [record["key"] for record in records]

    assert keys('inspect.keys=["unseen/s", "clips/deep/c2"]') == ["s", "deep/c2"]
    drawn = keys("inspect.num_records=1", 'inspect.from_sources=["clips"]')
    assert len(drawn) == 1 and drawn == keys("inspect.num_records=1", 'inspect.from_sources=["clips"]')


@pytest.mark.parametrize(
    ("overrides", "exit_code", "message"),
    [
        (('inspect.keys=["clips/nothing"]',), 3, "holds no record clips/nothing"),
        (('inspect.keys=["nothing"]',), 2, "inspect.keys: 'nothing' is no record; write source/key"),
        (("precompute.cache=elsewhere",), 3, "no finished latent cache"),
    ],
)
def test_what_cannot_be_decoded_is_refused_by_name(
    folder: Path, capfd: pytest.CaptureFixture[str], overrides: tuple[str, ...], exit_code: int, message: str
) -> None:
    assert run(folder, "decode", *overrides) == exit_code
    assert message in capfd.readouterr().err.splitlines()[-1]


def test_a_cache_of_another_codec_is_refused_by_the_field(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((folder / "cache/manifest.json").read_text())
    manifest["fingerprint"]["codec_weights_sha256"] = "aa"
    (folder / "cache/manifest.json").write_text(json.dumps(manifest))
    assert run(folder, "decode") == 3
    assert "codec_weights_sha256: cache has 'aa'" in capfd.readouterr().err


def test_verify_lists_damaged_records_and_the_list_can_be_dropped(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "verify") == 0
    assert "4 records" in capfd.readouterr().out.splitlines()[-1]
    tar = folder / "cache/shards/clips-clips-000.tar"
    row = read_index(index_path(str(folder / "cache"), "clips-clips-000"))[0][1]
    data = bytearray(tar.read_bytes())
    data[row.offset_bytes + 600] ^= 1
    tar.write_bytes(bytes(data))
    assert run(folder, "verify") == 3
    error = capfd.readouterr().err.splitlines()[-1]
    assert "1 of 4 records are damaged, the first is clips/deep/c1 in shard clips-clips-000" in error
    assert "remove " in error and "clips-clips-000.parquet" in error
    listed = folder / "run/inspect/damaged.txt"
    assert listed.read_text().split("\t")[:3] == ["clips", "clips-clips-000", "deep/c1"]

    assert run(folder, "drop", f"inspect.drop_list={listed}", "--dry-run") == 0
    assert len(LatentCache.open(str(folder / "cache")).rows("clips")) == 3
    assert run(folder, "drop", f"inspect.drop_list={listed}") == 0
    assert "runs in progress on it refuse to go on" in capfd.readouterr().out.splitlines()[-1]
    assert len(LatentCache.open(str(folder / "cache")).rows("clips")) == 2
    assert json.loads((folder / "cache/report.json").read_text())["dropped"] == 1
    assert run(folder, "drop", f"inspect.drop_list={listed}") == 0
    assert "nothing to do" in capfd.readouterr().out.splitlines()[-1]
    assert run(folder, "verify") == 0
    assert "1 dropped before" in capfd.readouterr().out.splitlines()[-1]


def test_a_fault_beside_the_records_is_exit_3_too(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = index_path(str(folder / "cache"), "clips-clips-000")
    rows, notes = read_index(path)
    write_index(path, rows[1:], notes)
    assert run(folder, "verify") == 3
    assert "leaves bytes of no record before it" in capfd.readouterr().err.splitlines()[-1]


def test_drop_without_a_list_or_with_an_unknown_record_changes_nothing(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "drop") == 2
    (folder / "list.txt").write_text("clips/deep/c0\nclips/c0\n")
    assert run(folder, "drop", f"inspect.drop_list={folder}/list.txt") == 3
    assert "holds no record clips/c0; nothing was dropped" in capfd.readouterr().err
    assert len(LatentCache.open(str(folder / "cache")).rows("clips")) == 3


def test_the_subject_comes_first(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        inspect_cache.main(["--config", "x.toml", "verify"])
    assert "the subject comes first" in capfd.readouterr().err


def test_a_drop_is_refused_while_another_job_is_at_work_on_the_cache(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "list.txt").write_text("clips/deep/c0\n")
    with hold(str(folder / "cache"), 60.0):
        assert run(folder, "drop", f"inspect.drop_list={folder}/list.txt") == 2
    assert "RunInUseError" in capfd.readouterr().err.splitlines()[-1]
    assert len(LatentCache.open(str(folder / "cache")).rows("clips")) == 3
    assert run(folder, "drop", f"inspect.drop_list={folder}/list.txt") == 0
