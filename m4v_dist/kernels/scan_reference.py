"""The scan in plain torch: the token loop that defines it, and the chunked form that runs on any device.

Both compute in float64 for float64 inputs, else in float32, and switch autocast off inside: a decay or a state rounded
to bfloat16 is wrong after a few hundred tokens.

Source: Mamba-2 (Dao & Gu 2024), listing 1, for the chunked form; segments, gate and initial state are ours.

Legend: `b` batch, `l` tokens, `h` heads, `p` head width, `g` groups, `r` heads of a group, `n` state size,
`c` chunks, `q` `k` query and key token in a chunk, `i` `j` chunk borders, `s` segments.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def ssd_scan_loop(
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
) -> tuple[Tensor, Tensor]:
    """Scan one token after the other: the definition. Arguments and results as `scan.ssd_scan`."""
    dtype = _compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        b, l, h, p = x.shape
        xs, dts = x.to(dtype), _step_sizes(dt, dt_bias, dt_softplus, dtype)
        heads_per_group = h // B.shape[2]
        Bs = B.to(dtype).repeat_interleave(heads_per_group, dim=2)  # b l h n
        Cs = C.to(dtype).repeat_interleave(heads_per_group, dim=2)  # b l h n
        decay = torch.exp(dts * A.to(dtype))  # b l h
        starts = [0] if cu_seqlens is None else cu_seqlens.tolist()[:-1]
        ends = [l] if cu_seqlens is None else cu_seqlens.tolist()[1:]
        outputs: list[Tensor] = []
        finals: list[Tensor] = []
        for segment, (start, end) in enumerate(zip(starts, ends, strict=True)):
            state = _start_state(initial_state, segment if cu_seqlens is not None else None, xs, B.shape[3])
            for t in range(start, end):
                update = torch.einsum("bh,bhp,bhn->bhpn", dts[:, t], xs[:, t], Bs[:, t])
                state = decay[:, t, :, None, None] * state + update
                outputs.append(torch.einsum("bhpn,bhn->bhp", state, Cs[:, t]))
            finals.append(state)
        y = _skip_and_gate(torch.stack(outputs, dim=1), xs, D, z)  # b l h p
        return y.to(x.dtype), torch.cat(finals)


def ssd_scan_chunked(
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
    """Scan by chunks: matrix products inside a chunk, one small product between chunks. As `scan.ssd_scan`.

    Segments are scanned one after the other, each in chunks of its own. So what a segment gives and gets is the same
    bits whatever lies beside it, NaN and infinity included: a mask would multiply them by zero, and zero times NaN is
    NaN. All exponents are differences of float64 sums, and never positive.
    """
    dtype = _compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        xs, dts = x.to(dtype), _step_sizes(dt, dt_bias, dt_softplus, dtype)
        Bs, Cs, As = B.to(dtype), C.to(dtype), A.to(dtype)
        bounds = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
        outputs: list[Tensor] = []
        finals: list[Tensor] = []
        for segment, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            state = _start_state(initial_state, None if cu_seqlens is None else segment, xs, B.shape[3])
            part = slice(start, end)
            y, final = _scan_segment(
                xs[:, part], dts[:, part], As, Bs[:, part], Cs[:, part], state, min(chunk_size, end - start)
            )
            outputs.append(y)
            finals.append(final)
        y = _skip_and_gate(torch.cat(outputs, dim=1), xs, D, z)
        return y.to(x.dtype), torch.cat(finals)


def _scan_segment(
    x: Tensor,  # b l h p
    dt: Tensor,  # b l h
    A: Tensor,  # h
    B: Tensor,  # b l g n
    C: Tensor,  # b l g n
    state: Tensor,  # b h p n, in front of the first token
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """One segment: y, b l h p, without skip and gate, and the state after its last token, b h p n."""
    l, groups = x.shape[1], B.shape[2]
    # Padding has dt = 0: it neither decays nor feeds a state, so the final state stands.
    pad = -l % chunk_size
    x = rearrange(_chunk(x * dt[..., None], chunk_size, pad), "b c q (g r) p -> b c g r q p", g=groups)
    B = rearrange(_chunk(B, chunk_size, pad), "b c q g n -> b c g q n")
    C = rearrange(_chunk(C, chunk_size, pad), "b c q g n -> b c g q n")
    decay_sums = _chunk(dt * A, chunk_size, pad).double().cumsum(2)  # b c q h
    sums = rearrange(decay_sums.to(x.dtype), "b c q (g r) -> b c g r q", g=groups)
    # What the tokens of a chunk give one another. Masked before exp: above the diagonal it would overflow.
    causal = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).tril()
    decay = (sums[..., :, None] - sums[..., None, :]).masked_fill(~causal, float("-inf")).exp()  # b c g r q k
    scores = C @ B.transpose(-1, -2)  # b c g q k
    y = (decay * scores[:, :, :, None]) @ x  # b c g r q p
    # What each chunk adds to the state, and the state in front of each chunk and after the last.
    added = (x * (sums[..., -1:] - sums).exp()[..., None]).transpose(-1, -2) @ B[:, :, :, None]  # b c g r p n
    sources = torch.cat([state[:, None], rearrange(added, "b c g r p n -> b c (g r) p n")], dim=1)  # b c+1 h p n
    until = F.pad(decay_sums[:, :, -1].cumsum(1), (0, 0, 1, 0))  # b c+1 h, float64
    count = until.shape[1]
    earlier = torch.ones(count, count, dtype=torch.bool, device=x.device).tril()[:, :, None]
    weight = (until[:, :, None] - until[:, None, :]).masked_fill(~earlier, float("-inf")).exp()  # b i j h
    states = torch.einsum("bijh,bjhpn->bihpn", weight.to(x.dtype), sources)
    entering = rearrange(states[:, :-1], "b c (g r) p n -> b c g r p n", g=groups)
    y = y + (C[:, :, :, None] @ entering.transpose(-1, -2)) * sums.exp()[..., None]
    return rearrange(y, "b c g r q p -> b (c q) (g r) p")[:, :l], states[:, -1]


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _step_sizes(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dtype: torch.dtype) -> Tensor:
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    return F.softplus(dt) if dt_softplus else dt


def _start_state(initial_state: Tensor | None, segment: int | None, x: Tensor, state_dim: int) -> Tensor:
    b, _, h, p = x.shape
    if initial_state is None:
        return x.new_zeros(b, h, p, state_dim)
    return (initial_state if segment is None else initial_state[segment : segment + 1]).to(x.dtype)


def _skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + D.to(y.dtype)[:, None] * x
    return y if z is None else y * F.silu(z.to(y.dtype))


def _chunk(tensor: Tensor, chunk_size: int, pad: int) -> Tensor:
    """Pad `l` with zeros and cut it: b l ... to b c q ..."""
    padded = F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, pad))
    return padded.unflatten(1, (-1, chunk_size))
