"""Convolution and scan of a packed sequence whose segments may lie on several ranks.

Without a handover these are the kernels themselves. With one, the convolution reads the tail of the rank before, and
the scan runs in parallel on all ranks: each from zero states, then the states that the ranks hand on
(`parallel.sequence.hand_state`), then what the entering state gives to this rank's first segment
(`kernels.entering_state`). The slow twin in the tests gives each rank all tokens of some heads instead.

Volume of one block, forward, for each cut that goes through a segment (conv_width w, e inner width):
    mamba2, mil   (w - 1) (e + 2 g n) + (h + h p n)     mamba1   (w - 1) e + 2 e n
numbers from one rank to the next; backward sends the same the other way. A segment on three ranks or more sends its
states to each of the later ones.

Legend: `b` 1, `l` tokens of this rank, `h` heads, `p` head width, `g` groups, `n` state size, `d` channels, `t` tokens
of the tail.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from m4v_dist.kernels.backend import Backend
from m4v_dist.kernels.conv1d import causal_conv1d
from m4v_dist.kernels.entering_state import channel_response, head_response
from m4v_dist.kernels.scan import ssd_scan
from m4v_dist.kernels.selective_scan import selective_scan
from m4v_dist.parallel.sequence import Handover, hand_state, hand_tail, tie


def cut_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    cu_seqlens: Tensor | None,
    handover: Handover | None,
    has_silu: bool = False,
    backend: Backend = "reference_chunked",
) -> Tensor:
    """`conv1d.causal_conv1d`, reading over the cut in front of this rank's first segment."""
    options: dict[str, Any] = {"has_silu": has_silu, "backend": backend}
    if handover is None or not handover.is_cut:
        return x if x.shape[1] == 0 else causal_conv1d(x, weight, bias, cu_seqlens=cu_seqlens, **options)
    tail = hand_tail(x[0], weight.shape[1] - 1, handover)
    joined = torch.cat([tail[None], x], dim=1)  # 1 t+l d
    if x.shape[1] == 0:
        return joined
    assert cu_seqlens is not None, "a sequence that is cut is packed"
    num_tail = tail.shape[0]
    starts = F.pad(cu_seqlens[1:] + num_tail, (1, 0))
    return causal_conv1d(joined, weight, bias, cu_seqlens=starts, **options)[:, num_tail:]


def cut_ssd_scan(
    x: Tensor,  # 1 l h p
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    dt_bias: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    handover: Handover | None,
    chunk_size: int,
    backend: Backend,
) -> Tensor:
    """y of `scan.ssd_scan` with softplus on dt, under the states that enter from earlier ranks."""
    if x.shape[1] == 0:
        y, final = x, x.sum() + torch.zeros(1, A.shape[0], x.shape[3], B.shape[3], device=x.device)
    else:
        y, final = ssd_scan(
            x,
            dt,
            A,
            B,
            C,
            D,
            dt_bias=dt_bias,
            dt_softplus=True,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            chunk_size=chunk_size,
            backend=backend,
        )
    if handover is None or not handover.is_cut:
        return y
    steps = _step_sizes(dt[0], dt_bias, final.dtype)  # l h
    total = steps[steps.shape[0] - handover.num_left :].sum(dim=0) * A  # h

    def response(entering: Tensor, count: int) -> Tensor:
        return head_response(steps[:count], A, C[0, :count], entering)

    return _with_entering_state(y, final, total[:, None, None], handover, response)


def cut_selective_scan(
    u: Tensor,  # 1 l d
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    z: Tensor | None,
    dt_bias: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    handover: Handover | None,
    chunk_size: int,
    backend: Backend,
) -> Tensor:
    """y of `selective_scan.selective_scan` with softplus on dt, under the states that enter from earlier ranks."""
    if u.shape[1] == 0:
        y, final = u, u.sum() + torch.zeros(1, *A.shape, device=u.device)
    else:
        y, final = selective_scan(
            u,
            dt,
            A,
            B,
            C,
            D,
            z=z,
            dt_bias=dt_bias,
            dt_softplus=True,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            chunk_size=chunk_size,
            backend=backend,
        )
    if handover is None or not handover.is_cut:
        return y
    steps = _step_sizes(dt[0], dt_bias, final.dtype)  # l d
    total = steps[steps.shape[0] - handover.num_left :].sum(dim=0)[:, None] * A  # d n

    def response(entering: Tensor, count: int) -> Tensor:
        given = channel_response(steps[:count], A, C[0, :count], entering, chunk_size=chunk_size)
        return given if z is None else given * F.silu(z[0, :count].to(given.dtype))

    return _with_entering_state(y, final, total, handover, response)


def _step_sizes(dt: Tensor, dt_bias: Tensor, dtype: torch.dtype) -> Tensor:
    return F.softplus(dt.to(dtype) + dt_bias.to(dtype))


def _with_entering_state(
    y: Tensor,  # 1 l ..., scanned from zero states
    final: Tensor,  # state after each of this rank's segments
    log_decay: Tensor,  # of this rank's last segment
    handover: Handover,
    response: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Hand the last segment's state on, and add what the state that enters gives to this rank's first segment.

    Args:
        response: of the entering state and the number of tokens; `count ...`.
    """
    entering = hand_state(log_decay, final[-1], handover)
    if not handover.is_entered:
        return tie(y, entering)
    count = handover.num_entered
    given = response(entering, count)
    first = (y[0, :count].to(given.dtype) + given).to(y.dtype)
    return torch.cat([first, y[0, count:]])[None]
