"""The selective scan in plain torch: the token loop that defines it, and a chunked form for any device.

Both compute in float64 for float64 inputs, else in float32, and switch autocast off inside.

Source: Mamba (Gu & Dao 2023), section 3. The chunked form is the doubling scan of Hillis and Steele (1986) over
pairs (decay, added state).

Legend: `b` batch, `l` tokens, `d` channels, `n` state size, `q` tokens of a chunk, `s` segments.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def selective_scan_loop(
    u: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """Scan one token after the other: the definition. Arguments and results as `selective_scan.selective_scan`."""
    dtype = _compute_dtype(u)
    with torch.autocast(u.device.type, enabled=False):
        us, As, Bs, Cs = (tensor.to(dtype) for tensor in (u, A, B, C))
        dts = _step_sizes(dt, dt_bias, dt_softplus, dtype)
        bounds = [0, u.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        states = _first_states(initial_state, us, As, len(bounds) - 1, is_packed=cu_seqlens is not None)
        outputs: list[Tensor] = []
        finals: list[Tensor] = []
        for state, start, end in zip(states, bounds, bounds[1:], strict=False):
            for t in range(start, end):
                added = dts[:, t, :, None] * us[:, t, :, None] * Bs[:, t, None]  # b d n
                state = torch.exp(dts[:, t, :, None] * As) * state + added
                outputs.append((state * Cs[:, t, None]).sum(dim=-1))
            finals.append(state)
        y = _skip_and_gate(torch.stack(outputs, dim=1), us, D, z)  # b l d
        return y.to(u.dtype), torch.cat(finals)


def selective_scan_chunked(
    u: Tensor,
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
    """Scan by chunks: log2(q) vector steps inside a chunk, one state handed on. As `selective_scan.selective_scan`.

    Segments are scanned one after the other, each in chunks of its own, so that nothing passes a border, not even NaN.
    Every factor is a decay, so at most 1: nothing overflows. The states of a chunk are not kept for backward but
    computed again.
    """
    dtype = _compute_dtype(u)
    with torch.autocast(u.device.type, enabled=False):
        us, As, Bs, Cs = (tensor.to(dtype) for tensor in (u, A, B, C))
        dts = _step_sizes(dt, dt_bias, dt_softplus, dtype)
        bounds = [0, u.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        states = _first_states(initial_state, us, As, len(bounds) - 1, is_packed=cu_seqlens is not None)
        outputs: list[Tensor] = []
        finals: list[Tensor] = []
        for state, start, end in zip(states, bounds, bounds[1:], strict=False):
            for at in range(start, end, chunk_size):
                part = slice(at, min(at + chunk_size, end))
                y, state = _run(_chunk, dts[:, part], us[:, part], As, Bs[:, part], Cs[:, part], state)
                outputs.append(y)
            finals.append(state)
        y = _skip_and_gate(torch.cat(outputs, dim=1), us, D, z)
        return y.to(u.dtype), torch.cat(finals)


def _run(function, *args):  # type: ignore[no-untyped-def]
    if torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)


def _chunk(
    dt: Tensor,  # b q d
    u: Tensor,  # b q d
    A: Tensor,  # d n
    B: Tensor,  # b q n
    C: Tensor,  # b q n
    entering: Tensor,  # b d n
) -> tuple[Tensor, Tensor]:
    """Outputs of one chunk, b q d; and the state after it, b d n."""
    length = u.shape[1]
    decay = torch.exp(dt[..., None] * A)  # b q d n
    state = (dt * u)[..., None] * B[:, :, None]  # b q d n
    reach = 1
    while reach < length:
        # Each token's pair spans `reach` tokens: join it with the pair that ends where it begins.
        joined = state[:, reach:] + decay[:, reach:] * state[:, :-reach]
        state = torch.cat([state[:, :reach], joined], dim=1)
        decay = torch.cat([decay[:, :reach], decay[:, reach:] * decay[:, :-reach]], dim=1)
        reach *= 2
    state = state + decay * entering[:, None]
    y = (state * C[:, :, None]).sum(dim=-1)
    # A copy: a view would keep the states of the whole chunk alive, which are computed again for just that reason.
    return y, state[:, -1].clone()


def _compute_dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _step_sizes(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dtype: torch.dtype) -> Tensor:
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    return F.softplus(dt) if dt_softplus else dt


def _first_states(
    initial_state: Tensor | None, u: Tensor, A: Tensor, num_segments: int, *, is_packed: bool
) -> list[Tensor]:
    """State in front of each segment: b d n (1 d n where packed)."""
    if initial_state is None:
        return [u.new_zeros(u.shape[0], *A.shape)] * num_segments
    return list(initial_state.to(u.dtype).split(1 if is_packed else u.shape[0]))


def _skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + D.to(y.dtype) * u
    return y if z is None else y * F.silu(z.to(y.dtype))
