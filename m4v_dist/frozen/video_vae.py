"""Codecs behind one interface: frames to latents and back, causal, chunked, differentiable.

`build_codec` knows them all: `pca`, the embedded default, and `pyramid`, PyramidFlow's causal video VAE from released
weights. `LatentNormalization` lives in its own file, so that a codec's file and this one form no circle.

Legend: `c` channels, `t` frames or latents, `h` `w` pixels or latent grid.
"""

from typing import Protocol, assert_never

from torch import Tensor

from m4v_dist.config.data_settings import CodecSettings
from m4v_dist.frozen.latent_normalization import LatentNormalization
from m4v_dist.frozen.pca_codec import EMBEDDED_WEIGHTS, PcaCodec
from m4v_dist.frozen.pyramid_codec import PyramidCodec

__all__ = ["Codec", "LatentNormalization", "build_codec", "frames_from_uint8", "frames_to_uint8"]


class Codec(Protocol):
    """What a codec owes; it runs on the device of what it is given.

    Attributes:
        name: its name in fingerprints.
        latent_channels: c of its latents.
        spatial_stride: pixels per latent along h and w.
        temporal_stride: frames per latent after the first.
        normalization: statistics of its latents.
    """

    name: str
    latent_channels: int
    spatial_stride: int
    temporal_stride: int
    normalization: LatentNormalization

    def encode(self, frames: Tensor, *, seed: int | None = None) -> Tensor:
        """Map frames t h w c, float in [-1, 1], t = 8k+1, to un-normalised latents c t h w, float32.

        `seed` decides the noise of a codec that draws its latents, so that the same clip gives the same bytes; None
        takes their mean, as a codec does that draws none.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Map un-normalised latents c t h w to frames t h w c, float32 about [-1, 1]; gradients pass."""
        ...

    def decode_last(self, context: Tensor, last: Tensor, *, recompute: bool = False) -> Tensor:
        """Decode the one latent c 1 h w that follows `context` c t h w to the last frames that `decode` would give.

        Gradients pass to `last`, none to the context. `recompute` runs parts again in backward, to save memory.
        """
        ...

    def fingerprint(self) -> dict[str, str]:
        """Name, hash of the weights and geometry; equal fingerprints mean exchangeable latents."""
        ...


def build_codec(settings: CodecSettings) -> Codec:
    """Build the codec that the settings name.

    Raises:
        ConfigError: its weights file does not exist.
        DataError: the file holds something else.
    """
    match settings.kind:
        case "pca":
            return PcaCodec.from_file(settings.weights or EMBEDDED_WEIGHTS)
        case "pyramid":
            assert settings.weights is not None  # the settings' own check
            return PyramidCodec.from_path(
                settings.weights, tile_px=settings.tile_px, dtype=settings.dtype, posterior=settings.posterior
            )
        case _:
            assert_never(settings.kind)


def frames_from_uint8(frames: Tensor) -> Tensor:
    """Map uint8 frames t h w c to float32 in [-1, 1]."""
    return frames.float() / 127.5 - 1.0


def frames_to_uint8(frames: Tensor) -> Tensor:
    """Map float frames t h w c in [-1, 1] to uint8, clamped and rounded; no gradient."""
    return ((frames.detach().float() + 1.0) * 127.5).round().clamp(0, 255).to("cpu").byte()
