"""What the names and shapes of a PyramidFlow checkpoint say of its sizes, against our settings.

For a checkpoint without a config.json, which `checkpoint_config.py` would compare: a setting that differs is named
once, in place of the hundred parameters that it makes differ. What names and shapes cannot say (rotary widths, the
temporal mask) is not known here.

Source: state dict of PyramidFlow flux_modules/modeling_pyramid_flux.py at 3040d71.
"""

import re
from collections.abc import Iterable, Mapping

from m4v_dist.config.model_settings import ModelSettings
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.weights_file import TensorLayout

_SD3_NAMES = ("pos_embed.", "joint_blocks.", "joint_transformer")
"""Beginnings of names that PyramidFlow's SD3 variant has and miniFLUX has not."""
_MINIFLUX_NAMES = ("x_embedder.weight", "single_transformer_blocks.")


def check_sizes(where: str, layout: Mapping[str, TensorLayout], model: ModelSettings) -> None:
    """Compare the sizes that a checkpoint shows with the settings that it is to be loaded under.

    Args:
        where: the checkpoint, for messages.
        layout: names as miniFLUX has them. What is missing or contradicts itself is left to the strict comparison.
        model: what it is loaded into.

    Raises:
        ConfigError: sizes differ; the message names each setting with both numbers.
        DataError: the names are those of PyramidFlow's SD3 variant.
    """
    foreign = sorted(name for name in layout if name.startswith(_SD3_NAMES))
    if foreign and not all(any(name.startswith(known) for name in layout) for known in _MINIFLUX_NAMES):
        raise DataError(
            f"{where}: holds names of PyramidFlow's SD3 variant ({', '.join(foreign[:3])}), and only its miniFLUX is "
            "read; take the transformer of a miniFLUX release."
        )
    problems = [*_block_counts(layout, model), *_widths(layout, model)]
    if problems:
        raise ConfigError(
            f"{where}: is the checkpoint of another model than [model]: {'; '.join(problems)}. Set these keys to its "
            "values, or take the checkpoint that fits."
        )


def _block_counts(layout: Iterable[str], model: ModelSettings) -> list[str]:
    kinds = (
        ("transformer_blocks", "double", "num_double_blocks", model.num_double_blocks),
        ("single_transformer_blocks", "single", "num_single_blocks", model.num_single_blocks),
    )
    problems = []
    for prefix, word, setting, wanted in kinds:
        matches = (re.match(rf"{prefix}\.(\d+)\.", name) for name in layout)
        numbers = {int(match[1]) for match in matches if match is not None}
        # With a gap they are no model's: some are missing, or do not belong there.
        is_whole = numbers == set(range(len(numbers)))
        if numbers and is_whole and len(numbers) != wanted:
            problems.append(f"the checkpoint has {len(numbers)} {word} blocks, model.{setting}={wanted}")
    return problems


def _widths(layout: Mapping[str, TensorLayout], model: ModelSettings) -> list[str]:
    """Of each name, the last axis, which a setting decides."""
    wanted = (
        ("x_embedder.bias", "model.hidden_size", model.hidden_size),
        ("x_embedder.weight", "model.latent_channels * patch_size^2", model.latent_channels * model.patch_size**2),
        ("context_embedder.weight", "model.text_width", model.text_width),
        ("time_text_embed.text_embedder.linear_1.weight", "model.pooled_width", model.pooled_width),
        ("transformer_blocks.0.attn.norm_q.weight", "model.hidden_size / num_heads", model.head_dim),
    )
    return [
        f"{name} is {layout[name].shape[-1]} wide, {setting}={size}"
        for name, setting, size in wanted
        if name in layout and layout[name].shape and layout[name].shape[-1] != size
    ]
