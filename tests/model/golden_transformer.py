"""The golden tiny miniFLUX: its settings, its weights under PyramidFlow's names, and its single-clip inputs."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from m4v_dist.batch import Column, ModelInput, TextFeatures
from m4v_dist.config.model_settings import ModelSettings
from m4v_dist.weights_file import TensorLayout


def settings_of(config: Mapping[str, Any], **options: Any) -> ModelSettings:
    """Our settings of a PyramidFlow transformer's config, with attention unless `options` say otherwise."""
    return ModelSettings(
        **{
            "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
            "num_heads": config["num_attention_heads"],
            "num_double_blocks": config["num_layers"],
            "num_single_blocks": config["num_single_layers"],
            "text_width": config["joint_attention_dim"],
            "pooled_width": config["pooled_projection_dim"],
            "latent_channels": config["in_channels"] // 4,
            "rope_axes": tuple(config.get("axes_dims_rope", (16, 24, 24))),
            "mixer": "attention",
            **options,
        }
    )


def weights_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The case's weights under PyramidFlow's names."""
    return {name.removeprefix("w."): tensor for name, tensor in tensors.items() if name.startswith("w.")}


def layout_of(weights: Mapping[str, Tensor]) -> dict[str, TensorLayout]:
    """Shapes and dtypes, as of a file."""
    return {
        name: TensorLayout(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in weights.items()
    }


def text_of(tensors: Mapping[str, Tensor], case: str, entry: int) -> TextFeatures:
    """Text of one column of a case, without its padding."""
    mask = tensors[f"in.{case}.encoder_attention_mask"][entry].bool()
    return TextFeatures(
        tensors[f"in.{case}.encoder_hidden_states"][entry][mask], tensors[f"in.{case}.pooled_projections"][entry]
    )


def single_clip_input(tensors: Mapping[str, Tensor], case: str, level: int = 2) -> ModelInput:
    """The columns of a case whose columns have one clip each; attention does not know their pyramid level."""
    latents, timesteps = tensors[f"in.{case}.latent"], tensors[f"in.{case}.timestep_ratio"]
    return ModelInput(
        tuple(Column((latents[i],), (level,), text_of(tensors, case, i), timesteps[i]) for i in range(len(latents)))
    )
