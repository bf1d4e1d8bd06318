"""The causal convolution: against torch's own conv1d, and segment by segment."""

import pytest
import torch
import torch.nn.functional as F

from m4v_dist.kernels.conv1d import causal_conv1d


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("l", [1, 2, 3, 17])
def test_conv_equals_torch_conv1d_padded_on_the_left(l: int, width: int) -> None:
    x = torch.randn(2, l, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, width, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    out = causal_conv1d(x, weight, bias)
    expected = F.conv1d(F.pad(x.transpose(1, 2), (width - 1, 0)), weight[:, None], bias, groups=5).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for actual, wanted in zip(
        torch.autograd.grad(out, (x, weight, bias), grad),
        torch.autograd.grad(expected, (x, weight, bias), grad),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)


def test_taps_do_not_reach_over_a_segment_start() -> None:
    lengths = [1, 2, 9, 1, 4]
    x, weight = torch.randn(1, sum(lengths), 3), torch.randn(3, 4)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = causal_conv1d(x, weight, None, cu_seqlens=cu_seqlens)
    alone = torch.cat([causal_conv1d(part, weight, None) for part in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone)


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 to 4 taps"):
        causal_conv1d(torch.randn(1, 5, 3), torch.randn(3, 5), None)
    with pytest.raises(ValueError, match=r"bias must have shape \(3,\)"):
        causal_conv1d(torch.randn(1, 5, 3), torch.randn(3, 4), torch.randn(2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_segment_forward_and_backward(bad: float) -> None:
    cu_seqlens = torch.tensor([0, 4, 9, 12], dtype=torch.int32)
    weight = torch.randn(3, 4)
    clean = torch.randn(1, 12, 3)
    dirty = clean.clone()
    dirty[:, 4:9] = bad
    outside = [*range(4), *range(9, 12)]
    expected, actual = (causal_conv1d(x, weight, None, cu_seqlens=cu_seqlens) for x in (clean, dirty))
    assert torch.equal(actual[:, outside], expected[:, outside])
    assert not actual[:, 4:9].isfinite().any()
    x = clean.requires_grad_()
    (grad,) = torch.autograd.grad(causal_conv1d(x, weight, None, cu_seqlens=cu_seqlens), x, dirty)
    assert grad[:, outside].isfinite().all() and not grad[:, 4:9].isfinite().any()
