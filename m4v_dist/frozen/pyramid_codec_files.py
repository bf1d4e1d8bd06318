"""The released files of PyramidFlow's causal video VAE: where they are, and what their config.json says.

Source: the arguments of PyramidFlow video_vae/modeling_causal_vae.py at 3040d71.
"""

import logging
from collections.abc import Mapping
from typing import Any

from m4v_dist import storage
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.frozen.causal_video_vae import CausalVideoVaeConfig
from m4v_dist.frozen.causal_video_vae_layers import LevelSizes
from m4v_dist.weights_file import PICKLES, SAFETENSORS

logger = logging.getLogger(__name__)

STRIDE = 8
"""Pixels and frames a latent, as all of this project's frame and size rules have it."""
CONFIG_FILE = "config.json"
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_FIXED: dict[str, Any] = {
    "encoder_in_channels": 3,
    "decoder_out_channels": 3,
    "encoder_act_fn": "silu",
    "decoder_act_fn": "silu",
    "encoder_double_z": True,
    "encoder_type": "causal_vae_conv",
    "decoder_type": "causal_vae_conv",
    "add_post_quant_conv": True,
    "downsample_scale": STRIDE,
}
"""Keys of config.json that must have this value where they stand."""
_BLOCK_TYPES = {
    "encoder_down_block_types": "DownEncoderBlockCausal3D",
    "decoder_up_block_types": "UpDecoderBlockCausal3D",
}
_NO_EFFECT = {"encoder_block_dropout", "decoder_block_dropout", "sample_size", "scaling_factor", "interpolate"}
"""Keys that say nothing of a frozen network: dropout, sizes of its training, and an upsampling that was never built."""


def find_files(path: str) -> tuple[str, str | None]:
    """Find the weights file at `path` and its config.json, None where a lone file has none beside it.

    Raises:
        ConfigError: nothing is there, or a folder without the files.
    """
    path = path.rstrip("/")
    if not storage.exists(path):
        raise ConfigError(
            f"codec.weights={storage.shown(path)}: there is no such file or folder; give PyramidFlow's "
            "causal_video_vae folder."
        )
    if path.endswith(SAFETENSORS + PICKLES):
        folder, slash, _ = path.rpartition("/")
        beside = f"{folder}{slash}{CONFIG_FILE}"
        return path, beside if storage.exists(beside) else None
    there = storage.list_folder(path)
    found = [name for name in WEIGHT_FILES if name in there]
    if CONFIG_FILE not in there or not found:
        raise ConfigError(
            f"codec.weights={path}: no {', '.join(SAFETENSORS + PICKLES)} file, and no folder with {CONFIG_FILE} and "
            f"{' or '.join(WEIGHT_FILES)} (it holds {there[:6]}); give PyramidFlow's causal_video_vae folder."
        )
    return storage.join(path, found[0]), storage.join(path, CONFIG_FILE)


def read_config(path: str) -> CausalVideoVaeConfig:
    """Read a released `config.json`.

    Raises:
        DataError: not JSON, a key is missing, or it describes a network that this one is not.
    """
    try:
        values = storage.read_json(path)
    except ValueError as error:
        raise DataError(str(error)) from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: holds a {type(values).__name__}, not the config of a network.")
    wanted = _FIXED | {
        key: [name] * len(values[key]) for key, name in _BLOCK_TYPES.items() if isinstance(values.get(key), list)
    }
    differing = [
        f"{key}: {values[key]!r}, wanted {value!r}" for key, value in wanted.items() if values.get(key, value) != value
    ]
    if differing:
        raise DataError(
            f"{path}: describes another network than PyramidFlow's causal video VAE ({'; '.join(differing)}); take its "
            "causal_video_vae folder."
        )
    encoder, used_by_encoder = _sizes(path, values, "encoder", "down")
    decoder, used_by_decoder = _sizes(path, values, "decoder", "up")
    config = CausalVideoVaeConfig(_get(path, values, "encoder_out_channels", int), encoder, decoder)
    _check_config(path, config, values.get("decoder_in_channels", config.latent_channels))
    used = {*used_by_encoder, *used_by_decoder, "encoder_out_channels", "decoder_in_channels"}
    unknown = sorted(
        key for key in values.keys() - used - _FIXED.keys() - _BLOCK_TYPES.keys() - _NO_EFFECT if key[:1] != "_"
    )
    if unknown:
        logger.warning("%s: keys %s are not known here and were left aside", path, unknown)
    return config


def _sizes(path: str, values: Mapping[str, Any], part: str, direction: str) -> tuple[LevelSizes, list[str]]:
    keys = [
        f"{part}_block_out_channels",
        f"{part}_layers_per_block",
        f"{part}_spatial_{direction}_sample",
        f"{part}_temporal_{direction}_sample",
        f"{part}_norm_num_groups",
    ]
    channels, layers = (tuple(_get_list(path, values, key, int)) for key in keys[:2])
    space, time = (tuple(_get_list(path, values, key, bool)) for key in keys[2:4])
    return LevelSizes(channels, layers, space, time, _get(path, values, keys[4], int)), keys


def _get(path: str, values: Mapping[str, Any], key: str, kind: type) -> Any:
    if type(values.get(key)) is not kind:
        found = f"is {values[key]!r}" if key in values else "is missing"
        raise DataError(f"{path}: {key} {found}, wanted {kind.__name__}; take the config.json that was released.")
    return values[key]


def _get_list(path: str, values: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    entries = _get(path, values, key, list)
    if not entries or any(type(entry) is not kind for entry in entries):
        raise DataError(f"{path}: {key} is {entries!r}, wanted a list of {kind.__name__}, one a level.")
    return entries


def _check_config(path: str, config: CausalVideoVaeConfig, decoder_in_channels: Any) -> None:
    problems = []
    if decoder_in_channels != config.latent_channels:
        problems.append(f"encoder_out_channels={config.latent_channels}, decoder_in_channels={decoder_in_channels!r}")
    for part, sizes in (("encoder", config.encoder), ("decoder", config.decoder)):
        lengths = [
            len(entries) for entries in (sizes.channels, sizes.num_layers, sizes.scales_space, sizes.scales_time)
        ]
        if len(set(lengths)) != 1:
            problems.append(f"{part} lists of {lengths} levels")
        if min(*sizes.channels, *sizes.num_layers, sizes.num_groups) < 1:
            problems.append(f"{part} sizes below 1")
        elif any(channels % sizes.num_groups for channels in sizes.channels):
            problems.append(f"{part}_block_out_channels={sizes.channels} over {sizes.num_groups} groups")
        strides = (2 ** sum(sizes.scales_space), 2 ** sum(sizes.scales_time))
        if strides != (STRIDE, STRIDE):
            problems.append(f"{part} scales space and time by {strides[0]} and {strides[1]}, wanted {STRIDE}")
    if problems:
        raise DataError(f"{path}: contradicts itself or this network ({'; '.join(problems)}).")
