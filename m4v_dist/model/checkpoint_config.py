"""The config.json of PyramidFlow's transformer against our settings: what shapes of weights cannot tell apart.

Heads against head width, the rotary widths and the temporal mask leave every shape as it is; a checkpoint of others
would load whole, and mean something else.

Source: the arguments of PyramidFlow pyramid_dit/flux_modules/modeling_pyramid_flux.py at 3040d71.
"""

import logging
from typing import Any

from m4v_dist import storage
from m4v_dist.config.model_settings import ModelSettings
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.model.checkpoint_files import INDEX
from m4v_dist.weights_file import PICKLES, SAFETENSORS

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
CLASS_NAME = "PyramidFluxTransformer"
"""What the config of a miniFLUX says that it is; PyramidFlow's SD3 variant says PyramidDiffusionMMDiT."""


def check_released_config(path: str, model: ModelSettings) -> None:
    """Compare the config.json of a checkpoint, where there is one, with the settings it is to be loaded under.

    Args:
        path: the checkpoint as `find_files` takes it; of a lone file or an index, the config beside it counts.
        model: what it is loaded into.

    Raises:
        ConfigError: fields differ; the message names each with both values. Or it is of another network.
        DataError: the config is damaged.
    """
    path = path.rstrip("/")
    folder, slash, _ = path.rpartition("/")
    is_file = path.endswith((*SAFETENSORS, *PICKLES, INDEX))
    config = f"{folder}{slash}{CONFIG_FILE}" if is_file else storage.join(path, CONFIG_FILE)
    if not storage.exists(config):
        logger.info("%s is not there, so heads, rotary widths and mask of the checkpoint are not compared", config)
        return
    try:
        found = storage.read_json(config)
    except ValueError as error:
        raise DataError(str(error)) from error
    if not isinstance(found, dict):
        raise DataError(f"{config}: holds a {type(found).__name__}, not the config of a network; fetch it again.")
    if found.get("_class_name", CLASS_NAME) != CLASS_NAME:
        raise ConfigError(
            f"{config}: describes a {found['_class_name']}, and only PyramidFlow's miniFLUX ({CLASS_NAME}) is read; "
            "take the transformer of a miniFLUX release."
        )
    differing = [
        f"{key}: {found[key]!r}, ours {value!r} ({setting})"
        for key, (setting, value) in _wanted(model).items()
        if key in found and found[key] != value
    ]
    if differing:
        raise ConfigError(
            f"{config}: describes another transformer than [model] ({'; '.join(differing)}); set these keys to its "
            "values, or take the checkpoint that fits."
        )


def _wanted(model: ModelSettings) -> dict[str, tuple[str, Any]]:
    """PyramidFlow's field, to what ours is called and its value."""
    return {
        "axes_dims_rope": ("model.rope_axes", list(model.rope_axes)),
        "num_attention_heads": ("model.num_heads", model.num_heads),
        "attention_head_dim": ("model.hidden_size / num_heads", model.head_dim),
        "num_layers": ("model.num_double_blocks", model.num_double_blocks),
        "num_single_layers": ("model.num_single_blocks", model.num_single_blocks),
        "in_channels": ("model.latent_channels * patch_size^2", model.latent_channels * model.patch_size**2),
        "joint_attention_dim": ("model.text_width", model.text_width),
        "pooled_projection_dim": ("model.pooled_width", model.pooled_width),
        "use_temporal_causal": ("model.has_temporal_mask", model.has_temporal_mask),
    }
