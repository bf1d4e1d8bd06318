"""The Triton scan on a GPU against the chunked reference in float64: outputs and every gradient."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from m4v_dist.kernels.scan_reference import ssd_scan_chunked
from m4v_dist.kernels.scan_triton import ssd_scan_triton
from tests.kernels.scan_cases import draw_inputs, outputs_and_gradients, worst_error

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def _on_gpu(lengths: list[int], sizes: dict[str, int], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    drawn = draw_inputs(sum(lengths), segments=len(lengths), dtype=dtype, **sizes)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return {name: value.cuda() for name, value in drawn.items()}, {"cu_seqlens": cu_seqlens, "dt_softplus": True}


MAMBA2 = {"h": 6, "g": 1, "p": 64, "n": 128}
MIL = {"h": 3, "g": 3, "p": 64, "n": 64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes", [MAMBA2, MIL, {"h": 2, "g": 1, "p": 128, "n": 256}, {"h": 2, "g": 2, "p": 32, "n": 16}]
)
@pytest.mark.parametrize("lengths", [[1], [63, 64, 65], [1000, 15647]])
def test_outputs_and_gradients_are_those_of_the_reference(
    lengths: list[int], sizes: dict[str, int], dtype: torch.dtype
) -> None:
    inputs, options = _on_gpu(lengths, sizes, dtype)
    expected = outputs_and_gradients(partial(ssd_scan_chunked, chunk_size=64), inputs, torch.float64, **options)
    for chunk_size in (64, 128, 256):
        found = outputs_and_gradients(partial(ssd_scan_triton, chunk_size=chunk_size), inputs, dtype, **options)
        error, name = worst_error(found, expected)
        assert error < TOLERANCE[dtype], (chunk_size, name, error)


def test_long_memory_and_extreme_steps_are_right() -> None:
    """Decays that remember thousands of tokens, and single steps that forget everything."""
    inputs, options = _on_gpu([8000], MAMBA2, torch.float32)
    inputs["A"] = torch.full_like(inputs["A"], -0.01)
    inputs["dt"][:, ::1111] = 4000.0
    expected = outputs_and_gradients(partial(ssd_scan_chunked, chunk_size=64), inputs, torch.float64, **options)
    found = outputs_and_gradients(partial(ssd_scan_triton, chunk_size=128), inputs, torch.float32, **options)
    error, name = worst_error(found, expected)
    assert error < 1e-4, (name, error)


def test_the_same_inputs_give_the_same_bits() -> None:
    inputs, options = _on_gpu([3000, 2000], MAMBA2, torch.bfloat16)
    once, again = (
        outputs_and_gradients(partial(ssd_scan_triton, chunk_size=128), inputs, torch.bfloat16, **options)
        for _ in range(2)
    )
    for name, value in once.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)
