"""Commits are sampled beside training, one at a time; a failure is counted and nothing else."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from m4v_dist import storage
from m4v_dist.config.training_settings import LaunchSettings
from m4v_dist.errors import DataError
from m4v_dist.launch.ray_session import start_ray, stop_ray
from m4v_dist.launch.validation import ValidationSampling


def _sample(config: dict[str, Any]) -> None:
    """Fails at step 3, hangs at 9, and at 5 lasts until two more commits are there."""
    folder = Path(config["folder"])
    step = config["step"]
    if step == 3:
        raise DataError("no such average")
    while step == 9 or (step == 5 and not (folder / "go").exists()):
        time.sleep(0.02)
    (folder / f"sampled_{step}").touch()


def _commit(run: Path, *steps: int) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(json.dumps({"attempt": 1, "step": step, "kind": "checkpoint"}) + "\n")


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


@pytest.fixture
def _ray() -> Iterator[None]:
    folder = start_ray(LaunchSettings())
    yield
    stop_ray(folder)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_new_commits_are_sampled_one_at_a_time_and_failures_only_counted(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "validation" / "step_00000001").mkdir(parents=True)
    _commit(run, 1)
    settings = LaunchSettings(sampler_cpus=0.5, sampler_timeout_s=30.0)
    config = {"folder": str(tmp_path)}
    with ValidationSampling(_sample, config, str(run), every_steps=2, settings=settings) as sampling:
        _commit(run, 3)
        _until(lambda: sampling.num_failed == 1)
        _commit(run, 5)
        # Its own number: the failed one's end may still be under way.
        _until(lambda: (running := sampling._running) is not None and running[2] == 5)
        # None of these while 5 is under way, and then the newest alone; a restart's commit of 4 is no news.
        _commit(run, 6, 7, 4)
        time.sleep(1.5)
        (tmp_path / "go").touch()
        _until(lambda: (tmp_path / "sampled_7").exists())
        # Not seen yet when training ends: taken up, and waited for.
        _commit(run, 8)
    assert (sampling.num_done, sampling.num_failed) == (3, 1)
    assert sorted(path.name for path in tmp_path.glob("sampled_*")) == ["sampled_5", "sampled_7", "sampled_8"]
    failure = storage.read_json(f"{run}/validation/step_00000003/failure.json")
    assert "no such average" in failure["error"]

    quick = settings.model_copy(update={"sampler_timeout_s": 0.5})
    with ValidationSampling(_sample, config, str(run), every_steps=1, settings=quick) as hanging:
        _commit(run, 9)
    assert (hanging.num_done, hanging.num_failed) == (0, 1)
    assert "sampler_timeout_s=0.5" in storage.read_json(f"{run}/validation/step_00000009/failure.json")["error"]

    at = time.time() + 2.0
    limited = settings.model_copy(update={"sampler_timeout_s": 600.0, "stop_at": at, "stop_margin_s": 0.5})
    # A folder that takes no file: the failure is told all the same, and nothing is raised where training went well.
    Path(run, "validation", "step_00000009", "failure.json").unlink()
    Path(run, "validation", "step_00000009").rmdir()
    with ValidationSampling(_sample, config, str(run), every_steps=9, settings=limited) as late:
        (run / "validation" / "step_00000009").write_text("in the way")
        _commit(run, 9)
    assert (late.num_done, late.num_failed) == (0, 1) and time.time() < at

    begun = time.monotonic()
    with (
        pytest.raises(RuntimeError, match="training broke off"),
        ValidationSampling(_sample, config, str(run), every_steps=1, settings=settings) as broken,
    ):
        _commit(run, 10)
        _until(lambda: broken._running is not None)
        raise RuntimeError("training broke off")
    assert broken._running is None and time.monotonic() - begun < 20


def test_switched_off_it_watches_nothing(tmp_path: Path) -> None:
    with ValidationSampling(_sample, {}, str(tmp_path), every_steps=0, settings=LaunchSettings()) as off:
        _commit(tmp_path, 2)
    assert off._newest == 0
