"""The weights that `jobs.sample` samples: a checkpoint's averaged ones, and whether the config is what they learnt."""

import logging

import torch

from data_pipeline.latent_cache import LatentCache
from m4v_dist import storage
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.frozen.text_encoder import text_encoder_fingerprint
from m4v_dist.frozen.video_vae import Codec
from m4v_dist.model.build import build_model
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.resume import changes

logger = logging.getLogger(__name__)

TRAINED_SECTIONS = ("codec.", "text_encoder.", "model.")
TRAINED_KEYS = ("objective.gamma", "objective.num_pyramid_stages", "objective.num_train_timesteps")
"""Settings that the weights were trained for: sampled with others, a model gives noise and no error."""


def choose_checkpoint(config: RunConfig) -> str:
    """Path of the checkpoint that the config names, or of the newest committed one.

    Raises:
        DataError: there is none, or the named one was never finished; the message lists what is there.
    """
    folder = storage.join(config.run.folder, "checkpoints")
    if config.sampling.checkpoint is not None:
        named = config.sampling.checkpoint
        # A name in this run's folder, or a path of any run's.
        path = named.rstrip("/") if "/" in named else storage.join(folder, named)
        checkpoint.require_committed(path)
        return path
    newest = checkpoint.newest_committed(folder)
    if newest is None:
        there = ", ".join(storage.list_folder(folder)) or "nothing"
        raise DataError(f"{folder}: no committed checkpoint (there is {there}); train first, with jobs.train.")
    logger.info("sampling from %s", newest)
    return newest


def require_trained_settings(config: RunConfig, codec: Codec, path: str) -> None:
    """Compare what the weights were trained for with the checkpoint's own config.

    Weight files of codec and text encoder may have moved: then the cache's fingerprint says whether they are the same.

    Raises:
        ConfigError: with each field and both values.
        DataError: the checkpoint is damaged; or a weight file has moved, and the cache is missing or was made with
            another.
    """
    checkpoint.check(path)
    before = checkpoint.read_config(path)
    now = config.model_dump(mode="json")
    differing = [
        change
        for change in changes(before, now, stage_index=len(config.curriculum))
        if change.key.startswith(TRAINED_SECTIONS) or change.key in TRAINED_KEYS
    ]
    moved = [change for change in differing if change.key in ("codec.weights", "text_encoder.weights")]
    refused = [str(change) for change in differing if change not in moved and change.key != "model.recompute"]
    if refused:
        raise ConfigError(
            f"{path} was trained with other settings: {'; '.join(refused)} (checkpoint -> config). Sample with the "
            "config that it was trained with."
        )
    if moved:
        fingerprint = codec.fingerprint() | text_encoder_fingerprint(config.text_encoder)
        LatentCache.open(config.precompute.cache, fingerprint)


def load_model(config: RunConfig, path: str) -> torch.nn.Module:
    """Build the model and give it the checkpoint's averaged weights."""
    model = build_model(config.model, config.kernels, seed=config.run.seed)
    weights = checkpoint.load_ema_weights(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    differing = sorted(
        name
        for name in shapes.keys() | weights.keys()
        if name not in weights or shapes.get(name) != weights[name].shape
    )
    if differing:
        raise DataError(
            f"{path}: {len(differing)} parameters differ in name or shape from the config's model "
            f"({', '.join(differing[:3])}), though the settings are the checkpoint's; it was written by other code."
        )
    model.load_state_dict(weights)
    return model.eval()
