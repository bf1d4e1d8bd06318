"""PyramidFlow's causal video VAE: 8 x 8 x 8 pixels a latent, 16 channels, 8k+1 frames to k+1 latents.

What lives here: the network, chunks of time, tiles of space. Files, seeds and latent statistics are
`pyramid_codec.py`'s, layers are `causal_video_vae_layers.py`'s.

*Names.* The state dict is the released one, key for key: `encoder.` and `decoder.` (`conv_in`, `down_blocks.<level>` or
`up_blocks.<level>` with `resnets.<i>`, `downsamplers.0` or `upsamplers.0` over space and `temporal_...` over time,
`mid_block`, `conv_norm_out`, `conv_out`), `quant_conv` (to moments) and `post_quant_conv` (from latents).

*Time.* Whole or in chunks, the result is the same up to rounding. A chunk is the first frame alone, then `num_latents`
latents' worth; chunks of one latent have equal shapes whatever the clip's length, so a prefix of a clip gives a prefix
of its latents bit for bit. Gradients pass the borders.

*Space.* Above `tile_px`, overlapping tiles are run alone and blended linearly. Another result than the whole frame's
(norms and attention see one tile), so the tile size is part of a codec's fingerprint.

Source: PyramidFlow video_vae/modeling_causal_vae.py and modeling_enc_dec.py at 3040d71.

Legend: `b` batch, `c` channels, `t` frames or latents, `h` `w` pixels or latent grid.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from m4v_dist.batch import slot_generator
from m4v_dist.frozen.causal_video_vae_layers import CausalConv3d, Chunk, Decoder, Encoder, LevelSizes

_PIXEL_CHANNELS = 3
_LOG_VARIANCE_RANGE = (-30.0, 20.0)
TILE_OVERLAP = 4
"""A tile shares one part in this many with the next one."""


@dataclass(frozen=True)
class CausalVideoVaeConfig:
    """Sizes of the network.

    Args:
        latent_channels: c of a latent.
        encoder, decoder: their levels; between them they must scale equally.
    """

    latent_channels: int
    encoder: LevelSizes
    decoder: LevelSizes

    @property
    def spatial_stride(self) -> int:
        """Pixels a latent along h and w."""
        return 2 ** sum(self.encoder.scales_space)

    @property
    def temporal_stride(self) -> int:
        """Frames a latent after the first."""
        return 2 ** sum(self.encoder.scales_time)


_RELEASED_SCALES = (True, True, True, False)
RELEASED = CausalVideoVaeConfig(
    latent_channels=16,
    encoder=LevelSizes((128, 256, 512, 512), (2, 2, 2, 2), _RELEASED_SCALES, _RELEASED_SCALES, num_groups=32),
    decoder=LevelSizes((128, 256, 512, 512), (3, 3, 3, 3), _RELEASED_SCALES, _RELEASED_SCALES, num_groups=32),
)
"""The released weights' sizes: 335,402,067 parameters."""


