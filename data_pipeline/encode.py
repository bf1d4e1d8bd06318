"""Frames to latents and captions to embeddings: the one place where a clip meets the frozen nets.

Legend: `c` latent channels, `t` frames or latents, `h` `w` pixels or grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.decode import DecodedClip
from m4v_dist.batch import TextFeatures, derive_seed
from m4v_dist.errors import OutOfMemoryJobError
from m4v_dist.frozen.text_encoder import TextEncoder
from m4v_dist.frozen.video_vae import Codec, frames_from_uint8


class EncodeError(Exception):
    """A clip cannot be encoded; the message says why."""


@dataclass(frozen=True)
class EncodedClip:
    """What the cache stores of a clip: latents c t h w bfloat16, un-normalised, and the text of each caption."""

    latents: Tensor
    texts: tuple[TextFeatures, ...]


class ClipEncoder:
    """Codec and text encoder of one worker.

    Args:
        codec: frames to latents.
        text_encoder: captions to features.
        device: where the codec runs.
    """

    def __init__(self, codec: Codec, text_encoder: TextEncoder, device: str) -> None:
        self._codec = codec
        self._text_encoder = text_encoder
        self._device = device

    @torch.no_grad()
    def encode(self, clip: DecodedClip, captions: Sequence[str], key: str) -> EncodedClip:
        """Encode one clip; the same clip gives the same bytes.

        Args:
            clip: its frames.
            captions: its texts, encoded together.
            key: the record's key, which seeds the noise of a codec that draws its latents.

        Raises:
            EncodeError: the latents are not finite.
            OutOfMemoryJobError: the clip does not fit the device.
        """
        try:
            # frombuffer's memory is read-only; torch wants to own what it gets
            frames = torch.from_numpy(clip.frames.copy()).to(self._device)
            seed = derive_seed("posterior", key)
            latents = self._codec.encode(frames_from_uint8(frames), seed=seed).to("cpu", torch.bfloat16)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryJobError(
                f"encoding {clip.frames.shape} frames on {self._device}: {str(error).splitlines()[0]}; lower "
                "precompute.num_frames or the bucket, or give an actor a whole GPU by precompute.gpus_per_actor."
            ) from error
        if not bool(torch.isfinite(latents).all()):
            raise EncodeError(f"{int((~torch.isfinite(latents)).sum())} of {latents.numel()} latents are not finite")
        return EncodedClip(latents, tuple(self._text_encoder.encode(list(captions))))
