"""The scan on a GPU: our Triton kernels as a custom op, so that torch.compile and recompute see one opaque call.

Forward is three launches (`scan_triton_forward`), backward these but the last again and five more
(`scan_triton_backward`): the states in front of the chunks are made anew in backward, for they are the largest thing
that could be kept. Where several heads share a group, the gradients of B and C are summed over heads inside a program,
and over the few parts that a group is cut into by torch: no atomics, equal inputs give equal bits.

The same code runs on the CPU under Triton's interpreter (TRITON_INTERPRET=1 before the first import): so it is tested
without a GPU.

Legend: `b` batch, `l` tokens (in the kernels of all batch rows), `h` heads, `p` head width, `g` groups, `n` state size,
`c` chunks, `s` segments, `a` parts of a group.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from m4v_dist.kernels.backend import BackendUnavailable
from m4v_dist.kernels.chunk_table import ChunkTable, chunk_table
from m4v_dist.kernels.scan_triton_backward import (
    chunk_adjoints,
    decay_gradients,
    key_gradients,
    pass_adjoints,
    query_gradients,
)
from m4v_dist.kernels.scan_triton_forward import chunk_outputs, chunk_states, pass_states

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK_SIZES = (16, 32, 64, 128, 256)
MAX_HEAD_DIM, MAX_STATE_DIM = 128, 256
IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
_MIN_PROGRAMS = 512
"""Programs of a launch below which a group of heads is cut into more parts: about four for each multiprocessor."""


@dataclass(frozen=True)
class Blocks:
    """Tiles of the kernels for one size of problem.

    Args:
        queries, keys: tokens of a tile, in the kernels that meet tokens with tokens.
        tokens: tokens that the kernels of one state take at a time.
        state: numbers of a state that one program carries through the chunks.
        warps: of a program that meets tokens with tokens.
        stages: of their software pipeline.
    """

    queries: int
    keys: int
    tokens: int
    state: int
    warps: int
    stages: int


def blocks_for(chunk_size: int, head_dim: int, state_dim: int, dtype: torch.dtype) -> Blocks:
    """Tiles for a size of problem; float32 operands take twice the shared memory, so half the tokens."""
    is_wide = dtype == torch.float32 or state_dim > 128 or head_dim > 64
    tokens = min(chunk_size, 32 if is_wide else 64)
    return Blocks(queries=tokens, keys=tokens, tokens=tokens, state=1024, warps=4, stages=2)


def ssd_scan_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Scan by our kernels. Arguments and results as `scan.ssd_scan`, whose checks come first.

    Raises:
        ValueError: a dtype or size that the kernels do not take.
        BackendUnavailable: x is on no GPU, and the interpreter is off.
    """
    _require_size(x, B, chunk_size)
    if x.device.type != "cuda" and not IS_INTERPRETED:
        raise BackendUnavailable(
            f'kernels.backend="triton" was asked for, but the tensors are on {x.device}: Triton compiles for GPUs. Set '
            'launch.use_gpu=true, or kernels.backend="reference_chunked" (plain torch, CPU and GPU).'
        )
    y, final = torch.ops.m4v_dist.ssd_scan(
        x, dt, A, B.to(x.dtype), C.to(x.dtype), D, dt_bias, initial_state, cu_seqlens, dt_softplus, chunk_size
    )
    if z is not None:
        y = (y.float() * F.silu(z.float())).to(x.dtype)
    return y, final


def _require_size(x: Tensor, B: Tensor, chunk_size: int) -> None:
    p, n = x.shape[3], B.shape[3]
    if x.dtype not in DTYPES:
        raise ValueError(
            f"ssd_scan: backend triton takes float32, bfloat16 or float16, but x is {x.dtype}; "
            'cast it, or use backend="reference_chunked".'
        )
    if chunk_size not in CHUNK_SIZES or p > MAX_HEAD_DIM or n > MAX_STATE_DIM:
        raise ValueError(
            f"ssd_scan: backend triton takes chunk_size in {CHUNK_SIZES}, head width up to {MAX_HEAD_DIM} and state "
            f"size up to {MAX_STATE_DIM}, but they are {chunk_size}, {p} and {n}; change model.ssm, or use "
            'backend="reference_chunked".'
        )


