"""The verbs one after the other on real files, as the demo calls them: shards, cache, training, samples, report."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import cli
from jobs.check_codec import check_codec
from jobs.precompute_latents import precompute_latents
from jobs.report import report
from jobs.sample import sample
from jobs.train import train
from m4v_dist import storage
from m4v_dist.config.training_settings import LaunchSettings
from m4v_dist.frozen.video_file import read_video
from m4v_dist.launch.ray_session import start_ray, stop_ray
from tests.jobs.tiny_run import FRAMES, write_tiny_run

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def _ray() -> Iterator[None]:
    """One Ray for all verbs: each would start its own."""
    start_ray(LaunchSettings())
    yield
    stop_ray()


@pytest.mark.usefixtures("_ray")
def test_shards_become_a_cache_a_trained_model_videos_and_a_report(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_tiny_run(tmp_path)
    run = tmp_path / "run"

    def call(name: str, verb: cli.Verb, *overrides: str) -> str:
        assert cli.main(name, verb, "x", ["--config", config, *overrides]) == 0, capfd.readouterr().err
        result = storage.read_json(str(run / "result.json"))
        assert (result["verb"], result["exit_code"]) == (name, 0)
        return str(result["reason"])

    assert "4 records kept, 0 filtered, 0 quarantined" in call("precompute_latents", precompute_latents)
    shards = sorted((tmp_path / "cache" / "shards").iterdir())
    stamps = [path.stat().st_mtime_ns for path in shards]
    assert len(shards) == 2
    assert "nothing to do: 4 records of 2 shards" in call("precompute_latents", precompute_latents)
    assert [path.stat().st_mtime_ns for path in shards] == stamps

    assert call("train", train).startswith("2 steps done, held-out loss ")
    assert (run / "checkpoints" / "step_00000002" / "COMMITTED").exists()
    assert "trained to its last step 2" in call("train", train)
    # A longer curriculum goes on from there.
    longer = ("curriculum.0.num_steps=3", "trainer.sample_every_steps=3")
    assert call("train", train, *longer).startswith("3 steps done")
    # Sampled beside training, by a process of its own.
    (entry,) = storage.read_json(str(run / "validation" / "step_00000003" / "samples.json"))
    assert entry["prompt"] == "moving blocks" and (run / "validation" / "step_00000003" / entry["file"]).exists()
    assert not (run / "validation" / "step_00000002").exists()

    assert "held_out, 64 x 64 px" in call("check_codec", check_codec)
    assert "1 videos from step_00000003" in call("sample", sample)
    frames, fps = read_video(str(run / "samples" / "00.mp4"))
    assert frames.shape == (FRAMES, 64, 64, 3) and fps == 8.0
    call("report", report)
    page = " ".join((run / "report.html").read_text().split())
    assert "trained for 3 steps on cached latents (the cache holds 4 clips and stills" in page
    assert "moving blocks" in page and "Over 1 held-out clips at 64 × 64 px" in page
