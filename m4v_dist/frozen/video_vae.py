"""Codecs behind one interface: frames to latents and back, causal, chunked, differentiable.

Only the embedded `pca` codec stands here so far; the architectures that load released weights join `build_codec` as
further arms. `LatentNormalization` lives in its own file, so that a codec's file and this one form no circle.

Legend: `c` channels, `t` frames or latents, `h` `w` pixels or latent grid.
"""

from typing import Protocol, assert_never

from torch import Tensor

from m4v_dist.config.schema import CodecSettings
from m4v_dist.frozen.latent_normalization import LatentNormalization
from m4v_dist.frozen.pca_codec import EMBEDDED_WEIGHTS, PcaCodec

__all__ = ["Codec", "LatentNormalization", "build_codec", "frames_from_uint8", "frames_to_uint8"]


class Codec(Protocol):
    """What a codec owes.

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

    def encode(self, frames: Tensor) -> Tensor:
        """Map frames t h w c, float in [-1, 1], t = 8k+1, to un-normalised latents c t h w, float32."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Map un-normalised latents c t h w to frames t h w c, float32 about [-1, 1]; gradients pass."""
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
        case _:
            assert_never(settings.kind)


def frames_from_uint8(frames: Tensor) -> Tensor:
    """Map uint8 frames t h w c to float32 in [-1, 1]."""
    return frames.float() / 127.5 - 1.0


def frames_to_uint8(frames: Tensor) -> Tensor:
    """Map float frames t h w c in [-1, 1] to uint8, clamped and rounded; no gradient."""
    return ((frames.detach().float() + 1.0) * 127.5).round().clamp(0, 255).to("cpu").byte()
