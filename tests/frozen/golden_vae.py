"""The golden case of PyramidFlow's causal video VAE: its network, and its weights written as they are released."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m4v_dist import storage, tensor_files
from m4v_dist.frozen.causal_video_vae import CausalVideoVae, CausalVideoVaeConfig
from m4v_dist.frozen.causal_video_vae_layers import LevelSizes
from tests.conftest import GOLDEN, load_golden

CASE = "pyramid_causal_video_vae"
DESCRIPTION: dict[str, Any] = json.loads((GOLDEN / f"{CASE}.json").read_text())
TOLERANCE: dict[str, float] = DESCRIPTION["tolerance"]["recommended"]["rel_to_max"]
OUTPUTS = sorted(name for name in DESCRIPTION["tensors"] if name.startswith("out."))


def config_of(description: dict[str, Any]) -> CausalVideoVaeConfig:
    """Sizes of the golden case's network."""
    values = description["config"]
    encoder, decoder = (
        LevelSizes(
            tuple(values["block_out_channels"]),
            tuple(values[f"{part}_layers_per_block"]),
            tuple(values["spatial_down"]),
            tuple(values["temporal_down"]),
            values["norm_num_groups"],
        )
        for part in ("encoder", "decoder")
    )
    return CausalVideoVaeConfig(values["latent_channels"], encoder, decoder)


def released_config(config: CausalVideoVaeConfig) -> dict[str, Any]:
    """The same as `config.json` of a release has it."""
    parts: dict[str, Any] = {"_class_name": "CausalVideoVAE", "interpolate": False, "encoder_act_fn": "silu"}
    for part, direction, sizes in (("encoder", "down", config.encoder), ("decoder", "up", config.decoder)):
        parts |= {
            f"{part}_block_out_channels": list(sizes.channels),
            f"{part}_layers_per_block": list(sizes.num_layers),
            f"{part}_spatial_{direction}_sample": list(sizes.scales_space),
            f"{part}_temporal_{direction}_sample": list(sizes.scales_time),
            f"{part}_norm_num_groups": sizes.num_groups,
        }
    return parts | {"encoder_out_channels": config.latent_channels, "decoder_in_channels": config.latent_channels}


def golden_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the golden case."""
    return {name.removeprefix("w."): tensor for name, tensor in tensors.items() if name.startswith("w.")}


def golden_network(tensors: dict[str, Tensor], tile_px: int = 0) -> CausalVideoVae:
    """The golden case's network with its weights."""
    network = CausalVideoVae(config_of(DESCRIPTION), tile_px=tile_px)
    network.load_state_dict(golden_weights(tensors))
    return network.requires_grad_(False).eval()


def write_release(folder: Path, file: str = "diffusion_pytorch_model.safetensors", **changed: Tensor | None) -> str:
    """Write the golden weights as a released folder; `changed` replaces, adds or (None) leaves out tensors, by name."""
    _, tensors = load_golden(CASE)
    weights: dict[str, Tensor | None] = {**golden_weights(tensors), **changed}
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    storage.write_json(str(folder / "config.json"), released_config(config_of(DESCRIPTION)))
    if file.endswith(".safetensors"):
        tensor_files.write_tensors(str(folder / file), kept)
    else:
        torch.save(kept, folder / file)
    return str(folder)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value."""
    assert found.shape == wanted.shape
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


def num_in(name: str) -> int:
    """The number of frames or latents in a tensor's name."""
    match = re.search(r"(?:frames|latents)(\d+)", name)
    assert match is not None
    return int(match[1])
