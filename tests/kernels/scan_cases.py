"""Random problems for the scan, and outputs with every gradient of a backend on one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
OF_TOKENS = ("x", "dt", "B", "C", "z")


def draw_inputs(
    l: int, *, h: int, g: int, p: int, n: int, segments: int = 1, b: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Inputs on the CPU in float64; those of tokens are rounded to `dtype` first: each dtype gets the same numbers."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    drawn = {
        "x": draw(b, l, h, p), "dt": draw(b, l, h), "A": -torch.rand(h, dtype=torch.float64) * 15 - 1,
        "B": draw(b, l, g, n), "C": draw(b, l, g, n), "D": draw(h), "z": draw(b, l, h, p), "dt_bias": draw(h) - 2,
        "initial_state": draw(segments, h, p, n),
    }  # fmt: skip
    return {name: value.to(dtype if name in OF_TOKENS else torch.float32).double() for name, value in drawn.items()}


def outputs_and_gradients(
    scan: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Tensor], dtype: torch.dtype, **options: Any
) -> dict[str, Tensor]:
    """y, final_state and the gradient of each input, in float64, of a fixed weighted sum of the outputs.

    Args:
        scan: takes the inputs by the names of `scan.ssd_scan`.
        inputs: float64, see `draw_inputs`.
        dtype: what the inputs of tokens are cast to; the others are float32, or float64 where this is.
        options: of the scan.
    """
    of_heads = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        name: value.to(dtype if name in OF_TOKENS else of_heads, copy=True).requires_grad_()
        for name, value in inputs.items()
    }
    y, state = scan(**{name: leaves.get(name) for name in NAMES}, **options)
    generator = torch.Generator().manual_seed(1)
    of_y, of_state = (
        torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device) for out in (y, state)
    )
    ((y.double() * of_y.to(dtype).double()).sum() + (state.double() * of_state).sum()).backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    assert all(gradient is not None for gradient in gradients.values())
    return {"y": y.detach().double(), "final_state": state.detach().double()} | {
        name: gradient.double() for name, gradient in gradients.items() if gradient is not None
    }


def worst_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Largest error of a tensor against that tensor's own largest number, and the tensor's name."""
    assert actual.keys() == expected.keys()
    errors = []
    for name, value in expected.items():
        assert actual[name].shape == value.shape and bool(actual[name].isfinite().all()), name
        scale = float(value.abs().max().clamp_min(1e-30))
        errors.append((float((actual[name] - value).abs().max()) / scale, name))
    return max(errors)
