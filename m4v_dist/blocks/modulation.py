"""AdaLN: scale, shift and gate from the conditioning vector, one set per column, spread over the column's tokens.

Norm and modulation are float32 also under autocast.

Source: DiT (Peebles & Xie 2023); order of the chunks as in PyramidFlow flux_modules/modeling_normalization.py at
3040d71.

Legend: `k` columns, `l` tokens, `d` width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPSILON = 1e-6


class Modulation(nn.Module):
    """Linear of SiLU(conditioning), cut into `num_chunks` vectors; zero at the start, so that a block is the identity.

    Args:
        width: d.
        num_chunks: vectors per column: 6 for a double block, 3 for a unified one, 2 for the head.
    """

    def __init__(self, width: int, num_chunks: int) -> None:
        super().__init__()
        self.num_chunks = num_chunks
        self.linear = nn.Linear(width, num_chunks * width)

    def initialize(self, generator: torch.Generator) -> None:
        """Zero weight and bias."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, conditioning: Tensor) -> tuple[Tensor, ...]:
        """k d to `num_chunks` times k d, float32."""
        with torch.autocast(conditioning.device.type, enabled=False):
            return self.linear(F.silu(conditioning.float())).chunk(self.num_chunks, dim=-1)


class _Spread(torch.autograd.Function):
    """Repeat each column's vector over its tokens; backward sums each run in order, so it is deterministic."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, lengths: list[int]) -> Tensor:
        ctx.lengths = lengths
        return torch.cat([value.expand(length, -1) for value, length in zip(values.split(1), lengths, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.stack([part.sum(dim=0) for part in grads[0].split(ctx.lengths)]), None


@torch.library.custom_op("m4v_blocks::spread", mutates_args=())
def _spread(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """`_Spread` as one operator, so that a compiled block is not cut up by its list of lengths."""
    return torch.cat([value.expand(length, -1) for value, length in zip(values.split(1), lengths, strict=True)])


@_spread.register_fake
def _(values: Tensor, lengths: Sequence[int]) -> Tensor:
    return values.new_empty(sum(lengths), values.shape[1])


@torch.library.custom_op("m4v_blocks::gather_spread", mutates_args=())
def _gather_spread(grad: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.stack([part.sum(dim=0) for part in grad.split(list(lengths))])


@_gather_spread.register_fake
def _(grad: Tensor, lengths: Sequence[int]) -> Tensor:
    return grad.new_empty(len(lengths), grad.shape[1])


def _keep_lengths(ctx: Any, inputs: tuple[Tensor, Sequence[int]], output: Tensor) -> None:
    ctx.lengths = inputs[1]


_spread.register_autograd(lambda ctx, grad: (_gather_spread(grad, ctx.lengths), None), setup_context=_keep_lengths)


def spread(values: Tensor, lengths: list[int]) -> Tensor:
    """Expand one row per column to one per token.

    Args:
        values: k d.
        lengths: tokens of each column, sum l.

    Returns:
        l d.
    """
    if torch.compiler.is_compiling():
        compiled: Tensor = _spread(values, lengths)
        return compiled
    return _Spread.apply(values, lengths)  # type: ignore[no-any-return]


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor, lengths: list[int]) -> Tensor:
    """LayerNorm without weights, then (1 + scale) and shift of each token's column.

    Args:
        tokens: l d.
        shift, scale: k d, float32.
        lengths: tokens of each column.

    Returns:
        l d, float32.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        normed = F.layer_norm(tokens.float(), tokens.shape[-1:], eps=LAYER_NORM_EPSILON)
        return normed * (1 + spread(scale, lengths)) + spread(shift, lengths)


def gated(residual: Tensor, update: Tensor, gate: Tensor, lengths: list[int]) -> Tensor:
    """residual + gate * update, float32.

    Args:
        residual, update: l d.
        gate: k d, float32.
        lengths: tokens of each column.
    """
    return residual.float() + spread(gate, lengths) * update.float()
