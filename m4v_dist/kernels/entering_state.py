"""What a state in front of the first token gives to each token of one segment, apart from the scan.

A scan is linear in its initial state, so `scan(..., initial_state=state) = scan(...) + response`. Where the sequence is
cut over ranks, each rank scans from zero and adds the response once it knows the state that enters; the cost is that of
reading the state out, 2 n FLOPs a channel and token, and nothing is scanned twice. Float32 (float64 for float64), sums
of log decays in float64, as in the scans.

Legend: `l` tokens of the segment, `h` heads, `p` head width, `g` groups, `r` heads of a group, `n` state size, `d`
channels.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def head_response(
    steps: Tensor,  # l h, float
    A: Tensor,  # h
    C: Tensor,  # l g n
    state: Tensor,  # h p n
) -> Tensor:
    """The response under one decay per head (`scan.ssd_scan`).

    Args:
        steps: l h, step sizes after softplus.
        A: h, negative decay rates.
        C: l g n, with h a multiple of g.
        state: h p n, in front of the first token.

    Returns:
        l h p, dtype of `state`.
    """
    with torch.autocast(steps.device.type, enabled=False):
        decay = torch.exp(running_sum(steps.double()) * A.double()).to(state.dtype)  # l h
        grouped = rearrange(state, "(g r) p n -> g r p n", g=C.shape[1])
        read = torch.einsum("lgn,grpn->lgrp", C.to(state.dtype), grouped)
        return rearrange(read, "l g r p -> l (g r) p") * decay[..., None]


def channel_response(
    steps: Tensor,  # l d, float
    A: Tensor,  # d n
    C: Tensor,  # l n
    state: Tensor,  # d n
    *,
    chunk_size: int,
) -> Tensor:
    """The response under decays per channel (`selective_scan.selective_scan`).

    Args:
        steps: l d, step sizes after softplus.
        A: d n, negative decay rates.
        C: l n.
        state: d n, in front of the first token.
        chunk_size: tokens whose decays, chunk d n, are in memory at once; they are computed again in backward.

    Returns:
        l d, dtype of `state`.
    """
    with torch.autocast(steps.device.type, enabled=False):
        sums = running_sum(steps.double()).to(state.dtype)  # l d
        parts = []
        for part, read in zip(sums.split(chunk_size), C.to(state.dtype).split(chunk_size), strict=True):
            arguments = (part, A.to(state.dtype), read, state)
            if torch.is_grad_enabled():
                parts.append(checkpoint(_channels, *arguments, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(_channels(*arguments))
        return torch.cat(parts)


def _channels(sums: Tensor, A: Tensor, C: Tensor, state: Tensor) -> Tensor:
    left = torch.exp(sums[..., None] * A) * state  # l d n
    return (left * C[:, None]).sum(dim=-1)


def running_sum(values: Tensor) -> Tensor:
    """Sum of each row and those before it, by doubling: deterministic on every device. l ... to l ..."""
    reach = 1
    while reach < values.shape[0]:
        values = torch.cat([values[:reach], values[reach:] + values[:-reach]])
        reach *= 2
    return values