@dataclass(frozen=True)
class Posterior:
    """What the encoder says of a clip: a normal distribution for each number of its latents.

    Args:
        mean: b c t h w, float32.
        log_variance: b c t h w, float32, clamped to [-30, 20].
    """

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> "Posterior":
        """Split moments `b (2 c) t h w`: means, then log-variances."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        return cls(mean, log_variance.clamp(*_LOG_VARIANCE_RANGE))

    def sample(self, seed: int) -> Tensor:
        """Draw latents b c t h w.

        The noise comes from the CPU, latent by latent, so that it depends neither on the device nor on how many latents
        follow: the latents of a prefix are a prefix of the latents.
        """
        generator = slot_generator(seed)
        shape = self.mean[:, :, 0].shape
        noise = torch.stack([torch.randn(shape, generator=generator) for _ in range(self.mean.shape[2])], dim=2)
        return self.mean + (0.5 * self.log_variance).exp() * noise.to(self.mean.device)


class CausalVideoVae(nn.Module):
    """The network; see the module's docstring. Inputs are cast to the weights' dtype, outputs to float32.

    Args:
        config: its sizes.
        tile_px: side of a tile in pixels, a multiple of 4 latents; 0 runs whole frames. Other sides are refused; the
            reference takes them, and cuts their overlaps off to whole latents and pixels, one apart from the other.

    Raises:
        ValueError: of every method, for a shape that breaks its rules.
    """

    def __init__(self, config: CausalVideoVaeConfig = RELEASED, *, tile_px: int = 0) -> None:
        super().__init__()
        channels = config.latent_channels
        self.encoder = Encoder(_PIXEL_CHANNELS, 2 * channels, config.encoder)
        self.decoder = Decoder(channels, _PIXEL_CHANNELS, config.decoder)
        self.quant_conv = CausalConv3d(2 * channels, 2 * channels, kernel=1)
        self.post_quant_conv = CausalConv3d(channels, channels, kernel=1)
        self.config = config
        multiple = TILE_OVERLAP * config.spatial_stride
        if tile_px % multiple:
            raise ValueError(
                f"causal video VAE: tile_px={tile_px} is no multiple of {multiple}, so the overlap is no whole number "
                f"of latents; use {tile_px // multiple * multiple + multiple}, or 0 for whole frames."
            )
        self._tile_px = tile_px

    def encode(self, frames: Tensor, *, num_latents: int | None = 1) -> Tensor:
        """Encode clips.

        Args:
            frames: b c t h w, float in [-1, 1]; t = 8k+1, h and w multiples of 8 (of the config's strides).
            num_latents: latents of a chunk after the first frame, 1 or more; None runs the whole clip at once.

        Returns:
            Moments b (2 c) t h w, float32: k+1 means, then log-variances (not clamped); see `Posterior`.
        """
        self._check_frames(frames)
        _check_chunk(num_latents)
        num_frames = None if num_latents is None else num_latents * self.config.temporal_stride

        def run(piece: Tensor, chunk: Chunk) -> Tensor:
            return self.quant_conv(self.encoder(piece, chunk), chunk)

        stride = self.config.spatial_stride
        return over_tiles(
            lambda tile: run_chunks(run, tile, num_frames), self._cast(frames), self._tile_px, self._tile_px // stride
        ).float()

    def decode(self, latents: Tensor, *, num_latents: int | None = 1, starts_clip: bool = True) -> Tensor:
        """Decode latents; gradients pass.

        Args:
            latents: b c t h w, un-normalised.
            num_latents: latents of a chunk after the first, 1 or more; None runs all at once.
            starts_clip: the first latent is a clip's first and gives 1 frame; else it gives as many as the others,
                with zeros before it in each convolution.

        Returns:
            Frames b c t h w, float32, about [-1, 1] (not clamped).
        """
        self._check_latents(latents)
        _check_chunk(num_latents)

        def run(tile: Tensor) -> Tensor:
            return run_chunks(self._decode_chunk, tile, num_latents, starts_clip=starts_clip)

        return self._over_latent_tiles(run, self._cast(latents))

    def decode_last(
        self, context: Tensor, last: Tensor, *, starts_clip: bool = True, recompute: bool = False
    ) -> Tensor:
        """Decode the latent that follows `context`, with gradients to it and none to the context.

        The context is run without a graph, latent by latent; of it only the frames that each convolution still needs
        stay in memory. The result is the end of what `decode` gives for all latents.

        Args:
            context: b c t h w, un-normalised, t may be 0.
            last: b c 1 h w.
            starts_clip: of the first latent, as in `decode`.
            recompute: run each level again in backward instead of keeping its activations.

        Returns:
            Frames b c t h w, float32: 8, or 1 where `last` is the first latent of a clip.
        """
        self._check_latents(last)
        if last.shape[2] != 1 or context.ndim != 5 or context[:, :, :0].shape != last[:, :, :0].shape:
            raise ValueError(
                f"causal video VAE: decode_last wants context b c t h w and one latent b c 1 h w of its size, got "
                f"{tuple(context.shape)} and {tuple(last.shape)}."
            )
        num_context = context.shape[2]

        def run(tile: Tensor) -> Tensor:
            chunk = Chunk(starts_clip=starts_clip, is_last=num_context == 0)
            with torch.no_grad():
                for index in range(num_context):
                    self._decode_chunk(tile[:, :, index : index + 1], chunk)
                    chunk = chunk.after(is_last=index == num_context - 1)
            return self._decode_chunk(tile[:, :, num_context:], chunk, recompute=recompute)

        return self._over_latent_tiles(run, self._cast(torch.cat([context.detach(), last], dim=2)))

    def _decode_chunk(self, latents: Tensor, chunk: Chunk, *, recompute: bool = False) -> Tensor:
        return self.decoder(self.post_quant_conv(latents, chunk), chunk, recompute=recompute)

    def _over_latent_tiles(self, run: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
        return over_tiles(run, latents, self._tile_px // self.config.spatial_stride, self._tile_px).float()

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.quant_conv.conv.weight.dtype)

    def _check_frames(self, frames: Tensor) -> None:
        if frames.ndim != 5 or frames.shape[1] != _PIXEL_CHANNELS or not frames.is_floating_point():
            raise ValueError(
                f"causal video VAE: frames must be float b {_PIXEL_CHANNELS} t h w in [-1, 1], got {frames.dtype} "
                f"{tuple(frames.shape)}."
            )
        num_frames, height, width = frames.shape[2:]
        space, time = self.config.spatial_stride, self.config.temporal_stride
        if (num_frames - 1) % time or height % space or width % space or frames.numel() == 0:
            raise ValueError(
                f"causal video VAE: {frames.shape[0]} clips of {num_frames} frames of {height} x {width} break the "
                f"{time}k+1 frame rule or the multiple of {space}; cut to {max(num_frames - 1, 0) // time * time + 1} "
                "frames, or crop."
            )

    def _check_latents(self, latents: Tensor) -> None:
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels or latents.numel() == 0:
            raise ValueError(
                f"causal video VAE: latents must be b c t h w with c={channels} and t > 0, got "
                f"{tuple(latents.shape)}; decode latents of this network only."
            )


def _check_chunk(num_latents: int | None) -> None:
    if num_latents is not None and num_latents < 1:
        raise ValueError(f"causal video VAE: num_latents={num_latents} a chunk; give 1 or more, or None for all.")


def run_chunks(
    run: Callable[[Tensor, Chunk], Tensor], x: Tensor, num_frames: int | None, *, starts_clip: bool = True
) -> Tensor:
    """Run `x`, b c t h w, through `run` chunk by chunk: frame 0 alone, then `num_frames` at a time; None: all at once.

    Returns:
        What the runs gave, joined along t.
    """
    num_after = x.shape[2] - 1
    sizes = [1 + num_after]
    if num_frames is not None:
        sizes = [1, *(min(num_frames, num_after - start) for start in range(0, num_after, num_frames))]
    outputs: list[Tensor] = []
    chunk = Chunk(starts_clip=starts_clip, is_last=len(sizes) == 1)
    for number, piece in enumerate(x.split(sizes, dim=2), start=1):
        outputs.append(run(piece, chunk))
        chunk = chunk.after(is_last=number == len(sizes) - 1)
    return torch.cat(outputs, dim=2)


def over_tiles(run: Callable[[Tensor], Tensor], x: Tensor, tile: int, tile_after: int) -> Tensor:
    """Run overlapping tiles of the last two axes through `run`, and blend what comes back.

    Tiles start every 3/4 of their side, also where the one before already reaches the border; where two overlap, the
    weight goes linearly from the upper (left) one to the lower (right) one. That is the reference's tiling.

    Args:
        run: maps a tile to one that is `tile_after / tile` times as large.
        x: ... h w.
        tile: side of a tile of `x`; 0, or a side that holds all of `x`, runs it whole.
        tile_after: side of what a whole tile becomes.

    Returns:
        ... h w of the new size; gradients pass.
    """
    height, width = x.shape[-2:]
    if tile == 0 or max(height, width) <= tile:
        return run(x)
    step, overlap = tile - tile // TILE_OVERLAP, tile_after // TILE_OVERLAP
    rows: list[list[Tensor]] = []
    for top in range(0, height, step):
        row: list[Tensor] = []
        for left in range(0, width, step):
            piece = run(x[..., top : top + tile, left : left + tile])
            if rows:
                piece = _blend(rows[-1][len(row)], piece, overlap, axis=-2)
            if row:
                piece = _blend(row[-1], piece, overlap, axis=-1)
            row.append(piece)
        rows.append(row)
    keep = tile_after - overlap
    return torch.cat([torch.cat([piece[..., :keep, :keep] for piece in row], dim=-1) for row in rows], dim=-2)


def _blend(before: Tensor, after: Tensor, overlap: int, *, axis: int) -> Tensor:
    """Fade `before`'s end into `after`'s start along an axis; both end at the border where one is shorter."""
    overlap = min(overlap, before.shape[axis], after.shape[axis])
    weight = torch.arange(overlap, dtype=after.dtype, device=after.device) / overlap
    weight = weight.reshape(-1, *[1] * (-1 - axis))
    shared, rest = after.tensor_split([overlap], dim=axis)
    end = before.narrow(axis, before.shape[axis] - overlap, overlap)
    return torch.cat([end * (1 - weight) + shared * weight, rest], dim=axis)
