"""AdaLN: each token gets its own column's vectors, and the gradient sums them back."""

import torch

from m4v_dist.blocks.modulation import Modulation, gated, modulate, spread
from m4v_dist.model.build import initialize_weights


def test_spread_repeats_each_column_and_sums_its_gradient() -> None:
    values = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.equal(spread(values, [2, 0, 1]), values[[0, 0, 2]])
    assert torch.autograd.gradcheck(lambda v: spread(v, [2, 0, 3]).square(), (values,))


def test_modulate_norms_and_shifts_by_column() -> None:
    tokens, shift, scale = torch.randn(5, 8), torch.randn(2, 8), torch.randn(2, 8)
    out = modulate(tokens, shift, scale, [3, 2])
    centred = tokens - tokens.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    column = [0, 0, 0, 1, 1]
    torch.testing.assert_close(out, normed * (1 + scale[column]) + shift[column])


def test_a_fresh_gate_closes_the_block() -> None:
    modulation = Modulation(8, 3)
    initialize_weights(modulation, seed=0)
    _, _, gate = modulation(torch.randn(2, 8))
    tokens = torch.randn(5, 8)
    assert torch.equal(gated(tokens, torch.randn(5, 8), gate, [3, 2]), tokens)
