"""The causal depthwise convolution on a GPU: gather, taps, bias and SiLU in one launch, as a custom op.

It may read its tokens through an index (`source`): position t is row source[t] of x, so that a re-composed sequence
need not be written down before it is convolved. Backward gathers too: each row of x collects from the positions that
read it, so there are no atomics and equal inputs give equal bits.

Legend: `r` rows of x, `l` positions, `d` channels, `k` taps, `m` positions that may read one row, `s` segments.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_TOKENS, BLOCK_CHANNELS = 32, 128
TILES_OF_PROGRAM = 16
"""Tiles of tokens that one program of the weights' gradient adds up."""
MAX_READERS = 2
"""Positions that may read one row: text stands before and behind the frames."""


@triton.jit
def _tap(
    x, source, reach, positions, is_inside, channels, is_channel, x_stride, BACK: tl.constexpr, HAS_SOURCE: tl.constexpr
):
    """The tokens BACK before some positions, float32; zero in front of a segment and where the source is -1."""
    is_there = is_inside & (tl.load(reach + positions, mask=is_inside, other=0) >= BACK)
    rows = (positions - BACK).to(tl.int64)
    if HAS_SOURCE:
        rows = tl.load(source + rows, mask=is_there, other=-1).to(tl.int64)
        is_there = is_there & (rows >= 0)
    return tl.load(
        x + rows[:, None] * x_stride + channels[None, :], mask=is_there[:, None] & is_channel[None, :], other=0.0
    ).to(tl.float32)


