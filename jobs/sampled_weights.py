"""The weights that `jobs.sample` samples, and whether the config is theirs.

A checkpoint's averaged weights, or the start weights that `jobs.import_checkpoint` wrote, before any training.
"""

import logging
import os
from typing import assert_never

import torch

from data_pipeline.latent_cache import LatentCache
from m4v_dist import storage
from m4v_dist.blocks.lora import is_adapter
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.frozen.text_encoder import text_encoder_fingerprint
from m4v_dist.frozen.video_vae import Codec
from m4v_dist.model.build import build_model, build_on_meta, require_channels
from m4v_dist.model.start_weights import check_start_weights
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.resume import changes
from m4v_dist.weights_file import WeightsFile, fill_weights

logger = logging.getLogger(__name__)

TRAINED_SECTIONS = ("codec.", "text_encoder.", "model.")
TRAINED_KEYS = ("objective.gamma", "objective.num_pyramid_stages", "objective.num_train_timesteps")
"""Settings that the weights were trained for: sampled with others, a model gives noise and no error."""


def choose_weights(config: RunConfig, codec: Codec) -> str:
    """Path of the checkpoint, or of the file of start weights, checked against the config.

    Raises:
        ConfigError: settings that they were not made for; or see `require_start_weights`.
        DataError: see `choose_checkpoint`, `require_trained_settings` and `require_start_weights`.
    """
    match config.sampling.weights:
        case "ema":
            path = choose_checkpoint(config)
            require_trained_settings(config, codec, path)
        case "start":
            path = require_start_weights(config)
            require_channels(config.model, codec.latent_channels, codec.name)
        case _:
            assert_never(config.sampling.weights)
    logger.info("sampling from %s", path)
    return path


def require_start_weights(config: RunConfig) -> str:
    """Path of the file of start weights, once its header is checked.

    Raises:
        ConfigError: the run has none, or they are not those of its config; see `check_start_weights`.
        DataError: the file is damaged, or of another model.
    """
    path = config.start_weights
    if path is None:
        raise ConfigError(
            "sampling.weights='start', but neither warm_start.source nor warm_start.weights is set: this run has no "
            "start weights. Set one of them, or leave sampling.weights out to sample a checkpoint."
        )
    check_start_weights(config, build_on_meta(config.model, config.kernels))
    return path


def choose_checkpoint(config: RunConfig) -> str:
    """Path of the checkpoint that the config names, or of the newest committed one.

    Raises:
        DataError: there is none, or the named one was never finished; the message lists what is there.
    """
    folder = config.checkpoint_folder
    if config.sampling.checkpoint is not None:
        named = config.sampling.checkpoint
        # A name in this run's folder, or a path of any run's.
        path = named.rstrip("/") if "/" in named else storage.join(folder, named)
        checkpoint.require_committed(path)
        return path
    newest = checkpoint.newest_committed(folder)
    if newest is None:
        there = ", ".join(storage.list_folder(folder)) or "nothing"
        start = config.start_weights
        other_way = f", or sample the start weights {start} with sampling.weights=start" if _is_file(start) else ""
        raise DataError(
            f"{folder}: no committed checkpoint (there is {there}); train first, with jobs.train{other_way}."
        )
    return newest


def _is_file(path: str | None) -> bool:
    return path is not None and os.path.isfile(path)


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
    refused = [
        str(change) for change in differing if change not in moved and not change.key.startswith("model.recompute")
    ]
    if refused:
        raise ConfigError(
            f"{path} was trained with other settings: {'; '.join(refused)} (checkpoint -> config). Sample with the "
            "config that it was trained with."
        )
    if moved:
        fingerprint = codec.fingerprint() | text_encoder_fingerprint(config.text_encoder)
        LatentCache.open(config.precompute.cache, fingerprint)


def load_model(config: RunConfig, path: str) -> torch.nn.Module:
    """Build the model and give it the weights that `choose_weights` found at `path`."""
    model = build_model(config.model, config.kernels, seed=config.run.seed)
    match config.sampling.weights:
        case "ema":
            _fill_average(model, path)
        case "start":
            fill_weights(model, WeightsFile(path), stays=is_adapter)
        case _:
            assert_never(config.sampling.weights)
    return model.eval()


def _fill_average(model: torch.nn.Module, path: str) -> None:
    """Give the model a checkpoint's averaged weights.

    Raises:
        DataError: names or shapes are not the model's.
    """
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
