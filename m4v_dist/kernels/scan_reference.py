"""The scan in plain torch: the token loop that defines it, and the chunked form that runs on any device.

Both compute in float64 for float64 inputs, else in float32, and switch autocast off inside: a decay or a state rounded
to bfloat16 is wrong after a few hundred tokens.

Source: Mamba-2 (Dao & Gu 2024), listing 1, for the chunked form; segments, gate and initial state are ours.

Legend: `b` batch, `l` tokens, `h` heads, `p` head width, `g` groups, `r` heads of a group, `n` state size,
`c` chunks, `q` `k` query and key token in a chunk, `s` segments.
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

    Segments need no loop: a pair of tokens, or of chunks, counts only if both lie in one segment. All exponents are
    differences of float64 sums that begin anew with each segment, so never positive, and no other segment has a part
    in their rounding: what a segment gives and gets is the same bits whatever lies beside it.
    """
    dtype = _compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        l = x.shape[1]
        chunk_size = min(chunk_size, l)
        dts = _step_sizes(dt, dt_bias, dt_softplus, dtype)
        xs = x.to(dtype)
        segment = _segment_of_token(cu_seqlens, l, x.device)
        # Padding repeats the last segment with dt = 0: it neither decays nor feeds a state, so the final state stands.
        pad = -l % chunk_size
        chunked = _Chunks(
            x=_chunk(xs * dts[..., None], chunk_size, pad),
            log_decay=_chunk(dts * A.to(dtype), chunk_size, pad),
            B=_chunk(B.to(dtype), chunk_size, pad),
            C=_chunk(C.to(dtype), chunk_size, pad),
            segment=F.pad(segment[None, None], (0, pad), mode="replicate")[0, 0].view(-1, chunk_size),
        )
        entering = chunked.entering_states(initial_state if cu_seqlens is None else None)  # b c+1 h p n
        y = chunked.within() + chunked.from_states(entering[:, :-1])  # b c q h p
        y = rearrange(y, "b c q h p -> b (c q) h p")[:, :l]
        if cu_seqlens is None:
            final_state = entering[:, -1]
        else:
            final_state = chunked.segment_end_states(entering, cu_seqlens)
            if initial_state is not None:
                total, tokens = _initial_share(chunked, initial_state.to(dtype), cu_seqlens, l)
                y, final_state = y + tokens, final_state + total
        y = _skip_and_gate(y, xs, D, z)
        return y.to(x.dtype), final_state


