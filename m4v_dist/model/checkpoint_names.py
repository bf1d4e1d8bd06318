"""Names of PyramidFlow's parameters and ours, both ways.

Source: state dict of PyramidFlow flux_modules/modeling_pyramid_flux.py at 3040d71.
"""

import re
from collections.abc import Mapping

_OUTSIDE_BLOCKS = {
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
_Blocks = Mapping[str, tuple[str, Mapping[str, str]]]
_TO_OURS: _Blocks = {
    "transformer_blocks": ("double_blocks", _DOUBLE), "single_transformer_blocks": ("single_blocks", _SINGLE),
}  # fmt: skip


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in names.items()}


_TO_THEIRS: _Blocks = {ours: (theirs, _inverse(names)) for theirs, (ours, names) in _TO_OURS.items()}

TRAINED_PREFIX = "dit."
"""What PyramidFlow's trainer puts before every name: it saves transformer, VAE and text encoders as one module."""
OTHER_NETS = ("vae.", "text_encoder.")
"""Prefixes of what else such a file may hold; PyramidFlow leaves it aside when it loads, and so do we."""


def from_pyramidflow_name(name: str) -> str:
    """Our name, in a model with `mixer = "attention"`, of a PyramidFlow parameter.

    Raises:
        ValueError: a name that miniFLUX does not have.
    """
    ours = _rename(name, _OUTSIDE_BLOCKS, _TO_OURS)
    if ours is None:
        raise ValueError(f"{name!r} is no parameter of PyramidFlow's miniFLUX; is this another model's checkpoint?")
    return ours


def to_pyramidflow_name(name: str) -> str:
    """PyramidFlow's name of a parameter of ours, in a model with `mixer = "attention"`.

    Raises:
        ValueError: a name that such a model does not have.
    """
    theirs = _rename(name, _inverse(_OUTSIDE_BLOCKS), _TO_THEIRS)
    if theirs is None:
        raise ValueError(f"{name!r} is no parameter of a model with mixer='attention'.")
    return theirs


def _rename(name: str, outside_blocks: Mapping[str, str], blocks: _Blocks) -> str | None:
    stem, _, leaf = name.rpartition(".")
    block = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", stem)
    if block is not None and block[1] in blocks:
        renamed, names = blocks[block[1]]
        target = names.get(block[3])
        return None if target is None else f"{renamed}.{block[2]}.{target}.{leaf}"
    target = outside_blocks.get(stem)
    return None if target is None else f"{target}.{leaf}"
