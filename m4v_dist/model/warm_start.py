"""Upstream checkpoint names to ours, and a report of every key.

Source: state dict of PyramidFlow flux_modules/modeling_pyramid_flux.py at 3040d71.
"""

import re
from collections.abc import Mapping

from torch import Tensor

_EXACT = {
    "time_text_embed.timestep_embedder.linear_1": "conditioning.timestep_in",
    "time_text_embed.timestep_embedder.linear_2": "conditioning.timestep_out",
    "time_text_embed.text_embedder.linear_1": "conditioning.pooled_in",
    "time_text_embed.text_embedder.linear_2": "conditioning.pooled_out",
    "context_embedder": "text_in",
    "x_embedder": "video_in",
    "norm_out.linear": "modulation_out.linear",
    "proj_out": "video_out",
}
_DOUBLE = {
    "norm1.linear": "video.modulation.linear",
    "norm1_context.linear": "text.modulation.linear",
    "attn.to_q": "video.qkv.to_q",
    "attn.to_k": "video.qkv.to_k",
    "attn.to_v": "video.qkv.to_v",
    "attn.norm_q": "video.qkv.norm_q",
    "attn.norm_k": "video.qkv.norm_k",
    "attn.to_out.0": "video.to_out",
    "attn.add_q_proj": "text.qkv.to_q",
    "attn.add_k_proj": "text.qkv.to_k",
    "attn.add_v_proj": "text.qkv.to_v",
    "attn.norm_added_q": "text.qkv.norm_q",
    "attn.norm_added_k": "text.qkv.norm_k",
    "attn.to_add_out": "text.to_out",
    "ff.net.0.proj": "video.ff_in",
    "ff.net.2": "video.ff_out",
    "ff_context.net.0.proj": "text.ff_in",
    "ff_context.net.2": "text.ff_out",
}
_SINGLE = {
    "norm.linear": "modulation.linear",
    "attn.to_q": "mixer.qkv.to_q",
    "attn.to_k": "mixer.qkv.to_k",
    "attn.to_v": "mixer.qkv.to_v",
    "attn.norm_q": "mixer.qkv.norm_q",
    "attn.norm_k": "mixer.qkv.norm_k",
    "proj_mlp": "proj_mlp",
    "proj_out": "proj_out",
}
_BLOCKS = {"transformer_blocks": ("double_blocks", _DOUBLE), "single_transformer_blocks": ("single_blocks", _SINGLE)}


def from_pyramidflow_name(name: str) -> str:
    """Our name of a PyramidFlow parameter.

    Raises:
        ValueError: a name that miniFLUX does not have.
    """
    stem, _, leaf = name.rpartition(".")
    block = re.fullmatch(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.(.+)", stem)
    if block is not None:
        ours, names = _BLOCKS[block[1]]
        target = names.get(block[3])
        if target is not None:
            return f"{ours}.{block[2]}.{target}.{leaf}"
    elif stem in _EXACT:
        return f"{_EXACT[stem]}.{leaf}"
    raise ValueError(f"{name!r} is no parameter of PyramidFlow's miniFLUX; is this another model's checkpoint?")


def from_pyramidflow_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a PyramidFlow miniFLUX state dict for a model with `mixer = "attention"`; load the answer strictly.

    Raises:
        ValueError: a name that miniFLUX does not have.
    """
    return {from_pyramidflow_name(name): tensor for name, tensor in state.items()}