@dataclass(frozen=True)
class _Problem:
    """Sizes, strides and tiles that all launches of one call share; tensors seen as one packed sequence."""

    x: Tensor  # l h p
    dt: Tensor  # l h
    B: Tensor  # l g n
    C: Tensor  # l g n
    table: ChunkTable
    blocks: Blocks

    @classmethod
    def of(cls, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> "_Problem":
        b, l = x.shape[:2]
        bounds = tuple(range(0, b * l + 1, l)) if cu_seqlens is None else tuple(cu_seqlens.tolist())
        return cls(
            _packed(x), _packed(dt), _packed(B), _packed(C), chunk_table(bounds, chunk_size, x.device),
            blocks_for(chunk_size, x.shape[3], B.shape[3], x.dtype),
        )  # fmt: skip

    @property
    def num_tokens(self) -> int:
        return self.x.shape[0]

    @property
    def num_heads(self) -> int:
        return self.x.shape[1]

    @property
    def num_groups(self) -> int:
        return self.B.shape[1]

    @property
    def heads_of_group(self) -> int:
        return self.num_heads // self.num_groups

    @property
    def state_size(self) -> int:
        return self.x.shape[2] * self.B.shape[2]

    @property
    def state_tiles(self) -> int:
        return triton.cdiv(self.state_size, self.blocks.state)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of heads and states as the kernels take them: as they are, and padded to what a product wants."""
        p, n = self.x.shape[2], self.B.shape[2]
        padded = [max(16, triton.next_power_of_2(size)) for size in (p, n)]
        return {"P": p, "N": n, "BLOCK_P": padded[0], "BLOCK_N": padded[1], "HEADS_OF_GROUP": self.heads_of_group}

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.blocks.warps, "num_stages": self.blocks.stages}

    def parts_of_group(self, num_tiles: int) -> int:
        """Into how many parts the heads of a group are cut, so that there are enough programs."""
        divisors = [parts for parts in range(1, self.heads_of_group + 1) if self.heads_of_group % parts == 0]
        enough = [parts for parts in divisors if num_tiles * self.num_groups * parts >= _MIN_PROGRAMS]
        return enough[0] if enough else divisors[-1]

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)


def _packed(tensor: Tensor) -> Tensor:
    """b l ... as l ..., with all but the first axis side by side in memory; a copy only where that is not so."""
    inner = tensor.shape[2:].numel()
    merged = tensor.flatten(0, 1)
    is_dense = merged[0].is_contiguous() if inner > 1 else True
    return merged if is_dense else merged.contiguous()


@dataclass(frozen=True)
class _States:
    """What the first two launches leave: float32."""

    steps: Tensor  # h l, step sizes
    sums: Tensor  # h l, of log decays since the chunk's start
    sums_low: Tensor  # h l, what rounding the sums to float32 lost
    totals: Tensor  # c h, sums of whole chunks
    entering: Tensor  # c h p n
    final: Tensor  # s h p n


def _make_states(
    problem: _Problem, A: Tensor, dt_bias: Tensor | None, initial_state: Tensor | None, dt_softplus: bool
) -> _States:
    h, l, c = problem.num_heads, problem.num_tokens, problem.table.num_chunks
    p, n = problem.x.shape[2], problem.B.shape[2]
    states = _States(
        problem.empty(h, l), problem.empty(h, l), problem.empty(h, l), problem.empty(c, h), problem.empty(c, h, p, n),
        problem.empty(problem.table.num_segments, h, p, n),
    )  # fmt: skip
    chunk_states[(c, h)](
        problem.x, problem.dt, A, dt_bias, problem.B, problem.table.chunks,
        states.steps, states.sums, states.sums_low, states.totals, states.entering,
        problem.x.stride(0), problem.dt.stride(0), problem.B.stride(0), l, h,
        BLOCK_K=problem.blocks.tokens, HAS_BIAS=dt_bias is not None, SOFTPLUS=dt_softplus,
        **problem.sizes, **problem.launch,
    )  # fmt: skip
    pass_states[(problem.state_tiles, h, problem.table.num_segments)](
        states.entering, states.totals, problem.table.first_chunks, initial_state, states.final, h,
        SIZE=problem.state_size, BLOCK=problem.blocks.state, HAS_INITIAL=initial_state is not None,
    )  # fmt: skip
    return states


@torch.library.custom_op("m4v_dist::ssd_scan", mutates_args=())
def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    problem = _Problem.of(x, dt, B, C, cu_seqlens, chunk_size)
    initial_state = None if initial_state is None else initial_state.contiguous()
    states = _make_states(problem, A, dt_bias, initial_state, dt_softplus)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(chunk_size, problem.blocks.queries)
    chunk_outputs[(problem.table.num_chunks * tiles, problem.num_heads)](
        problem.x, problem.B, problem.C, D, states.steps, states.sums, states.sums_low, states.entering,
        problem.table.chunks, y,
        problem.x.stride(0), problem.B.stride(0), problem.C.stride(0), problem.num_tokens, problem.num_heads, tiles,
        BLOCK_Q=problem.blocks.queries, BLOCK_K=problem.blocks.keys, HAS_D=D is not None,
        **problem.sizes, **problem.launch,
    )  # fmt: skip
    return y, states.final


@_scan.register_fake
def _(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, dt_softplus, chunk_size):  # type: ignore[no-untyped-def]
    segments = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = x.new_empty((segments, x.shape[2], x.shape[3], B.shape[3]), dtype=torch.float32)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), state


@torch.library.custom_op("m4v_dist::ssd_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, dt_bias and the initial state, the last three whether they are there or not."""
    problem = _Problem.of(x, dt, B, C, cu_seqlens, chunk_size)
    initial_state = None if initial_state is None else initial_state.contiguous()
    states = _make_states(problem, A, dt_bias, initial_state, dt_softplus)
    dy = dy.contiguous()
    adjoints, dinitial, across = _make_adjoints(problem, states, dy, dfinal.contiguous())
    dx, dB, dC, decays, dD = _token_gradients(problem, states, adjoints, D, dy)
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
    c, h = problem.table.num_chunks, problem.num_heads
    sums = problem.empty(2, c, h)
    decay_gradients[(c, h)](
        problem.dt, A, dt_bias, states.steps, problem.table.chunks, *decays, across, ddt, sums,
        problem.dt.stride(0), problem.num_tokens, h, c,
        TILES=problem.state_tiles, CHUNK=chunk_size, HAS_BIAS=dt_bias is not None, SOFTPLUS=dt_softplus,
    )  # fmt: skip
    dA, dbias = sums.sum(1)
    return (
        dx.view(x.shape), ddt, dA.to(A.dtype), dB.view(B.shape), dC.view(C.shape), dD,
        dbias.clone(), dinitial,
    )  # fmt: skip


def _make_adjoints(problem: _Problem, states: _States, dy: Tensor, dfinal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the chunks' leaving states, c h p n, and of the initial state, s h p n; and `across`, tiles c h."""
    h, c = problem.num_heads, problem.table.num_chunks
    adjoints, dinitial = torch.empty_like(states.entering), torch.empty_like(states.final)
    across = problem.empty(problem.state_tiles, c, h)
    chunk_adjoints[(c, h)](
        dy, problem.C, states.sums, states.sums_low, problem.table.chunks, adjoints,
        problem.C.stride(0), problem.num_tokens, h, BLOCK_K=problem.blocks.tokens, **problem.sizes, **problem.launch,
    )  # fmt: skip
    pass_adjoints[(problem.state_tiles, h, problem.table.num_segments)](
        adjoints, states.entering, states.totals, problem.table.first_chunks, dfinal, dinitial, across, c, h,
        SIZE=problem.state_size, BLOCK=problem.blocks.state,
    )  # fmt: skip
    return adjoints, dinitial, across


def _token_gradients(
    problem: _Problem, states: _States, adjoints: Tensor, D: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Gradients of x, B and C, what `decay_gradients` sums up, and the gradient of D."""
    h, l, g, c = problem.num_heads, problem.num_tokens, problem.num_groups, problem.table.num_chunks
    tiles = triton.cdiv(problem.table.chunk_size, problem.blocks.queries)
    parts = problem.parts_of_group(c * tiles)
    # One part is the gradient itself; several are added up, so they stay float32 until then.
    dtype = problem.B.dtype if parts == 1 else torch.float32
    dB, dC = (problem.empty(parts, *problem.B.shape, dtype=dtype) for _ in range(2))
    dx = problem.empty(*problem.x.shape, dtype=problem.x.dtype)
    query_sums, key_sums, leaving_sums, step_sums = (problem.empty(h, l) for _ in range(4))
    skip_sums = torch.zeros(c * tiles if D is not None else 0, h, device=dy.device)
    shared: dict[str, Any] = {
        "HEADS": problem.heads_of_group // parts, "BLOCK_Q": problem.blocks.queries, "BLOCK_K": problem.blocks.keys,
        **problem.sizes, **problem.launch,
    }  # fmt: skip
    strides = (problem.x.stride(0), problem.B.stride(0), problem.C.stride(0))
    grid = (c * tiles, g * parts)
    query_gradients[grid](
        problem.x, problem.B, problem.C, dy, states.steps, states.sums, states.sums_low, states.entering,
        problem.table.chunks, dC, query_sums, *strides, l, h, g, tiles, parts, **shared,
    )  # fmt: skip
    key_gradients[grid](
        problem.x, problem.B, problem.C, D, dy, states.steps, states.sums, states.sums_low, adjoints,
        problem.table.chunks, dx, dB, key_sums, leaving_sums, step_sums, skip_sums, *strides, l, h, g, tiles, parts,
        HAS_D=D is not None, **shared,
    )  # fmt: skip
    summed = [part[0] if parts == 1 else part.sum(0).to(problem.B.dtype) for part in (dB, dC)]
    return dx, summed[0], summed[1], (query_sums, key_sums, leaving_sums, step_sums), skip_sums.sum(0)


@_scan_backward.register_fake
def _(dy, dfinal, x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, dt_softplus, chunk_size):  # type: ignore[no-untyped-def]
    like = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, A, B, C)]
    of_heads = [x.new_empty(x.shape[2], dtype=torch.float32) for _ in range(2)]
    return (*like, *of_heads, torch.empty_like(dfinal, memory_format=torch.contiguous_format))


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dt_softplus, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    *of_tokens, dD, dbias, dinitial = torch.ops.m4v_dist.ssd_scan_backward(
        dy, dfinal, *tensors, ctx.dt_softplus, ctx.chunk_size
    )
    D, dt_bias, initial = tensors[5:8]
    optional = [
        None if leaf is None else gradient.to(leaf.dtype)
        for leaf, gradient in ((D, dD), (dt_bias, dbias), (initial, dinitial))
    ]
    return (*of_tokens, *optional, None, None, None)


torch.library.register_autograd("m4v_dist::ssd_scan", _gradients, setup_context=_save_inputs)
