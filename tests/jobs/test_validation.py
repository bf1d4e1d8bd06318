"""Validation samples the newest committed average into a folder of its step, and W&B gets each video once."""

from pathlib import Path

import pytest

from jobs.validation import publish_late_videos, sample_newest
from m4v_dist import storage
from m4v_dist.config.load import config_to_json, parse_config
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.trainer.metrics import Metrics
from m4v_dist.trainer.validation_videos import publish_videos
from tests.jobs.sampled_run import sample_config


def test_the_newest_average_is_sampled_beside_the_run_s_own_samples(run: str) -> None:
    """The checkpoint's plain weights are NaN; a GPU of the workers is not asked for."""
    tree = sample_config(run).model_dump(mode="json")
    tree["launch"]["use_gpu"] = True
    said = sample_newest({"config": config_to_json(parse_config(tree, where="test")), "step": 5})
    folder = Path(run, "validation", "step_00000005")
    assert str(folder) in said and not Path(run, "samples").exists()
    entries = storage.read_json(f"{folder}/samples.json")
    assert [(entry["prompt"], entry["checkpoint"]) for entry in entries] == [
        ("a fox", "step_00000005"),
        ("a plane", "step_00000005"),
    ]
    assert all((folder / entry["file"]).stat().st_size > 1000 for entry in entries)

    metrics = Metrics(run, 1, sample_config(run).logging.model_copy(update={"wandb": "disabled"}), sample_config(run))
    assert publish_videos(run, metrics) == 1 and publish_videos(run, metrics) == 0
    metrics.close()


def test_nothing_to_sample_is_the_sampler_s_own_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no committed checkpoint"):
        sample_newest({"config": config_to_json(sample_config(str(tmp_path))), "step": 5})


def test_sampling_beside_training_without_a_prompt_is_exit_2(tmp_path: Path) -> None:
    tree = sample_config(str(tmp_path)).model_dump(mode="json")
    tree["trainer"]["sample_every_steps"] = 10
    tree["sampling"]["prompts"] = []
    with pytest.raises(ConfigError, match=r"sample_every_steps=10, but sampling.prompts is empty"):
        parse_config(tree, where="test")


@pytest.mark.slow
def test_videos_that_come_after_the_last_save_reach_wandb(run: str) -> None:
    tree = sample_config(run, prompts=["a fox"]).model_dump(mode="json")
    tree["trainer"]["sample_every_steps"] = 1
    config = parse_config(tree, where="test")
    sample_newest({"config": config_to_json(config), "step": 5})
    Path(run, "attempts", "attempt_0002_ranks").mkdir(parents=True)
    publish_late_videos(config)
    (video,) = Path(run, "wandb").glob("offline-run-*/files/media/videos/validation/*.mp4")
    assert video.read_bytes() == Path(run, "validation", "step_00000005", "00.mp4").read_bytes()
    assert storage.read_json(f"{run}/validation/step_00000005/logged.json")["attempt"] == 2
