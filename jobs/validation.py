"""Validation beside training: the prompts of `sampling`, from the newest committed checkpoint's averaged weights."""

from typing import Any

from jobs.sample import sample
from jobs.sampled_weights import choose_checkpoint
from m4v_dist import storage
from m4v_dist.config.load import config_from_json
from m4v_dist.config.schema import RunConfig
from m4v_dist.trainer.checkpoint import step_of
from m4v_dist.trainer.metrics import Metrics
from m4v_dist.trainer.rank_status import newest_attempt
from m4v_dist.trainer.validation_videos import publish_videos


def sample_newest(task: dict[str, Any]) -> str:
    """Sample into `<run>/validation/step_00000120/`; what the sampling actor runs.

    Args:
        task: `config`, JSON of the run.

    Raises:
        ConfigError, DataError: see `jobs.sample.sample`.
    """
    config = config_from_json(task["config"])
    newest = config.sampling.model_copy(update={"weights": "ema", "checkpoint": None})
    path = choose_checkpoint(config.model_copy(update={"sampling": newest}))
    config = config.model_copy(
        update={
            "sampling": newest.model_copy(update={"checkpoint": path}),
            # The actor's own share, which may be none where the workers have one each.
            "launch": config.launch.model_copy(update={"use_gpu": config.launch.sampler_gpus > 0}),
        }
    )
    name = f"step_{step_of(path):08d}"
    return sample(config, False, storage.join(config.run.folder, "validation", name))


def publish_late_videos(config: RunConfig) -> None:
    """Log the videos that were finished after rank 0's last save."""
    attempt = newest_attempt(config.run.folder)
    if config.trainer.sample_every_steps and config.logging.wandb != "disabled" and attempt is not None:
        metrics = Metrics(config.run.folder, attempt, config.logging, config)
        publish_videos(config.run.folder, metrics)
        metrics.close()
