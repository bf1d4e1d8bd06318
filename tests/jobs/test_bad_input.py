"""Bad input through the real verbs: exit code, last line and result.json, one row each."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_pipeline.captions import Caption
from data_pipeline.pack import RawClip, write_shards
from jobs import cli
from jobs.precompute_latents import precompute_latents
from m4v_dist.config.training_settings import LaunchSettings
from m4v_dist.frozen.video_file import encode_mp4
from m4v_dist.launch.ray_session import ray_session
from tests.data_pipeline.made_cache import moving_blocks

TOML = """
[run]
name = "bad-input"
folder = "{folder}/run"
[[sources]]
name = "clips"
shards = "{folder}/raw/clips-{{000..001}}.tar"
media = "video"
licence = "MIT"
[precompute]
cache = "{folder}/cache"
num_frames = 17
buckets = [{{height_px = 64, width_px = 64}}]
[model]
preset = "tiny"
[[curriculum]]
name = "video"
num_steps = 5
num_latents = 3
weights = {{clips = 1.0}}
buckets = [{{height_px = 64, width_px = 64}}]
"""

VERBS: dict[str, cli.Verb] = {"precompute_latents": precompute_latents}


@dataclass(frozen=True)
class Case:
    """One bad input.

    Args:
        name: of the row.
        verb: key of `VERBS`.
        harm: what is done to the good run's folder, which holds `raw/` and `run.toml`.
        overrides: on the command line.
        exit_code: of the job.
        last_line: a part of it, after the verb and the error's name.
    """

    name: str
    verb: str
    harm: Callable[[Path], object]
    overrides: tuple[str, ...]
    exit_code: int
    last_line: str


def nothing(folder: Path) -> None:
    """The overrides are bad enough."""


def unbalance(folder: Path) -> None:
    """Drop a closing brace from the shards' pattern."""
    config = folder / "run.toml"
    config.write_text(config.read_text().replace("001}", "001"))


def break_a_clip(folder: Path) -> None:
    """One clip of three ends in the middle."""
    clip = encode_mp4(moving_blocks(1, 9), 12.0)
    clips = [
        RawClip("c0", "mp4", clip, (Caption("blocks"),)),
        RawClip("c1", "mp4", clip[:300], (Caption("half"),)),
        RawClip("c2", "mp4", clip, (Caption("b"),)),
    ]
    write_shards(clips, f"{folder}/raw/clips-%03d.tar", 2)


def cut_a_shard(folder: Path) -> None:
    """The second shard ends inside its last clip."""
    shard = folder / "raw" / "clips-001.tar"
    shard.write_bytes(shard.read_bytes()[:2000])


CASES = [
    Case("missing shard", "precompute_latents", lambda folder: (folder / "raw" / "clips-001.tar").unlink(), (), 3,
         "DataError: 1 of 2 shards"),
    Case("unbalanced braces", "precompute_latents", unbalance, (), 2, "ConfigError: sources.shards="),
    Case("cache that cannot be written", "precompute_latents", lambda folder: (folder / "cache").write_text("a file"),
         (), 2, "by precompute.cache="),
    Case("text encoder that is not there", "precompute_latents", nothing, ("text_encoder.weights=/no/such/model",), 2,
         "ConfigError: text_encoder.weights=/no/such/model"),
]  # fmt: skip
CASES_ON_RAY = [
    Case("past max_bad_fraction", "precompute_latents", break_a_clip, (), 3,
         "1 clips are quarantined, and 2 shards of at most 2 clips as so far cannot make that few enough"),
    Case("damaged shard", "precompute_latents", cut_a_shard, (), 3,
         "1 of 2 shards are damaged, how many clips that loses nobody knows"),
    Case("actor that fits no node", "precompute_latents", nothing, ("precompute.cpus_per_actor=4096",), 2,
         "ConfigError: an actor wants 4096 CPU"),
    # more than any machine has, so that a test host with GPUs refuses it too
    Case("actor without its GPU", "precompute_latents", nothing, ("precompute.gpus_per_actor=64",), 2,
         "gpus_per_actor=0 encodes on CPUs"),
]  # fmt: skip


@pytest.fixture(scope="module")
def good_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of whole clips."""
    folder = tmp_path_factory.mktemp("good")
    clips = [
        RawClip(f"c{n}", "mp4", encode_mp4(moving_blocks(n, 9), 12.0), (Caption(f"blocks {n}"),)) for n in range(3)
    ]
    write_shards(clips, f"{folder}/raw/clips-%03d.tar", 2)
    return folder


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray that the jobs join; each would else start one of its own."""
    with ray_session(LaunchSettings(), has_workers=False):
        yield


def check(case: Case, good_run: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Run the case's verb in a copy of the good run and look at all three answers."""
    shutil.copytree(good_run / "raw", folder / "raw")
    (folder / "run.toml").write_text(TOML.format(folder=folder))
    case.harm(folder)
    arguments = ["--config", str(folder / "run.toml"), *case.overrides]
    assert cli.main(case.verb, VERBS[case.verb], "x", arguments) == case.exit_code
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{case.verb}: ") and case.last_line in last
    result = json.loads((folder / "run" / "result.json").read_text())
    assert (result["verb"], result["exit_code"]) == (case.verb, case.exit_code)
    assert last == f"{case.verb}: {result['reason']}"
    assert not (folder / "cache" / "manifest.json").exists()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_ends_before_any_worker_starts(
    case: Case, good_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", refuse)
    check(case, good_run, tmp_path, capfd)


def test_missing_shards_leave_no_cache_folder(tmp_path: Path) -> None:
    """An empty one would look like somebody's work to `make demo`, which the message advises."""
    (tmp_path / "run.toml").write_text(TOML.format(folder=tmp_path))
    arguments = ["--config", str(tmp_path / "run.toml")]
    assert cli.main("precompute_latents", precompute_latents, "x", arguments) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.toml"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES_ON_RAY, ids=lambda case: case.name)
def test_bad_input_that_shows_in_the_workers(
    case: Case, good_run: Path, tmp_path: Path, local_ray: None, capfd: pytest.CaptureFixture[str]
) -> None:
    check(case, good_run, tmp_path, capfd)