@triton.jit
def _before_activation(
    x, weight, bias, source, reach, positions, is_inside, channels, is_channel, x_stride,
    TAPS: tl.constexpr, HAS_SOURCE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    out = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if HAS_BIAS:
        out += tl.load(bias + channels, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    for back in tl.static_range(TAPS):
        taps = tl.load(weight + channels * TAPS + (TAPS - 1 - back), mask=is_channel, other=0.0).to(tl.float32)
        values = _tap(x, source, reach, positions, is_inside, channels, is_channel, x_stride, back, HAS_SOURCE)
        out += taps[None, :] * values
    return out


@triton.jit
def convolve(
    x, weight, bias, source, reach,  # read: r d, d k, d, l, l
    out,  # written: l d
    num_positions, num_channels, x_stride,
    TAPS: tl.constexpr, HAS_SOURCE: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program for each tile of positions and channels."""
    positions = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_inside, is_channel = positions < num_positions, channels < num_channels
    value = _before_activation(
        x, weight, bias, source, reach, positions, is_inside, channels, is_channel, x_stride,
        TAPS, HAS_SOURCE, HAS_BIAS, BLOCK_T, BLOCK_D,
    )  # fmt: skip
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    place = positions.to(tl.int64)[:, None] * num_channels + channels[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=is_inside[:, None] & is_channel[None, :])


@triton.jit
def convolve_gradients(
    x, weight, bias, source, reach, dout,  # read: r d, d k, d, l, l, l d
    dbefore, dweights,  # written: l d, programs k+1 d
    num_positions, num_channels, x_stride,
    TAPS: tl.constexpr, HAS_SOURCE: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    TILES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient in front of the activation, and each program's part of that of the weights."""
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_channel = channels < num_channels
    of_bias, of_0, of_1 = (
        tl.zeros((BLOCK_D,), tl.float32),
        tl.zeros((BLOCK_D,), tl.float32),
        tl.zeros((BLOCK_D,), tl.float32),
    )
    of_2, of_3 = tl.zeros((BLOCK_D,), tl.float32), tl.zeros((BLOCK_D,), tl.float32)
    for tile in range(0, TILES):
        positions = (tl.program_id(0) * TILES + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        is_inside = positions < num_positions
        place = positions.to(tl.int64)[:, None] * num_channels + channels[None, :]
        mask = is_inside[:, None] & is_channel[None, :]
        gradient = tl.load(dout + place, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            value = _before_activation(
                x, weight, bias, source, reach, positions, is_inside, channels, is_channel, x_stride,
                TAPS, HAS_SOURCE, HAS_BIAS, BLOCK_T, BLOCK_D,
            )  # fmt: skip
            sigmoid = 1.0 / (1.0 + tl.exp(-value))
            gradient = gradient * sigmoid * (1.0 + value * (1.0 - sigmoid))
        tl.store(dbefore + place, gradient, mask=mask)
        of_bias += tl.sum(gradient, 0)
        of_0 += tl.sum(
            gradient * _tap(x, source, reach, positions, is_inside, channels, is_channel, x_stride, 0, HAS_SOURCE), 0
        )
        of_1 += tl.sum(
            gradient * _tap(x, source, reach, positions, is_inside, channels, is_channel, x_stride, 1, HAS_SOURCE), 0
        )
        if TAPS > 2:
            of_2 += tl.sum(
                gradient * _tap(x, source, reach, positions, is_inside, channels, is_channel, x_stride, 2, HAS_SOURCE),
                0,
            )
        if TAPS > 3:
            of_3 += tl.sum(
                gradient * _tap(x, source, reach, positions, is_inside, channels, is_channel, x_stride, 3, HAS_SOURCE),
                0,
            )
    # The taps in the weight's order, from the farthest back; then the bias.
    parts = dweights + tl.program_id(0).to(tl.int64) * (TAPS + 1) * num_channels + channels
    tl.store(parts + (TAPS - 1) * num_channels, of_0, mask=is_channel)
    tl.store(parts + (TAPS - 2) * num_channels, of_1, mask=is_channel)
    if TAPS > 2:
        tl.store(parts + (TAPS - 3) * num_channels, of_2, mask=is_channel)
    if TAPS > 3:
        tl.store(parts, of_3, mask=is_channel)
    tl.store(parts + TAPS * num_channels, of_bias, mask=is_channel)


@triton.jit
def collect_gradients(
    dbefore, weight, reach, readers,  # read: l d, d k, l, r m
    dx,  # written: r d
    num_rows, num_positions, num_channels,
    TAPS: tl.constexpr, READERS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of each row of x from the positions that read it, and those behind them that their taps reached."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_row, is_channel = rows < num_rows, channels < num_channels
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for reader in tl.static_range(READERS):
        positions = tl.load(readers + rows * READERS + reader, mask=is_row, other=-1)
        is_read = is_row & (positions >= 0)
        for ahead in tl.static_range(TAPS):
            later = positions + ahead
            is_reached = is_read & (later < num_positions)
            is_reached = is_reached & (tl.load(reach + later, mask=is_reached, other=-1) >= ahead)
            taps = tl.load(weight + channels * TAPS + (TAPS - 1 - ahead), mask=is_channel, other=0.0).to(tl.float32)
            gradient = tl.load(
                dbefore + later.to(tl.int64)[:, None] * num_channels + channels[None, :],
                mask=is_reached[:, None] & is_channel[None, :],
                other=0.0,
            )
            total += taps[None, :] * gradient
    place = rows.to(tl.int64)[:, None] * num_channels + channels[None, :]
    tl.store(dx + place, total.to(dx.dtype.element_ty), mask=is_row[:, None] & is_channel[None, :])


@dataclass(frozen=True)
class GatherIndex:
    """Which row of x each position reads, and back; int32 on the device.

    Args:
        source: l; -1 reads zeros.
        readers: r m, positions that read each row, -1 where there is none.
    """

    source: Tensor
    readers: Tensor


def gather_index(source: Tensor, num_rows: int) -> GatherIndex:
    """The tables of a source on the host, l, int64.

    Raises:
        ValueError: a row that does not exist, or that more than `MAX_READERS` positions read.
    """
    rows = source.tolist()
    readers = [[-1] * MAX_READERS for _ in range(num_rows)]
    counts = [0] * num_rows
    for position, row in enumerate(rows):
        if row < 0:
            continue
        if row >= num_rows or counts[row] == MAX_READERS:
            raise ValueError(
                f"gather_index: position {position} reads row {row}, but there are {num_rows} rows and each may be "
                f"read by {MAX_READERS} positions."
            )
        readers[row][counts[row]] = position
        counts[row] += 1
    return GatherIndex(source.to(torch.int32), torch.tensor(readers, dtype=torch.int32))


@lru_cache(maxsize=256)
def _reach(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """How many earlier tokens of its segment each position has: l, int32 on the device."""
    parts = [torch.arange(end - start, dtype=torch.int32) for start, end in zip(bounds, bounds[1:], strict=False)]
    return torch.cat(parts).to(device)


@lru_cache(maxsize=256)
def _each_itself(num_rows: int, device: torch.device) -> Tensor:
    return torch.arange(num_rows, dtype=torch.int32, device=device)[:, None]


def _bounds(cu_seqlens: Tensor | None, b: int, l: int) -> tuple[int, ...]:
    return tuple(range(0, b * l + 1, l)) if cu_seqlens is None else tuple(cu_seqlens.tolist())


def _rows(x: Tensor) -> Tensor:
    """b l d as rows; a copy only where the rows do not lie at one stride, or the channels not side by side."""
    merged = x.flatten(0, 1)
    return merged if merged.stride(1) == 1 else merged.contiguous()


def causal_conv1d_triton(
    x: Tensor,  # b r d
    weight: Tensor,  # d k
    bias: Tensor | None,  # d
    *,
    cu_seqlens: Tensor | None = None,
    has_silu: bool = False,
    gather: GatherIndex | None = None,
) -> Tensor:
    """Convolve by our kernels: `conv1d.causal_conv1d` of x, or of x[source], with SiLU where asked for.

    Args:
        x: b r d, any float dtype; products and sum are float32.
        weight: d k, 2 <= k <= 4; the last tap multiplies the token itself.
        bias: d, or None.
        cu_seqlens: s + 1, int32 on the host, rising from 0 to l; b must be 1.
        has_silu: out * sigmoid(out).
        gather: which row each of the l positions reads; b must be 1. None: l is r.

    Returns:
        b l d, dtype of x.
    """
    source, readers = (None, None) if gather is None else (gather.source, gather.readers)
    return torch.ops.m4v_dist.causal_conv1d(x, weight, bias, source, readers, cu_seqlens, has_silu)


@torch.library.custom_op("m4v_dist::causal_conv1d", mutates_args=())
def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source: Tensor | None,
    readers: Tensor | None,
    cu_seqlens: Tensor | None,
    has_silu: bool,
) -> Tensor:
    b, l = x.shape[0], x.shape[1] if source is None else source.shape[0]
    rows, d = _rows(x), x.shape[2]
    out = torch.empty((b, l, d), dtype=x.dtype, device=x.device)
    convolve[(triton.cdiv(b * l, BLOCK_TOKENS), triton.cdiv(d, BLOCK_CHANNELS))](
        rows, weight.contiguous(), bias, source, _reach(_bounds(cu_seqlens, b, l), x.device), out,
        b * l, d, rows.stride(0), TAPS=weight.shape[1], HAS_SOURCE=source is not None, HAS_BIAS=bias is not None,
        SILU=has_silu, BLOCK_T=BLOCK_TOKENS, BLOCK_D=BLOCK_CHANNELS,
    )  # fmt: skip
    return out


@_convolve.register_fake
def _(x, weight, bias, source, readers, cu_seqlens, has_silu):  # type: ignore[no-untyped-def]
    l = x.shape[1] if source is None else source.shape[0]
    return torch.empty((x.shape[0], l, x.shape[2]), dtype=x.dtype, device=x.device)


@torch.library.custom_op("m4v_dist::causal_conv1d_backward", mutates_args=())
def _convolve_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source: Tensor | None,
    readers: Tensor | None,
    cu_seqlens: Tensor | None,
    has_silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, the last whether it is there or not."""
    b, l = x.shape[0], x.shape[1] if source is None else source.shape[0]
    rows, d, taps = _rows(x), x.shape[2], weight.shape[1]
    weight = weight.contiguous()
    reach = _reach(_bounds(cu_seqlens, b, l), x.device)
    programs = triton.cdiv(b * l, BLOCK_TOKENS * TILES_OF_PROGRAM)
    dbefore = torch.empty((b * l, d), dtype=torch.float32, device=x.device)
    parts = torch.empty((programs, taps + 1, d), dtype=torch.float32, device=x.device)
    channel_tiles = triton.cdiv(d, BLOCK_CHANNELS)
    convolve_gradients[(programs, channel_tiles)](
        rows, weight, bias, source, reach, dout.contiguous(), dbefore, parts, b * l, d, rows.stride(0),
        TAPS=taps, HAS_SOURCE=source is not None, HAS_BIAS=bias is not None, SILU=has_silu, TILES=TILES_OF_PROGRAM,
        BLOCK_T=BLOCK_TOKENS, BLOCK_D=BLOCK_CHANNELS,
    )  # fmt: skip
    if readers is None:
        readers = _each_itself(rows.shape[0], x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    collect_gradients[(triton.cdiv(rows.shape[0], BLOCK_TOKENS), channel_tiles)](
        dbefore, weight, reach, readers, dx, rows.shape[0], b * l, d,
        TAPS=taps, READERS=readers.shape[1], BLOCK_T=BLOCK_TOKENS, BLOCK_D=BLOCK_CHANNELS,
    )  # fmt: skip
    summed = parts.sum(0)
    return dx, summed[:taps].t().to(weight.dtype, copy=True), summed[taps].clone()


@_convolve_backward.register_fake
def _(dout, x, weight, bias, source, readers, cu_seqlens, has_silu):  # type: ignore[no-untyped-def]
    of_bias = x.new_empty(x.shape[2], dtype=torch.float32)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(weight), of_bias


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.has_silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.m4v_dist.causal_conv1d_backward(dout, *tensors, ctx.has_silu)
    return dx, dweight, None if tensors[2] is None else dbias.to(tensors[2].dtype), None, None, None, None


torch.library.register_autograd("m4v_dist::causal_conv1d", _gradients, setup_context=_save_inputs)
