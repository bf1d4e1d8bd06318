"""PyramidFlow's causal video VAE as a codec: released files, checks, posterior draws, latent statistics.

`codec.weights` names the released folder (`config.json` beside `diffusion_pytorch_model.safetensors` or `.bin`), or one
weights file (.safetensors, .bin, .pt, .pth; with a `config.json` beside it, or of the released sizes). Sizes, names,
shapes and dtypes are checked when the codec is built; the weights are read at the first clip, so a job that only asks
for the fingerprint or the statistics holds none.

Runs on the device of what it is given. In float32 on a GPU, convolutions follow `torch.backends.cudnn.allow_tf32`.

Source of the statistics: PyramidFlow pyramid_dit/pyramid_dit_for_video_gen_pipeline.py at 3040d71.

Legend: `c` channels, `t` frames or latents, `h` `w` pixels or latent grid.
"""

from functools import cached_property
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from m4v_dist.frozen.causal_video_vae import RELEASED, CausalVideoVae, CausalVideoVaeConfig, Posterior
from m4v_dist.frozen.latent_normalization import LatentNormalization
from m4v_dist.frozen.pyramid_codec_files import find_files, read_config
from m4v_dist.weights_file import load_weights, read_layout, require_layout, sha256

FIRST_MEAN, FIRST_STD = -0.04, 1.8726
LATER_MEAN, LATER_STD = -0.2343, 3.0986


class PyramidCodec:
    """Frames to latents and back; see the module's docstring.

    Args:
        weights: the weights file.
        config: sizes of the network.
        tile_px: side of a tile in pixels; 0 for whole frames.
        dtype: what the network runs in.
        posterior: sample draws latents with the seed that `encode` is given; mean takes the most likely ones.

    Raises:
        DataError: the file holds other weights.
    """

    name = "pyramid"

    def __init__(
        self,
        weights: str,
        config: CausalVideoVaeConfig = RELEASED,
        *,
        tile_px: int = 256,
        dtype: Literal["float32", "bfloat16"] = "float32",
        posterior: Literal["sample", "mean"] = "sample",
    ) -> None:
        self.latent_channels = config.latent_channels
        self.spatial_stride = config.spatial_stride
        self.temporal_stride = config.temporal_stride
        channels = config.latent_channels
        self.normalization = LatentNormalization(
            (FIRST_MEAN,) * channels, (FIRST_STD,) * channels, (LATER_MEAN,) * channels, (LATER_STD,) * channels
        )
        self._weights, self._config = weights, config
        self._tile_px, self._dtype, self._posterior = tile_px, dtype, posterior
        require_layout(weights, read_layout(weights), self._on_meta().state_dict())

    @classmethod
    def from_path(
        cls,
        path: str,
        *,
        tile_px: int = 256,
        dtype: Literal["float32", "bfloat16"] = "float32",
        posterior: Literal["sample", "mean"] = "sample",
    ) -> "PyramidCodec":
        """Find weights and config at a path, local or s3://; see the module's docstring.

        Raises:
            ConfigError: nothing is there, or a folder without the files.
            DataError: the config or the weights are of another network, or damaged.
        """
        weights, config_path = find_files(path)
        config = RELEASED if config_path is None else read_config(config_path)
        return cls(weights, config, tile_px=tile_px, dtype=dtype, posterior=posterior)

    def fingerprint(self) -> dict[str, str]:
        """Name, sha256 of the weights file, and what else decides the latents."""
        groups = self._config.encoder.num_groups
        tiles = f"tiles of {self._tile_px} px" if self._tile_px else "whole frames"
        geometry = (
            f"8x8x8 causal, {self.latent_channels} channels, {groups} groups, {tiles}, {self._dtype}, posterior "
            f"{self._posterior}"
        )
        return {"codec": self.name, "codec_weights_sha256": self._weights_sha256, "codec_config": geometry}

    def encode(self, frames: Tensor, *, seed: int | None = None) -> Tensor:
        """Encode a clip.

        Args:
            frames: t h w c, float in [-1, 1], t = 8k+1, h and w multiples of 8. Gradients pass.
            seed: of the posterior's noise; None takes the mean, as `posterior="mean"` always does.

        Returns:
            c t h w, float32, un-normalised: k+1 latents at an eighth of the size. The latents of a prefix of the frames
            are a prefix of the latents, bit for bit.

        Raises:
            ValueError: a shape that breaks these rules.
        """
        self._check_frames(frames)
        moments = self._network(frames.device).encode(rearrange(frames, "t h w c -> 1 c t h w"))
        posterior = Posterior.from_moments(moments)
        if seed is None or self._posterior == "mean":
            return posterior.mean[0]
        return posterior.sample(seed)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents c t h w, un-normalised, to frames t h w c, float32 about [-1, 1] (not clamped).

        Gradients pass, also from later frames to earlier latents.
        """
        return rearrange(self._network(latents.device).decode(latents[None]), "1 c t h w -> t h w c")

    def decode_last(self, context: Tensor, last: Tensor, *, recompute: bool = False) -> Tensor:
        """Decode the latent that follows `context`; gradients pass to it, none to the context.

        Args:
            context: c t h w, un-normalised, from the clip's first latent on; t may be 0.
            last: c 1 h w.
            recompute: run the network's levels again in backward instead of keeping their activations.

        Returns:
            Frames t h w c: the end of what `decode` gives for all latents, 8 of them, or 1 without context.
        """
        shapes = [tuple(x.shape[:1] + x.shape[2:]) for x in (context, last) if x.ndim == 4]
        if len(shapes) != 2 or shapes[0] != shapes[1] or last.shape[1] != 1:
            raise ValueError(
                f"pyramid codec: decode_last wants context c t h w and one latent c 1 h w of its size, got "
                f"{tuple(context.shape)} and {tuple(last.shape)}."
            )
        network = self._network(last.device)
        frames = network.decode_last(context[None], last[None], recompute=recompute)
        return rearrange(frames, "1 c t h w -> t h w c")

    @cached_property
    def _weights_sha256(self) -> str:
        return sha256(self._weights)

    def _on_meta(self) -> CausalVideoVae:
        with torch.device("meta"):
            return CausalVideoVae(self._config, tile_px=self._tile_px)

    @cached_property
    def _loaded(self) -> CausalVideoVae:
        network = self._on_meta()
        load_weights(network, self._weights)
        return network.to(getattr(torch, self._dtype)).requires_grad_(False).eval()

    def _network(self, device: torch.device) -> CausalVideoVae:
        return self._loaded.to(device)

    def _check_frames(self, frames: Tensor) -> None:
        """The order of the axes; sizes are the network's to check."""
        if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.is_floating_point():
            raise ValueError(
                f"pyramid codec: frames must be float t h w 3 in [-1, 1], got {frames.dtype} {tuple(frames.shape)}."
            )
