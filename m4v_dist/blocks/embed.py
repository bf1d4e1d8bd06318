"""Patches, timestep and pooled-text embedding, and rotary positions of three axes.

Source: PyramidFlow flux_modules/modeling_pyramid_flux.py and modeling_embedding.py at 3040d71.

Legend: `c` channels, `t` `h` `w` latent frames and grid, `p` `q` row and column in a patch, `l` tokens, `k` columns,
`d` width, `j` rotary pairs of a head.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from m4v_dist.blocks.layout import PackedLayout

ROPE_THETA = 10_000.0
TIMESTEP_WIDTH = 256


def patchify(clip: Tensor, patch_size: int) -> Tensor:
    """Cut a clip to patches in raster order, channels innermost.

    Args:
        clip: c t h w, with h and w multiples of `patch_size`.
        patch_size: side of a patch, in latents.

    Returns:
        l, c * patch_size^2.

    Raises:
        ValueError: the grid is no multiple of the patch.
    """
    height, width = clip.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"patchify: a latent grid of {height} x {width} is no multiple of model.patch_size={patch_size}; use "
            f"bucket sizes whose coarsest grid is (8 px per latent, times 2 per pyramid stage above 0, times "
            f"{patch_size})."
        )
    return rearrange(clip, "c t (h p) (w q) -> (t h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(tokens: Tensor, num_frames: int, height: int, width: int, patch_size: int) -> Tensor:
    """Undo `patchify`: l (p q c) to c t h w; `height` and `width` are the grid in tokens."""
    return rearrange(
        tokens, "(t h w) (p q c) -> c t (h p) (w q)", t=num_frames, h=height, w=width, p=patch_size, q=patch_size
    )


class ConditioningEmbedding(nn.Module):
    """Timestep and pooled text to one conditioning vector per column; float32 also under autocast.

    Args:
        width: d.
        pooled_width: width of the pooled text.
    """

    def __init__(self, width: int, pooled_width: int) -> None:
        super().__init__()
        self.timestep_in = nn.Linear(TIMESTEP_WIDTH, width)
        self.timestep_out = nn.Linear(width, width)
        self.pooled_in = nn.Linear(pooled_width, width)
        self.pooled_out = nn.Linear(width, width)

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        """Timestep k in [0, 1000] and pooled k d to the conditioning vector, k d."""
        with torch.autocast(timestep.device.type, enabled=False):
            time = self.timestep_out(F.silu(self.timestep_in(timestep_sinusoid(timestep))))
            return time + self.pooled_out(F.silu(self.pooled_in(pooled.float())))


def timestep_sinusoid(timestep: Tensor) -> Tensor:
    """Sinusoid of width 256, cosines first, longest period 1e4: k to k 256, float32."""
    half = TIMESTEP_WIDTH // 2
    rates = torch.exp(-math.log(10_000.0) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half)
    angles = timestep.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@torch.compiler.disable
def rope_table(layout: PackedLayout, axes: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each video token's rotary angles; text stands at 0 and is not rotated.

    Args:
        layout: has the positions (t, h, w).
        axes: rotary width of t, h, w; sums to the head width.

    Returns:
        cos, sin: each lv 1 j with j = head width / 2, float32.
    """
    return layout.table(("rope", axes), lambda made: _make_rope(made.positions, axes))


def _make_rope(positions: Tensor, axes: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    angles = []
    for axis, width in enumerate(axes):
        rates = ROPE_THETA ** -(torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width)
        angles.append(positions[:, axis, None].double() * rates)  # l j
    joined = torch.cat(angles, dim=-1)[:, None]
    return joined.cos().float(), joined.sin().float()
