"""One sequence on several ranks: rows, conv tails and scan states from one sequence rank to another, differentiably.

Every token lives on exactly one sequence rank; parameters are on all. All traffic is one primitive, `exchange`: rows
from each rank to each other, by counts that all ranks know on the host. Its backward is the same exchange the other
way, so nothing is summed on the way, on gloo or NCCL, and what a rank gets is the same bits whoever comes first. A row
that goes to several ranks is sent several times; its gradients are added by autograd on the rank that sent it, in the
order of the ranks.

Why parameters' gradients are right when they are summed over all ranks, data and sequence parallel alike. Call theta_r
rank r's copy of a parameter theta. The ranks together compute the rows v of the model's answer, each on one rank, from
all copies, through exchanges, which are linear and whose backward is their transpose. So when rank r starts its
backward from dl/dv of its own rows alone, autograd over all ranks gives dl/dtheta_r on each, and the derivative by the
one theta is their sum. `share_rows` does that: every rank gets all rows, so each computes the whole loss l, the same
number, and its backward keeps the rank's own rows. ZeRO's reduction over the world is then the sum over data ranks of
their losses' gradients, as with one axis: the engine averages over all ranks and scales each loss by the world size,
sequence ranks counted. Only sums of *values* over ranks must take each data rank's loss once (`trainer/tally.py`).

The order of the collectives must be the same on all ranks, in backward too. Autograd walks a graph against the order in
which it was made, so it is, provided that each rank's graph holds the same exchanges: a rank that gets no rows, or has
no tokens at all, must take part. `tie` keeps an answer of no rows in the graph.
torch.compile keeps out of it: traced, the ranks of a compiled block were seen to send what others did not expect.

Legend: `l` tokens of this rank, `d` channels, `n` heads, `s` sequence ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from m4v_dist.parallel.mesh import SequenceGroup

Counts = tuple[tuple[int, ...], ...]
"""counts[i][j]: rows that sequence rank i gives to rank j; the same on all ranks."""


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.facts = (sent, received, group)
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received, group = ctx.facts
        return _all_to_all(grads[0], received, sent, group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


@torch.compiler.disable
def exchange(rows: Tensor, counts: Counts, sequence: SequenceGroup) -> Tensor:
    """Give rows to the ranks of the group and get theirs (collective, and so is its backward).

    Args:
        rows: this rank's, in the order of the ranks that they go to; its graph must hold all that the other ranks'
            does, also where it has no rows.
        counts: how many; where nobody gives any, nothing is called.
        sequence: the group.

    Returns:
        The rows given to this rank, in the order of the ranks that they come from.
    """
    if not any(map(any, counts)):
        return rows[:0]
    received = [given[sequence.rank] for given in counts]
    return _Exchange.apply(rows, list(counts[sequence.rank]), received, sequence.group)  # type: ignore[no-any-return]


def transposed(counts: Counts) -> Counts:
    """The counts of the way back."""
    return tuple(zip(*counts, strict=True))


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, unused: Tensor) -> Tensor:
        ctx.save_for_backward(unused)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.zeros_like(ctx.saved_tensors[0])


@torch.compiler.disable
def tie(tensor: Tensor, unused: Tensor) -> Tensor:
    """Return `tensor`, with `unused` in its graph, so that backward calls the exchange that made it."""
    return _Tie.apply(tensor, unused)  # type: ignore[no-any-return]


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, lengths: list[int], sequence: SequenceGroup) -> Tensor:
        ctx.start, ctx.length = sum(lengths[: sequence.rank]), rows.shape[0]
        sent = [rows.shape[0]] * sequence.size
        return _all_to_all(torch.cat([rows] * sequence.size), sent, lengths, sequence.group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].narrow(0, ctx.start, ctx.length), None, None


@torch.compiler.disable
def share_rows(rows: Tensor, lengths: Sequence[int], sequence: SequenceGroup) -> Tensor:
    """Give every rank the rows of all, in rank order, for a loss that every rank computes alike (collective).

    Backward calls nobody: each rank keeps the gradient of its own rows, so that the loss counts once; see the module.

    Args:
        rows: of this rank.
        lengths: rows of each rank.
        sequence: the group.
    """
    return _Share.apply(rows, list(lengths), sequence)  # type: ignore[no-any-return]


def tokens_to_heads(tokens: Tensor, lengths: Sequence[int], sequence: SequenceGroup) -> Tensor:
    """From this rank's tokens with all heads to all tokens with this rank's heads (Ulysses; collective).

    Each rank sends (s - 1) / s of what it holds.

    Args:
        tokens: l n ..., with n a multiple of s.
        lengths: tokens of each rank.
        sequence: the group.

    Returns:
        sum(lengths), n / s, ...; tokens in rank order. Rank r has heads r n / s and those after it.

    Source: DeepSpeed Ulysses (Jacobs et al. 2023).
    """
    rows = rearrange(tokens, "l (s n) ... -> (s l) n ...", s=sequence.size)
    return exchange(rows, tuple((length,) * sequence.size for length in lengths), sequence)


def heads_to_tokens(heads: Tensor, lengths: Sequence[int], sequence: SequenceGroup) -> Tensor:
    """Undo `tokens_to_heads`: sum(lengths), n / s, ... to l n ... (collective)."""
    rows = exchange(heads, transposed(tuple((length,) * sequence.size for length in lengths)), sequence)
    return rearrange(rows, "(s l) n ... -> l (s n) ...", s=sequence.size)


@dataclass(frozen=True)
class Handover:
    """Where the cuts go through segments: what each rank has to take over from those before it.

    A rank's tokens are whole segments, but its first may have begun on an earlier rank and its last may go on.

    Args:
        sequence: the group.
        entering: of each rank, the number of the segment that its first token continues; None where one begins.
        leaving: of each rank, the number of the segment that goes on after its last token; None where one ends.
        entering_lengths: of each rank, the tokens of the segment that its first token lies in; 0 without tokens.
        leaving_lengths: of each rank, the tokens of the segment that its last token lies in; 0 without tokens.
    """

    sequence: SequenceGroup
    entering: tuple[int | None, ...]
    leaving: tuple[int | None, ...]
    entering_lengths: tuple[int, ...]
    leaving_lengths: tuple[int, ...]

    @property
    def is_entered(self) -> bool:
        """Whether this rank's first token continues a segment."""
        return self.entering[self.sequence.rank] is not None

    @property
    def num_entered(self) -> int:
        """Tokens of this rank's first segment."""
        return self.entering_lengths[self.sequence.rank]

    @property
    def num_left(self) -> int:
        """Tokens of this rank's last segment."""
        return self.leaving_lengths[self.sequence.rank]

    @property
    def is_cut(self) -> bool:
        """Whether any segment lies on more than one rank."""
        return any(number is not None for number in self.entering)

    def _is_heir(self, giver: int, taker: int) -> bool:
        return giver < taker and self.leaving[giver] is not None and self.leaving[giver] == self.entering[taker]

    def state_counts(self) -> Counts:
        """One row from each rank to every later one that holds more of its last segment."""
        ranks = range(self.sequence.size)
        return tuple(tuple(int(self._is_heir(giver, taker)) for taker in ranks) for giver in ranks)

    def tail_counts(self, num_tokens: int | None) -> Counts:
        """Up to `num_tokens` tokens (None: all) in front of each rank's first, from the ranks that hold them."""
        ranks = range(self.sequence.size)

        def count(giver: int, taker: int) -> int:
            held = self.leaving_lengths[giver]
            # A rank between two that hold one segment holds nothing else.
            nearer = sum(self.leaving_lengths[giver + 1 : taker])
            return held if num_tokens is None else min(max(0, num_tokens - nearer), held)

        return tuple(
            tuple(count(giver, taker) if self._is_heir(giver, taker) else 0 for taker in ranks) for giver in ranks
        )


