"""The Triton convolution in its interpreter, against plain torch: outputs and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m4v_dist.kernels.conv1d import causal_conv1d
from m4v_dist.kernels.conv1d_triton import causal_conv1d_triton, gather_index
from m4v_dist.kernels.scan_triton import IS_INTERPRETED

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="on a GPU test_gpu_conv1d_triton.py runs")


def _gradients(out: Tensor, leaves: list[Tensor | None]) -> list[Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad((out.float() * weights).sum(), [t for t in leaves if t is not None])]


def _leaves(r: int, d: int, taps: int, b: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(b, r, d, dtype=dtype, requires_grad=True), torch.randn(d, taps, requires_grad=True),
        torch.randn(d, requires_grad=True),
    )  # fmt: skip


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("has_silu", [False, True])
@pytest.mark.parametrize("lengths", [[1], [2, 1, 70], [600]])
def test_outputs_and_gradients_are_those_of_plain_torch(lengths: list[int], has_silu: bool, taps: int) -> None:
    x, weight, bias = _leaves(sum(lengths), 5, taps)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    plain = causal_conv1d(x, weight, bias, cu_seqlens=cu_seqlens)
    ours = causal_conv1d_triton(x, weight, bias, cu_seqlens=cu_seqlens, has_silu=has_silu)
    expected = _gradients(F.silu(plain) if has_silu else plain, [x, weight, bias])
    for found, value in zip(_gradients(ours, [x, weight, bias]), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


def test_rows_are_read_through_an_index_and_gradients_collected_through_it() -> None:
    """As a re-composed column: text twice, rows out of order, a row of zeros, a row that nobody reads."""
    x, weight, bias = _leaves(9, 130, 4)
    source = torch.tensor([0, 1, 5, 4, -1, 3, 7, 6, 0, 1])
    bounds = torch.tensor([0, 6, 10], dtype=torch.int32)
    padded = torch.cat([x[0], torch.zeros(1, 130)])[source][None]
    expected = _gradients(F.silu(causal_conv1d(padded, weight, bias, cu_seqlens=bounds)), [x, weight, bias])
    ours = causal_conv1d_triton(x, weight, bias, cu_seqlens=bounds, has_silu=True, gather=gather_index(source, 9))
    found = _gradients(ours, [x, weight, bias])
    for actual, value in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-4, atol=1e-5)
    assert not bool(found[1][0, 8].any())


def test_a_batch_a_missing_bias_and_a_view_of_wider_rows() -> None:
    x, weight, _ = _leaves(40, 24, 4, b=2)
    view = x[..., 3:20]
    expected = _gradients(causal_conv1d(view, weight[:17], None), [x, weight])
    for found, value in zip(
        _gradients(causal_conv1d_triton(view, weight[:17], None), [x, weight]), expected, strict=True
    ):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


def test_half_precision_sums_in_float32() -> None:
    """float16: the interpreter cuts where a GPU rounds to bfloat16."""
    x, weight, bias = _leaves(50, 8, 4, dtype=torch.float16)
    ours = causal_conv1d_triton(x, weight, bias)
    assert ours.dtype == torch.float16
    torch.testing.assert_close(ours, causal_conv1d(x, weight, bias), rtol=0, atol=0)


def test_what_is_not_finite_stays_in_its_segment() -> None:
    x, weight, bias = _leaves(12, 4, 4)
    values = x.detach().clone()
    values[:, 5] = float("nan")
    values.requires_grad_()
    out = causal_conv1d_triton(values, weight, bias, cu_seqlens=torch.tensor([0, 6, 12], dtype=torch.int32))
    (gradient,) = torch.autograd.grad(out[:, 6:].sum(), [values])
    assert bool(out[:, 6:].isfinite().all()) and bool(gradient.isfinite().all())


def test_the_op_keeps_what_torch_asks_of_one() -> None:
    x, weight, bias = _leaves(9, 4, 4)
    index = gather_index(torch.tensor([0, 1, 2, 0]), 9)
    arguments = (x, weight, bias, index.source, index.readers, None, True)
    torch.library.opcheck(
        torch.ops.m4v_dist.causal_conv1d.default, arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize("source", [[0, 9], [0, 0, 0]])
def test_a_row_that_is_not_there_or_read_too_often_is_refused(source: list[int]) -> None:
    with pytest.raises(ValueError, match="reads row"):
        gather_index(torch.tensor(source), 9)
