"""`jobs.pack`: files to shards that the rest reads, the same bytes each time, and nothing where an entry is bad."""

import json
from pathlib import Path

import pytest

from data_pipeline.manifest import list_shards
from data_pipeline.pack import RawClip, read_shard
from jobs import cli
from jobs.pack import pack
from tests.jobs.tiny_run import TOML


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny.toml").write_text(TOML.format(folder=tmp_path))
    (tmp_path / "media").mkdir()
    for number in range(5):
        (tmp_path / "media" / f"c{number}.mp4").write_bytes(bytes([number]) * 600_000)
        (tmp_path / "media" / f"c{number}.json").write_text(json.dumps({"captions": [f"clip {number}", "a clip"]}))
    return tmp_path


def run(folder: Path, *overrides: str) -> int:
    return cli.main("pack", pack, "x", ["--config", str(folder / "tiny.toml"), *overrides])


def test_a_folder_becomes_shards_with_the_pattern_to_read_them_by(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    media, shards = f"pack.input={folder}/media", f"pack.shards={folder}/out/x-%03d.tar"
    assert run(folder, media, shards, "--dry-run") == 0
    assert not (folder / "out").exists() and not (folder / "run").exists()
    assert run(folder, media, shards, "pack.max_shard_mib=1") == 0
    last = capfd.readouterr().out.splitlines()[-1]
    assert (
        f"5 records in 3 shards (0 left out, 0 other files); give the source shards = '{folder}/out/x-{{000..002}}.tar'"
        in last
    )
    paths = list_shards(last.split("'")[1])
    clips = [clip for path in paths for clip in read_shard(path)]
    assert all(isinstance(clip, RawClip) and clip.fault is None for clip in clips)
    assert [(clip.key, len(clip.captions)) for clip in clips if isinstance(clip, RawClip)] == [
        (f"c{number}", 2) for number in range(5)
    ]
    assert (
        run(folder, media, f"pack.shards={folder}/again/x-%03d.tar", "pack.max_shard_mib=1", "pack.num_threads=2") == 0
    )
    for path in paths:
        assert Path(path).read_bytes() == (folder / "again" / Path(path).name).read_bytes()
    assert run(folder, media, shards) == 2
    assert "x-000.tar stands there already (3 such shards)" in capfd.readouterr().err


def test_bad_entries_end_the_job_before_anything_is_packed_or_are_left_out_within_the_limit(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "media" / "c1.json").write_bytes(b"[]")
    arguments = (f"pack.input={folder}/media", f"pack.shards={folder}/out/x-%03d.tar")
    assert run(folder, *arguments) == 3
    assert "1 of 5 entries cannot be packed" in capfd.readouterr().err and not (folder / "out").exists()
    assert (folder / "run/pack_errors.txt").read_text() == "c1.mp4: json is [], not an object\n"
    assert run(folder, *arguments, "pack.max_bad_fraction=0.2") == 0
    assert "4 records in 1 shards (1 left out" in capfd.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "pack.input and pack.shards must be set"),
        (("pack.input=x", "pack.shards=x.tar"), "needs one number such as %05d"),
        (("pack.input=x", "pack.shards=x-%05d.zip"), "to end in .tar"),
        (("pack.input=media", "pack.root=y", "pack.shards=x-%05d.tar"), "pack.root='y' is for a file of annotations"),
    ],
)
def test_settings_that_cannot_work_are_exit_2(
    folder: Path, capfd: pytest.CaptureFixture[str], overrides: tuple[str, ...], message: str
) -> None:
    assert run(folder, *overrides) == 2
    assert message in capfd.readouterr().err
