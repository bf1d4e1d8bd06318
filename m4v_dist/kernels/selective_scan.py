"""The door of Mamba-1's selective scan: shape checks, which backends have it, and no silent fallback.

What is computed, per batch row and channel (state n, each with a decay of its own):

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t        y_t = h_t . C_t + D u_t        y_t <- y_t silu(z_t) if z

The definition is `selective_scan_reference.selective_scan_loop`; the chunked form is held to it, output and all
gradients. `scan.ssd_scan` is the other scan, with one decay per head.

Source: Mamba (Gu & Dao 2023), section 3; state-spaces/mamba ops/selective_scan_interface.py at e9594ce for the
arguments.

Legend: `b` batch, `l` tokens, `d` channels, `n` state size, `s` segments.
"""

import torch
from torch import Tensor

from m4v_dist.kernels.backend import Backend, BackendUnavailable, require_backend
from m4v_dist.kernels.segments import check_cu_seqlens


def require_selective_backend(backend: str) -> None:
    """Check that `backend` has a selective scan that can run here, before the first step.

    Raises:
        BackendUnavailable: unknown name, or a backend without this scan.
    """
    require_backend(backend)
    if backend not in ("reference", "reference_chunked"):
        raise BackendUnavailable(
            f'kernels.backend="{backend}" has no selective scan, which model.ssm.variant="mamba1" needs. Set '
            'kernels.backend="reference_chunked" (plain torch, CPU and GPU), or another variant.'
        )


@torch.compiler.disable
def selective_scan(
    u: Tensor,  # b l d, float
    dt: Tensor,  # b l d
    A: Tensor,  # d n, negative
    B: Tensor,  # b l n
    C: Tensor,  # b l n
    D: Tensor | None,  # d
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
        u: b l d.
        dt: b l d, step sizes; `softplus(dt + dt_bias)` is applied first where asked for. Used in float32.
        A: d n, negative decay rates.
        B: b l n.
        C: b l n.
        D: d, weight of the skip; None leaves it out.
        z: b l d, gate: y * silu(z).
        dt_bias: d, added to dt.
        dt_softplus: whether softplus is applied to dt.
        cu_seqlens: s + 1, int32, rising from 0 to l: where segments start. The state restarts at each; b must be 1.
            Best on the host, as for `scan.ssd_scan`.
        initial_state: b d n, or s d n with `cu_seqlens`; None is zero.
        chunk_size: tokens of one chunk, whose states are in memory at once (b chunk d n); the loop ignores it.
        backend: which implementation runs.

    Returns:
        y: b l d, dtype of u; final_state: b d n (s d n with `cu_seqlens`), float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit one another.
        BackendUnavailable: the backend cannot run here.
    """
    _check(u, dt, A, B, C, D, z, dt_bias, cu_seqlens, initial_state, chunk_size)
    require_selective_backend(backend)
    from m4v_dist.kernels.selective_scan_reference import selective_scan_chunked, selective_scan_loop

    if backend == "reference":
        return selective_scan_loop(
            u, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, cu_seqlens=cu_seqlens,
            initial_state=initial_state,
        )  # fmt: skip
    return selective_scan_chunked(
        u, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, cu_seqlens=cu_seqlens,
        initial_state=initial_state, chunk_size=chunk_size,
    )  # fmt: skip


def _check(
    u: Tensor,
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
    if u.ndim != 3 or u.shape[1] == 0:
        raise ValueError(f"selective_scan: u must be b l d with at least one token, but has shape {tuple(u.shape)}.")
    if chunk_size < 1:
        raise ValueError(f"selective_scan: chunk_size={chunk_size} must be at least 1.")
    b, l, d = u.shape
    if A.ndim != 2 or A.shape[0] != d:
        raise ValueError(f"selective_scan: A must be d n with d={d} channels of u, but has shape {tuple(A.shape)}.")
    n = A.shape[1]
    segments = b if cu_seqlens is None else cu_seqlens.numel() - 1
    expected: list[tuple[str, str, Tensor | None, tuple[int, ...]]] = [
        ("dt", "b l d", dt, (b, l, d)),
        ("B", "b l n", B, (b, l, n)),
        ("C", "b l n", C, (b, l, n)),
        ("D", "d", D, (d,)),
        ("z", "b l d", z, (b, l, d)),
        ("dt_bias", "d", dt_bias, (d,)),
        ("initial_state", "segments d n", initial_state, (segments, d, n)),
    ]
    for name, axes, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"selective_scan: {name} must be {axes} = {shape} to fit u {tuple(u.shape)} and A {tuple(A.shape)}, "
                f"but has shape {tuple(tensor.shape)}."
            )
    if cu_seqlens is not None:
        check_cu_seqlens("selective_scan", cu_seqlens, b, l)