def hand_tail(tokens: Tensor, num_tokens: int | None, handover: Handover) -> Tensor:
    """The tokens in front of this rank's first one, as many as its segment has, up to `num_tokens` (collective).

    Volume: `num_tokens` d numbers for each cut that goes through a segment.

    Args:
        tokens: l d, of this rank.
        num_tokens: how many, as the taps of a convolution less one; None for all, which each rank then gets again.
        handover: where the cuts go.

    Returns:
        t d, old to new, 0 <= t <= num_tokens. It must be used, or kept in the graph (`tie`).
    """
    counts = handover.tail_counts(num_tokens)
    length = tokens.shape[0]
    rows = torch.cat([tokens[length - count :] for count in counts[handover.sequence.rank]])
    return exchange(rows, counts, handover.sequence)


def hand_state(log_decay: Tensor, state: Tensor, handover: Handover) -> Tensor:
    """The state that enters this rank's first segment, from what each rank made of the segment alone (collective).

    Every rank scans its tokens from a zero state, so all work at once. It sends the total log decay of its last segment
    and the state after it to all later ranks that hold more of that segment; they fold what they get from old to new:
    entering = exp(log_decay) entering + state. Volume: one pair for each (giver, taker); at two ranks one, whatever the
    length of the sequence.

    Args:
        log_decay: log of what is left of a state that passes this rank's last segment; broadcasts to `state`.
        state: after this rank's last segment, from zero in front of it.
        handover: where the cuts go.

    Returns:
        Of the shape of `state`; zero on a rank that no segment enters. Its graph must be kept there too (`tie`).
    """
    counts = handover.state_counts()
    row = torch.cat([log_decay.flatten(), state.flatten()])
    rows = exchange(row[None].expand(sum(counts[handover.sequence.rank]), -1), counts, handover.sequence)
    decays, states = rows.split([log_decay.numel(), state.numel()], dim=1)
    entering = states[:1].sum(dim=0).view_as(state)
    for decay, following in zip(decays[1:], states[1:], strict=True):
        entering = torch.exp(decay.view_as(log_decay)) * entering + following.view_as(state)
    return entering
