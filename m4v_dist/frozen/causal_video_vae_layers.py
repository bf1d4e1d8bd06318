"""Layers of PyramidFlow's causal video VAE, each able to run a clip in chunks of time.

Nothing looks ahead: a convolution over time reads its own frame and the two before, norms and attention stay inside a
frame. So a clip can be run in chunks, if every convolution is given the last frames that it saw: a `Chunk` carries
them from one run to the next. A whole clip is one chunk with nothing before it, so there is one path for both.
The modules' attributes are the released state dict's names; what each key is stands in `causal_video_vae.py`.

Source: PyramidFlow video_vae/modeling_{causal_conv,resnet,block,enc_dec}.py at 3040d71.

Legend: `b` batch, `c` channels, `t` frames at a level, `h` `w` rows and columns at a level. All tensors are of the
weights' dtype; gradients pass everywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_NORM_EPS = 1e-6


@dataclass
class Chunk:
    """One run over consecutive frames, and what it hands to the next.

    What came before is only read and what comes after is only written, so a layer may be run twice (recompute).

    Args:
        starts_clip: the clip begins with this chunk, so upsampling in time leaves out what lies before its frame 0.
        is_last: no chunk follows, so nothing is kept for one.
        past: frames `b c t h w` that each convolution still needs from the chunk before; zeros where it has none.
        kept: the same for the chunk after.
    """

    starts_clip: bool = True
    is_last: bool = False
    past: Mapping["CausalConv3d", Tensor] = field(default_factory=dict)
    kept: dict["CausalConv3d", Tensor] = field(default_factory=dict)

    def after(self, *, is_last: bool) -> "Chunk":
        """The chunk that follows this one, once this one was run through the network."""
        return Chunk(starts_clip=False, is_last=is_last, past=self.kept)


class FrameNorm(nn.GroupNorm):
    """Group norm with the statistics of one frame: over time it would look ahead."""

    def __init__(self, num_groups: int, channels: int) -> None:
        super().__init__(num_groups, channels, eps=_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `b c t h w`."""
        frames = super().forward(rearrange(x, "b c t h w -> (b t) c h w"))
        return rearrange(frames, "(b t) c h w -> b c t h w", b=len(x))


class CausalConv3d(nn.Module):
    """Convolution over space (zero-padded to keep the size) and over this frame and those before it.

    Args:
        in_channels, out_channels: c before and after.
        kernel: frames, rows and columns that one output sees; 1 or 3.
        stride: over t, h and w.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 3, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__()
        side = kernel // 2
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride=stride, padding=(0, side, side))
        self._num_before = kernel - 1
        self._time_stride = stride[0]

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Map `b c t h w`, after the frames that `chunk` kept of the last one."""
        if self._num_before == 0:
            return self.conv(x)
        before = chunk.past.get(self)
        x = F.pad(x, (0, 0, 0, 0, self._num_before, 0)) if before is None else torch.cat([before, x], dim=2)
        output = self.conv(x)
        if not chunk.is_last:
            # What the next output reads: two frames, or one behind a stride of two. A copy, because a view would keep
            # the whole chunk in memory.
            chunk.kept[self] = x[:, :, self._time_stride * output.shape[2] :].clone()
        return output


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and convolution, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = FrameNorm(num_groups, in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = FrameNorm(num_groups, out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = CausalConv3d(in_channels, out_channels, kernel=1) if in_channels != out_channels else None

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Map `b c t h w`, c to the block's output channels."""
        y = self.conv1(F.silu(self.norm1(x)), chunk)
        y = self.conv2(F.silu(self.norm2(y)), chunk)
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x, chunk))


class FrameAttention(nn.Module):
    """Single-head attention among the places of one frame, with a residual."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.group_norm = FrameNorm(num_groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Map `b c t h w`."""
        places = rearrange(self.group_norm(x), "b c t h w -> (b t) 1 (h w) c")  # one head
        mixed = F.scaled_dot_product_attention(self.to_q(places), self.to_k(places), self.to_v(places))
        mixed = self.to_out[0](mixed)
        return x + rearrange(mixed, "(b t) 1 (h w) c -> b c t h w", b=len(x), h=x.shape[3])


class MiddleBlock(nn.Module):
    """Residual block, attention inside each frame, residual block."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels, num_groups) for _ in range(2)])
        self.attentions = nn.ModuleList([FrameAttention(channels, num_groups)])

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Map `b c t h w`."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x, chunk)), chunk)


class Downsample(nn.Module):
    """Convolution that halves h and w, or t (of the first chunk 2m+1 frames become m+1)."""

    def __init__(self, channels: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=stride)

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Map `b c t h w`."""
        return self.conv(x, chunk)


class SpaceUpsample(nn.Module):
    """Convolution to four times the channels, laid out as 2 x 2 pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, 4 * channels)

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Map `b c t h w` to twice h and w."""
        return rearrange(self.conv(x, chunk), "b (c row column) t h w -> b c t (h row) (w column)", row=2, column=2)


class TimeUpsample(nn.Module):
    """Convolution to twice the channels, laid out as two frames.

    Each latent frame stands for itself and the one before it; before a clip's first there is none, so it is left out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, 2 * channels)

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Map `b c t h w` to 2t frames, 2t - 1 where the clip starts."""
        frames = rearrange(self.conv(x, chunk), "b (c pair) t h w -> b c (t pair) h w", pair=2)
        return frames[:, :, 1:] if chunk.starts_clip else frames