class _Chunks:
    """A sequence cut into chunks, with the sums of log decay inside each.

    Args:
        x: b c q h p, already times dt.
        log_decay: b c q h, dt A.
        B: b c q g n.
        C: b c q g n.
        segment: c q, int64.
    """

    def __init__(self, x: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, segment: Tensor) -> None:
        groups = B.shape[3]
        self.x = rearrange(x, "b c q (g r) p -> b c g r q p", g=groups)
        self.B = rearrange(B, "b c q g n -> b c g q n")
        self.C = rearrange(C, "b c q g n -> b c g q n")
        self.segment = segment
        self.log_decay = log_decay
        sums = _segment_sums(log_decay.double(), segment)  # b c q h
        self.sums = rearrange(sums.to(x.dtype), "b c q (g r) -> b c g r q", g=groups)
        self.totals = sums[:, :, -1]  # b c h, float64

    def within(self) -> Tensor:
        """What the tokens of a chunk give one another: b c q h p."""
        length = self.segment.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.x.device).tril()
        related = causal & (self.segment[:, :, None] == self.segment[:, None, :])  # c q k
        difference = self.sums[..., :, None] - self.sums[..., None, :]  # b c g r q k
        # Masked before exp: above the diagonal the difference is positive and would overflow.
        decay = difference.masked_fill(~related[None, :, None, None], float("-inf")).exp()
        scores = self.C @ self.B.transpose(-1, -2)  # b c g q k
        y = (decay * scores[:, :, :, None]) @ self.x  # b c g r q p
        return rearrange(y, "b c g r q p -> b c q (g r) p")

    def entering_states(self, initial_state: Tensor | None) -> Tensor:
        """State in front of each chunk and after the last one: b c+1 h p n."""
        last = self.segment[:, -1]  # c
        same = (self.segment == last[:, None])[None, :, None, None]  # 1 c 1 1 q
        to_end = (self.sums[..., -1:] - self.sums).masked_fill(~same, float("-inf")).exp()
        added = (self.x * to_end[..., None]).transpose(-1, -2) @ self.B[:, :, :, None]  # b c g r p n
        added = rearrange(added, "b c g r p n -> b c (g r) p n")
        if initial_state is None:
            first = torch.zeros_like(added[:, :1])
        else:
            first = initial_state[:, None].to(added.dtype)
        sources = torch.cat([first, added], dim=1)  # b c+1 h p n
        # Row i: state after i chunks; column j: source j, which sits at the end of chunk j - 1.
        owner = torch.cat([self.segment[:1, 0], last])  # c+1
        continues = (owner[1:] == owner[:-1])[:, None]  # c 1
        steps = F.pad(torch.where(continues, self.totals, 0), (0, 0, 1, 0))  # b c+1 h
        until = _segment_sums(steps[:, None], owner[None])[:, 0]
        difference = until[:, :, None] - until[:, None, :]  # b i j h
        count = owner.numel()
        causal = torch.ones(count, count, dtype=torch.bool, device=owner.device).tril()
        related = causal & (owner[:, None] == owner[None, :])
        weight = difference.masked_fill(~related[None, :, :, None], float("-inf")).exp().to(added.dtype)
        return torch.einsum("bijh,bjhpn->bihpn", weight, sources)

    def from_states(self, states: Tensor) -> Tensor:
        """What the state in front of a chunk gives its tokens: b c q h p."""
        groups = self.B.shape[2]
        states = rearrange(states, "b c (g r) p n -> b c g r p n", g=groups)
        owner = torch.cat([self.segment[:1, 0], self.segment[:-1, -1]])  # c
        same = (self.segment == owner[:, None])[None, :, None, None]  # 1 c 1 1 q
        decay = self.sums.masked_fill(~same, float("-inf")).exp()  # b c g r q
        y = (self.C[:, :, :, None] @ states.transpose(-1, -2)) * decay[..., None]  # b c g r q p
        return rearrange(y, "b c g r q p -> b c q (g r) p")

    def segment_end_states(self, entering: Tensor, cu_seqlens: Tensor) -> Tensor:
        """State after the last token of each segment: s h p n."""
        groups, length = self.B.shape[2], self.segment.shape[1]
        end = cu_seqlens[1:].long() - 1  # s
        chunk, offset = end // length, end % length
        number = torch.arange(end.numel(), device=end.device)
        within = torch.arange(length, device=end.device)
        mine = (self.segment[chunk] == number[:, None]) & (within <= offset[:, None])  # s q
        sums = self.sums[0, chunk]  # s g r q
        at_end = sums.gather(-1, offset[:, None, None, None].expand(*sums.shape[:-1], 1))  # s g r 1
        decay = (at_end - sums).masked_fill(~mine[:, None, None], float("-inf")).exp()
        added = (self.x[0, chunk] * decay[..., None]).transpose(-1, -2) @ self.B[0, chunk][:, :, None]  # s g r p n
        owner = torch.cat([self.segment[:1, 0], self.segment[:-1, -1]])[chunk]  # s
        carried = at_end.masked_fill((owner != number)[:, None, None, None], float("-inf")).exp()
        before = rearrange(entering[0, chunk], "s (g r) p n -> s g r p n", g=groups)
        return rearrange(added + carried[..., None] * before, "s g r p n -> s (g r) p n")


def _initial_share(chunks: _Chunks, initial_state: Tensor, cu_seqlens: Tensor, l: int) -> tuple[Tensor, Tensor]:
    """What the segments' initial states add to their final states (s h p n) and to the tokens (1 l h p)."""
    segment = _segment_of_token(cu_seqlens, l, initial_state.device)
    log_decay = rearrange(chunks.log_decay, "1 c q h -> 1 1 (c q) h")[:, :, :l].double()
    decay = _segment_sums(log_decay, segment[None])[0, 0].exp().to(initial_state.dtype)  # l h
    C = rearrange(chunks.C, "1 c g q n -> (c q) g n")[:l].repeat_interleave(chunks.x.shape[3], dim=1)  # l h n
    # One product of all tokens with all states, then each token takes its own segment's: no Python loop, no l h p n.
    tokens = torch.einsum("lhn,lsh,shpn->lhp", C, F.one_hot(segment)[..., None] * decay[:, None], initial_state)
    total = decay[cu_seqlens[1:].long() - 1][:, :, None, None] * initial_state
    return total, tokens[None]


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


def _segment_of_token(cu_seqlens: Tensor | None, l: int, device: torch.device) -> Tensor:
    """Number of the segment that each token lies in: l, int64."""
    position = torch.arange(l, device=device)
    if cu_seqlens is None:
        return torch.zeros_like(position)
    return torch.bucketize(position, cu_seqlens[1:-1].long(), right=True)


def _segment_sums(values: Tensor, segment: Tensor) -> Tensor:
    """Sum of each token and those before it in its segment, by doubling; segments are runs of equal numbers.

    Args:
        values: b c q h.
        segment: c q.
    """
    reach = 1
    while reach < segment.shape[1]:
        same = (segment[:, reach:] == segment[:, :-reach])[:, :, None]
        added = values[:, :, reach:] + torch.where(same, values[:, :, :-reach], 0)
        values = torch.cat([values[:, :, :reach], added], dim=2)
        reach *= 2
    return values


def _chunk(tensor: Tensor, chunk_size: int, pad: int) -> Tensor:
    """Pad `l` with zeros and cut it: b l ... to b c q ..."""
    padded = F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, pad))
    return padded.unflatten(1, (-1, chunk_size))
