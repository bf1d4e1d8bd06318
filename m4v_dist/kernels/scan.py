"""The one door of the state-space scan: shape checks, the backend table, and no silent fallback.

What is computed, per batch row and head (state layout p n, head k reads group k // (h / g)):

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t (outer) B_t        y_t = h_t C_t + D x_t        y_t <- y_t silu(z_t) if z

The definition is `scan_reference.ssd_scan_loop`; every backend is held to it, output and all gradients.

Source: Mamba-2 (Dao & Gu 2024), section 6; state-spaces/mamba at e9594ce for the argument list.

Legend: `b` batch, `l` tokens, `h` heads, `p` head width, `g` groups, `n` state size, `s` segments.
"""

import torch
from torch import Tensor

from m4v_dist.kernels.backend import Backend, require_backend
from m4v_dist.kernels.segments import check_cu_seqlens


@torch.compiler.disable
def ssd_scan(
    x: Tensor,  # b l h p, float
    dt: Tensor,  # b l h
    A: Tensor,  # h, negative
    B: Tensor,  # b l g n
    C: Tensor,  # b l g n
    D: Tensor | None,  # h
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """Scan along `l` with the named backend; differentiable in every float argument.

    Args:
        x: b l h p.
        dt: b l h, step sizes; `softplus(dt + dt_bias)` is applied first where asked for. Used in float32.
        A: h, negative decay rates.
        B: b l g n, with h a multiple of g.
        C: b l g n.
        D: h, weight of the skip; None leaves it out.
        z: b l h p, gate: y * silu(z).
        dt_bias: h, added to dt.
        dt_softplus: whether softplus is applied to dt.
        cu_seqlens: s + 1, int32, rising from 0 to l: where segments start. The state restarts at each; b must be 1.
            Best on the host, where its values are checked and read at once: of one on a GPU plain torch waits for them.
        initial_state: b h p n, or s h p n with `cu_seqlens`; None is zero.
        chunk_size: tokens of one chunk; the loop ignores it.
        backend: which implementation runs.

    Returns:
        y: b l h p, dtype of x; final_state: b h p n (s h p n with `cu_seqlens`), float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit one another.
        BackendUnavailable: the backend cannot run here.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, cu_seqlens, initial_state, chunk_size)
    require_backend(backend)
    from m4v_dist.kernels.scan_reference import ssd_scan_chunked, ssd_scan_loop

    if backend == "reference":
        return ssd_scan_loop(
            x, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, cu_seqlens=cu_seqlens,
            initial_state=initial_state,
        )  # fmt: skip
    if backend == "reference_chunked":
        return ssd_scan_chunked(
            x, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, cu_seqlens=cu_seqlens,
            initial_state=initial_state, chunk_size=chunk_size,
        )  # fmt: skip
    if backend == "triton":
        from m4v_dist.kernels.scan_triton import ssd_scan_triton

        return ssd_scan_triton(
            x, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, cu_seqlens=cu_seqlens,
            initial_state=initial_state, chunk_size=chunk_size,
        )  # fmt: skip
    from m4v_dist.kernels.scan_mamba_ssm import ssd_scan_mamba_ssm

    return ssd_scan_mamba_ssm(
        x, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, cu_seqlens=cu_seqlens,
        initial_state=initial_state, chunk_size=chunk_size,
    )  # fmt: skip


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
) -> None:
    if x.ndim != 4:
        raise ValueError(f"ssd_scan: x must be b l h p, but has shape {tuple(x.shape)}.")
    b, l, h, p = x.shape
    if l == 0:
        raise ValueError(f"ssd_scan: x has no tokens (shape {tuple(x.shape)}); leave out empty sequences.")
    if chunk_size < 1:
        raise ValueError(f"ssd_scan: chunk_size={chunk_size} must be at least 1.")
    if B.ndim != 4 or B.shape[:2] != (b, l) or B.shape[2] == 0 or h % B.shape[2]:
        raise ValueError(
            f"ssd_scan: B must be b l g n = {b} {l} g n with {h} heads a multiple of g, but has shape {tuple(B.shape)}."
        )
    segments = b if cu_seqlens is None else cu_seqlens.numel() - 1
    expected: list[tuple[str, str, Tensor | None, tuple[int, ...]]] = [
        ("dt", "b l h", dt, (b, l, h)),
        ("A", "h", A, (h,)),
        ("C", "b l g n", C, tuple(B.shape)),
        ("D", "h", D, (h,)),
        ("z", "b l h p", z, (b, l, h, p)),
        ("dt_bias", "h", dt_bias, (h,)),
        ("initial_state", "segments h p n", initial_state, (segments, h, p, B.shape[3])),
    ]
    for name, axes, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"ssd_scan: {name} must be {axes} = {shape} to fit x {tuple(x.shape)} and B {tuple(B.shape)}, "
                f"but has shape {tuple(tensor.shape)}."
            )
    if cu_seqlens is not None:
        check_cu_seqlens("ssd_scan", cu_seqlens, b, l)