class DownBlock(nn.Module):
    """One level of the encoder: residual blocks, then half the size in space, then in time.

    Args:
        in_channels, out_channels: c before and after.
        num_layers: residual blocks.
        num_groups: of the norms.
        halves_space, halves_time: what the level ends with.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_layers: int,
        num_groups: int,
        halves_space: bool,
        halves_time: bool,
    ) -> None:
        super().__init__()
        self.resnets = residual_blocks(in_channels, out_channels, num_layers, num_groups)
        self.downsamplers = nn.ModuleList([Downsample(out_channels, (1, 2, 2))] if halves_space else [])
        self.temporal_downsamplers = nn.ModuleList([Downsample(out_channels, (2, 1, 1))] if halves_time else [])

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Map `b c t h w`."""
        for layer in (*self.resnets, *self.downsamplers, *self.temporal_downsamplers):
            x = layer(x, chunk)
        return x


class UpBlock(nn.Module):
    """One level of the decoder: residual blocks, then twice the size in space, then in time.

    Args:
        in_channels, out_channels: c before and after.
        num_layers: residual blocks.
        num_groups: of the norms.
        doubles_space, doubles_time: what the level ends with.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_layers: int,
        num_groups: int,
        doubles_space: bool,
        doubles_time: bool,
    ) -> None:
        super().__init__()
        self.resnets = residual_blocks(in_channels, out_channels, num_layers, num_groups)
        self.upsamplers = nn.ModuleList([SpaceUpsample(out_channels)] if doubles_space else [])
        self.temporal_upsamplers = nn.ModuleList([TimeUpsample(out_channels)] if doubles_time else [])

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Map `b c t h w`."""
        for layer in (*self.resnets, *self.upsamplers, *self.temporal_upsamplers):
            x = layer(x, chunk)
        return x


def residual_blocks(in_channels: int, out_channels: int, num_layers: int, num_groups: int) -> nn.ModuleList:
    """The residual blocks of a level; the first one changes the channels."""
    return nn.ModuleList(
        [ResidualBlock(out_channels if i else in_channels, out_channels, num_groups) for i in range(num_layers)]
    )


@dataclass(frozen=True)
class LevelSizes:
    """Sizes of an encoder or a decoder, one entry a level.

    Args:
        channels: c of each level, finest level first, for encoder and decoder alike.
        num_layers: residual blocks of each level, in the order that they run.
        scales_space, scales_time: whether a level changes the size by two, in the order that they run.
        num_groups: of all group norms.
    """

    channels: tuple[int, ...]
    num_layers: tuple[int, ...]
    scales_space: tuple[bool, ...]
    scales_time: tuple[bool, ...]
    num_groups: int


class Encoder(nn.Module):
    """Frames to moments before the 1 x 1 x 1 convolution.

    Args:
        in_channels: of a pixel.
        out_channels: of the moments.
        sizes: of the levels.
    """

    def __init__(self, in_channels: int, out_channels: int, sizes: LevelSizes) -> None:
        super().__init__()
        first, last = sizes.channels[0], sizes.channels[-1]
        self.conv_in = CausalConv3d(in_channels, first)
        self.down_blocks = nn.ModuleList(
            [
                DownBlock(
                    sizes.channels[max(level - 1, 0)],
                    sizes.channels[level],
                    num_layers=sizes.num_layers[level],
                    num_groups=sizes.num_groups,
                    halves_space=sizes.scales_space[level],
                    halves_time=sizes.scales_time[level],
                )
                for level in range(len(sizes.channels))
            ]
        )
        self.mid_block = MiddleBlock(last, sizes.num_groups)
        self.conv_norm_out = FrameNorm(sizes.num_groups, last)
        self.conv_out = CausalConv3d(last, out_channels)

    def forward(self, frames: Tensor, chunk: Chunk) -> Tensor:
        """Map `b c t h w` pixels to `b c t h w` moments of the latent grid."""
        x = self.conv_in(frames, chunk)
        for block in self.down_blocks:
            x = block(x, chunk)
        x = self.mid_block(x, chunk)
        return self.conv_out(F.silu(self.conv_norm_out(x)), chunk)


class Decoder(nn.Module):
    """Latents, after the 1 x 1 x 1 convolution, to frames.

    Args:
        in_channels: of a latent.
        out_channels: of a pixel.
        sizes: of the levels.
    """

    def __init__(self, in_channels: int, out_channels: int, sizes: LevelSizes) -> None:
        super().__init__()
        channels = sizes.channels[::-1]
        self.conv_in = CausalConv3d(in_channels, channels[0])
        self.mid_block = MiddleBlock(channels[0], sizes.num_groups)
        self.up_blocks = nn.ModuleList(
            [
                UpBlock(
                    channels[max(level - 1, 0)],
                    channels[level],
                    num_layers=sizes.num_layers[level],
                    num_groups=sizes.num_groups,
                    doubles_space=sizes.scales_space[level],
                    doubles_time=sizes.scales_time[level],
                )
                for level in range(len(channels))
            ]
        )
        self.conv_norm_out = FrameNorm(sizes.num_groups, channels[-1])
        self.conv_out = CausalConv3d(channels[-1], out_channels)

    def forward(self, latents: Tensor, chunk: Chunk, *, recompute: bool = False) -> Tensor:
        """Map `b c t h w` latents to `b c t h w` pixels; `recompute` runs each level again in backward, for memory."""
        x = self.mid_block(self.conv_in(latents, chunk), chunk)
        for block in self.up_blocks:
            x = checkpoint(block, x, chunk, use_reentrant=False) if recompute else block(x, chunk)
        return self.conv_out(F.silu(self.conv_norm_out(x)), chunk)
