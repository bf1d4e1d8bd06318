"""Causal depthwise convolution over a packed sequence; taps never reach over a segment's start.

Plain torch here, the definition and what runs on a CPU; `conv1d_triton` with the Triton scan.

Legend: `b` batch, `l` tokens, `d` channels, `k` taps, `s` segments.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from m4v_dist.kernels.backend import Backend
from m4v_dist.kernels.segments import check_cu_seqlens


@torch.compiler.disable
def causal_conv1d(
    x: Tensor,  # b l d
    weight: Tensor,  # d k
    bias: Tensor | None,  # d
    *,
    cu_seqlens: Tensor | None = None,
    has_silu: bool = False,
    backend: Backend = "reference_chunked",
) -> Tensor:
    """Convolve each channel with its own taps: out_t = bias + sum_j weight[:, k - 1 - j] x_{t - j}.

    A sum of k shifted products instead of `conv1d`: exact in float32 under autocast, and a tap that would read another
    segment is masked, so segments need no loop.

    Args:
        x: b l d, any float dtype; products and sum are float32 (float64 for float64).
        weight: d k, 2 <= k <= 4; the last tap multiplies the token itself.
        bias: d, or None.
        cu_seqlens: s + 1, int32, rising from 0 to l, on the host or the device; b must be 1.
        has_silu: out * sigmoid(out).
        backend: of the scan beside it; triton has a convolution of its own, the others take plain torch.

    Returns:
        b l d, dtype of x.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[2] or not 2 <= weight.shape[1] <= 4:
        raise ValueError(
            f"causal_conv1d: x must be b l d and weight d k with 2 to 4 taps, but they have shapes {tuple(x.shape)} "
            f"and {tuple(weight.shape)}."
        )
    if bias is not None and tuple(bias.shape) != (x.shape[2],):
        raise ValueError(f"causal_conv1d: bias must have shape ({x.shape[2]},), but has {tuple(bias.shape)}.")
    if cu_seqlens is not None:
        check_cu_seqlens("causal_conv1d", cu_seqlens, x.shape[0], x.shape[1])
    if backend == "triton":
        from m4v_dist.kernels.conv1d_triton import causal_conv1d_triton

        return causal_conv1d_triton(x, weight, bias, cu_seqlens=cu_seqlens, has_silu=has_silu)
    _, l, _ = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    values, taps = x.to(dtype), weight.to(dtype)
    reach = torch.arange(l, device=x.device)  # l; how many earlier tokens of its segment a token has
    if cu_seqlens is not None:
        starts = cu_seqlens[:-1].long().to(x.device, non_blocking=True)
        reach = reach - starts[torch.bucketize(reach, starts[1:], right=True)]
    out = values * taps[:, -1]
    for back in range(1, min(weight.shape[1], l)):
        shifted = values[:, :-back]
        if cu_seqlens is not None:
            # Filled, not multiplied: 0 * NaN is NaN, which would pass the border, here and in backward.
            shifted = shifted.masked_fill((reach[back:] < back)[:, None], 0)
        out = out + F.pad(shifted * taps[:, -1 - back], (0, 0, back, 0))
    if bias is not None:
        out = out + bias.to(dtype)
    # SiLU of the rounded sum: its input is kept for backward, in x's dtype.
    return F.silu(out.to(x.dtype)) if has_silu else out.to(x.dtype)
