"""Keeps what is not finite inside its segment, around scans whose matrix products mask by zeros (0 * NaN is NaN).

The packed scan runs first, at full speed; only where its outputs, or backward the gradients that reach it, hold
something that is not finite do segments part.

Legend: `l` tokens, `s` segments; batch is 1.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Scan = Callable[[tuple[Tensor | None, ...], Tensor | None, Tensor | None], tuple[Tensor, Tensor]]


def isolate_segments(
    scan: Scan,
    sequences: tuple[Tensor | None, ...],  # each 1 l ...
    initial_state: Tensor | None,  # s ...
    cu_seqlens: Tensor,  # s + 1
) -> tuple[Tensor, Tensor]:
    """Run a packed scan so that NaN and inf of one segment reach no other's outputs and gradients.

    NaN or inf anywhere in a segment's inputs or states shows in its own outputs, so looking at these suffices. Then
    each segment is scanned alone: the others' outputs are the same up to rounding. A gradient that is not finite is
    taken out of backward with its segment's, and that segment's inputs get NaN: that it was there is not hidden.

    Args:
        scan: takes sequences, initial state and cu_seqlens; gives y 1 l ... and the final states s ...
        sequences: what has a value per token; None passes through.
        initial_state: one per segment, or None.
        cu_seqlens: where segments start.

    Returns:
        What `scan` gives.
    """
    spread = _Spread(cu_seqlens)
    *entered, state = _Enter.apply(spread, *sequences, initial_state)
    y, final_state = scan(tuple(entered), state, cu_seqlens)
    if bool(y.isfinite().all()):
        y, final_state = _Leave.apply(spread, y, final_state)
        return y, final_state
    bounds = cu_seqlens.tolist()
    parts = [
        scan(
            tuple(None if sequence is None else sequence[:, start:end] for sequence in sequences),
            None if initial_state is None else initial_state[number : number + 1],
            None,
        )
        for number, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False))
    ]
    return torch.cat([part[0] for part in parts], dim=1), torch.cat([part[1] for part in parts])


class _Spread:
    """What `_Leave` tells `_Enter` in backward.

    Attributes:
        cu_seqlens: s + 1.
        is_bad: s, segments with a gradient that is not finite; None where there are none.
    """

    def __init__(self, cu_seqlens: Tensor) -> None:
        self.cu_seqlens = cu_seqlens
        self.is_bad: Tensor | None = None

    def of_token(self, is_bad: Tensor) -> Tensor:
        """A flag per segment (s) as one per token (l)."""
        return is_bad.repeat_interleave(self.cu_seqlens.diff())


class _Leave(torch.autograd.Function):
    """Identity; backward, gradients of a segment with one that is not finite become 0, and are noted."""

    @staticmethod
    def forward(ctx: Any, spread: _Spread, y: Tensor, final_state: Tensor) -> tuple[Tensor, Tensor]:
        ctx.spread = spread
        return y.view_as(y), final_state.view_as(final_state)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[None, Tensor, Tensor]:  # type: ignore[override]
        spread: _Spread = ctx.spread
        spread.is_bad = None
        if not bool(grad_y.isfinite().all() & grad_state.isfinite().all()):
            counts = (~grad_y.isfinite()).flatten(2).any(dim=-1)[0].int().cumsum(0)  # l
            until = torch.nn.functional.pad(counts, (1, 0))[spread.cu_seqlens.long()]  # s + 1
            is_bad = (until.diff() > 0) | (~grad_state.isfinite()).flatten(1).any(dim=-1)
            spread.is_bad = is_bad
            grad_y = grad_y.masked_fill(_along(spread.of_token(is_bad)[None], grad_y), 0)
            grad_state = grad_state.masked_fill(_along(is_bad, grad_state), 0)
        return None, grad_y, grad_state


class _Enter(torch.autograd.Function):
    """Identity on sequences and, last, the states; backward, the segments that `_Leave` noted get NaN."""

    @staticmethod
    def forward(ctx: Any, spread: _Spread, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.spread = spread
        ctx.set_materialize_grads(False)
        return tuple(None if tensor is None else tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        is_bad = ctx.spread.is_bad
        if is_bad is None:
            return None, *grads
        token = ctx.spread.of_token(is_bad)[None]
        flags = [token] * (len(grads) - 1) + [is_bad]
        return None, *(
            None if grad is None else grad.masked_fill(_along(flag, grad), float("nan"))
            for grad, flag in zip(grads, flags, strict=True)
        )


def _along(flag: Tensor, tensor: Tensor) -> Tensor:
    """`flag`, over the first axes of `tensor`, with axes of 1 for the others."""
    return flag.view(*flag.shape, *(1,) * (tensor.ndim - flag.ndim))
