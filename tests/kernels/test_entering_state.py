"""The response to an entering state: with it, a scan from zero is the scan from that state, gradients too."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m4v_dist.kernels.entering_state import channel_response, head_response, running_sum
from m4v_dist.kernels.scan import ssd_scan
from m4v_dist.kernels.selective_scan import selective_scan

HEADS, WIDTH, GROUPS, STATE = 6, 3, 2, 5
Inputs = dict[str, Tensor]


def _inputs(length: int, variant: str) -> Inputs:
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if variant == "mamba1":
        shapes: dict[str, tuple[int, ...]] = {
            "x": (1, length, HEADS), "A": (HEADS, STATE), "B": (1, length, STATE), "C": (1, length, STATE),
            "state": (HEADS, STATE),
        }  # fmt: skip
    else:
        shapes = {
            "x": (1, length, HEADS, WIDTH), "A": (HEADS,), "B": (1, length, GROUPS, STATE),
            "C": (1, length, GROUPS, STATE), "state": (HEADS, WIDTH, STATE),
        }  # fmt: skip
    values = {name: draw(*shape) for name, shape in shapes.items()}
    return values | {"dt": draw(1, length, HEADS), "dt_bias": draw(HEADS), "A": -values["A"].exp()}


def _scan(values: Inputs, variant: str, initial_state: Tensor | None) -> Tensor:
    scan: Callable[..., tuple[Tensor, Tensor]] = selective_scan if variant == "mamba1" else ssd_scan
    y, _ = scan(
        values["x"], values["dt"], values["A"], values["B"], values["C"], None, dt_bias=values["dt_bias"],
        dt_softplus=True, initial_state=initial_state, chunk_size=8, backend="reference",
    )  # fmt: skip
    return y


def _from_zero_and_response(values: Inputs, variant: str) -> Tensor:
    steps = F.softplus(values["dt"][0] + values["dt_bias"])
    if variant == "mamba1":
        response = channel_response(steps, values["A"], values["C"][0], values["state"], chunk_size=8)
    else:
        response = head_response(steps, values["A"], values["C"][0], values["state"])
    return _scan(values, variant, None) + response


@pytest.mark.parametrize("variant", ["mamba2", "mamba1"])
@pytest.mark.parametrize("length", [1, 7, 21])
def test_zero_state_plus_response_is_the_scan_from_the_state(variant: str, length: int) -> None:
    results = []
    for form in (
        lambda values: _scan(values, variant, values["state"][None]),
        lambda values: _from_zero_and_response(values, variant),
    ):
        leaves = {name: value.clone().requires_grad_() for name, value in _inputs(length, variant).items()}
        y = form(leaves)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        results.append((y.detach(), {name: leaf.grad for name, leaf in leaves.items()}))
    assert results[0][1]["state"].abs().max() > 1e-3
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)


def test_running_sum_adds_each_row_and_those_before_it() -> None:
    values = torch.arange(14.0).view(7, 2)
    torch.testing.assert_close(running_sum(values), values.cumsum(0), rtol=0, atol=0)
