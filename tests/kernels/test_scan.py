"""The scan: both reference forms against mamba's recorded numbers, against each other, and against bad shapes."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from m4v_dist.kernels.backend import Backend, BackendUnavailable
from m4v_dist.kernels.scan import ssd_scan
from tests.conftest import load_golden

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
BUILT: tuple[Backend, ...] = ("reference", "reference_chunked")
"""Those of plain torch; `test_scan_triton.py` has the kernels."""


def _rel(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30))


def _run(inputs: dict[str, Tensor], backend: Backend, chunk_size: int = 64, **options: Any) -> tuple[Tensor, Tensor]:
    values = {name: inputs.get(name) for name in NAMES}
    return ssd_scan(
        *(values[name] for name in ("x", "dt", "A", "B", "C", "D")),  # type: ignore[arg-type]
        z=values["z"], dt_bias=values["dt_bias"], initial_state=values["initial_state"],
        chunk_size=chunk_size, backend=backend, **options,
    )  # fmt: skip


def _outputs_and_grads(
    inputs: dict[str, Tensor], grad_y: Tensor, grad_state: Tensor, backend: Backend, **options: Any
) -> dict[str, Tensor]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    y, state = _run(leaves, backend, **options)
    ((y * grad_y).sum() + (state * grad_state).sum()).backward()
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    assert all(grad is not None for grad in grads.values())
    return {"y": y.detach(), "final_state": state.detach(), **grads}  # type: ignore[dict-item]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BUILT)
@pytest.mark.parametrize("case", ["ssd_scan_basic", "ssd_scan_initial_state", "ssd_scan_varlen_gated"])
def test_scan_gives_the_recorded_outputs_and_gradients(case: str, backend: Backend, dtype: torch.dtype) -> None:
    description, tensors = load_golden(case)
    config, tolerance = description["config"], description["tolerance"]["recommended"]["rel_to_max"]
    inputs = {name: tensors[f"in.{name}"].to(dtype) for name in NAMES if f"in.{name}" in tensors}
    cu_seqlens = None
    if config["segments"]:
        cu_seqlens = torch.tensor([0, *config["segments"]]).cumsum(0).int()
    results = _outputs_and_grads(
        inputs, tensors["in.grad_y"].to(dtype), tensors["in.grad_final_state"].to(dtype), backend,
        dt_softplus=config["dt_bias_softplus"], cu_seqlens=cu_seqlens,
    )  # fmt: skip
    exact = dtype == torch.float64
    for name in ("y", "final_state"):
        assert _rel(results[name], tensors[f"out.{name}"]) < (1e-9 if exact else tolerance[name]), name
    for name in inputs:
        assert _rel(results[name], tensors[f"grad.{name}"]) < (1e-6 if exact else tolerance["grads"]), name


def _random_inputs(l: int, h: int = 4, g: int = 2, states: int = 1, b: int = 1) -> dict[str, Tensor]:
    p, n = 8, 6

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    return {
        "x": draw(b, l, h, p), "dt": draw(b, l, h), "A": -torch.rand(h, dtype=torch.float64) * 15 - 1,
        "B": draw(b, l, g, n), "C": draw(b, l, g, n), "D": draw(h), "z": draw(b, l, h, p), "dt_bias": draw(h) - 2,
        "initial_state": draw(states, h, p, n),
    }  # fmt: skip


@pytest.mark.parametrize("chunk_size", [1, 16, 64, 256])
@pytest.mark.parametrize("l", [1, 63, 64, 65, 257])
def test_chunked_equals_the_loop_at_awkward_lengths(l: int, chunk_size: int) -> None:
    inputs = _random_inputs(l, b=2, states=2)
    grad_y, grad_state = torch.randn_like(inputs["x"]), torch.randn_like(inputs["initial_state"])
    options = {"dt_softplus": True, "chunk_size": chunk_size}
    loop = _outputs_and_grads(inputs, grad_y, grad_state, "reference", **options)
    chunked = _outputs_and_grads(inputs, grad_y, grad_state, "reference_chunked", **options)
    for name, expected in loop.items():
        torch.testing.assert_close(chunked[name], expected, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("segments", [[257], [1, 1, 1], [64, 64], [1, 65, 190, 1], [3, 130, 5, 5, 63]])
def test_chunked_equals_the_loop_over_segments_with_initial_states(segments: list[int]) -> None:
    inputs = _random_inputs(sum(segments), states=len(segments))
    cu_seqlens = torch.tensor([0, *segments]).cumsum(0).int()
    grad_y, grad_state = torch.randn_like(inputs["x"]), torch.randn_like(inputs["initial_state"])
    options = {"dt_softplus": True, "cu_seqlens": cu_seqlens}
    loop = _outputs_and_grads(inputs, grad_y, grad_state, "reference", **options)
    chunked = _outputs_and_grads(inputs, grad_y, grad_state, "reference_chunked", **options)
    for name, expected in loop.items():
        torch.testing.assert_close(chunked[name], expected, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BUILT)
def test_packed_segments_equal_each_segment_alone(backend: Backend) -> None:
    lengths = [5, 70, 1, 33]
    inputs = _random_inputs(sum(lengths), states=len(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    y, states = _run(inputs, backend, chunk_size=16, dt_softplus=True, cu_seqlens=cu_seqlens)
    for number, (start, end) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
        alone = {name: v[:, start:end] if v.ndim > 1 else v for name, v in inputs.items() if name != "initial_state"}
        alone["initial_state"] = inputs["initial_state"][number : number + 1]
        y_alone, state_alone = _run(alone, backend, chunk_size=16, dt_softplus=True)
        torch.testing.assert_close(y[:, start:end], y_alone, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(states[number : number + 1], state_alone, rtol=1e-10, atol=1e-12)


def test_strong_decay_stays_finite_in_float32() -> None:
    """Log decay of -1000 within a chunk: exp of the unmasked differences would overflow, forward and backward."""
    inputs = {name: value.float() for name, value in _random_inputs(300).items()}
    inputs["dt"] = inputs["dt"] + 3
    inputs["A"] = torch.full_like(inputs["A"], -16.0)
    results = _outputs_and_grads(
        inputs, torch.ones_like(inputs["x"]), torch.ones_like(inputs["initial_state"]), "reference_chunked",
        dt_softplus=True, chunk_size=256,
    )  # fmt: skip
    assert all(value.isfinite().all() for value in results.values())


@pytest.mark.parametrize("backend", BUILT)
def test_autocast_does_not_round_the_scan(backend: Backend) -> None:
    inputs = {name: value.float() for name, value in _random_inputs(100).items()}
    plain, _ = _run(inputs, backend, dt_softplus=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, state = _run(inputs, backend, dt_softplus=True)
    assert state.dtype == torch.float32
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


def test_chunked_is_much_faster_than_the_loop() -> None:
    """The mixer's length at 128 px: a loop that crept back into the chunked form would take as long as the loop."""
    inputs = {name: value.float() for name, value in _random_inputs(800).items()}

    def seconds(backend: Backend) -> float:
        times = []
        for _ in range(3):
            start = time.process_time()
            _run(inputs, backend, dt_softplus=True)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds("reference_chunked") < seconds("reference") / 3


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda v: v[0], "x must be b l h p"),
        ("dt", lambda v: v[:, :-1], r"dt must be b l h = \(1, 10, 4\)"),
        ("A", lambda v: v[:1], r"A must be h = \(4,\)"),
        ("B", lambda v: torch.cat([v, v[:, :, :1]], 2), "4 heads a multiple of g"),
        ("C", lambda v: v[..., :-1], "C must be b l g n"),
        ("D", lambda v: v[:2], "D must be h"),
        ("z", lambda v: v[..., :1], "z must be b l h p"),
        ("dt_bias", lambda v: v[:1], "dt_bias must be h"),
        ("initial_state", lambda v: v[..., :2], "initial_state must be segments h p n"),
    ],
)
def test_bad_shapes_are_refused_with_both_shapes(name: str, change: Any, message: str) -> None:
    inputs = _random_inputs(10)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=message):
        _run(inputs, "reference_chunked")


@pytest.mark.parametrize("values", [[0, 4], [1, 10], [0, 4, 4, 10], [0, 7, 4, 10], [0]])
def test_bad_segments_are_refused(values: list[int]) -> None:
    inputs = _random_inputs(10)
    del inputs["initial_state"]
    with pytest.raises(ValueError, match="cu_seqlens must"):
        _run(inputs, "reference_chunked", cu_seqlens=torch.tensor(values, dtype=torch.int32))


def test_segments_with_a_batch_are_refused() -> None:
    inputs = _random_inputs(10, b=2)
    del inputs["initial_state"]
    with pytest.raises(ValueError, match="b must be 1, but is 2"):
        _run(inputs, "reference_chunked", cu_seqlens=torch.tensor([0, 10], dtype=torch.int32))


@pytest.mark.parametrize("backend", ["mamba_ssm"])
def test_a_backend_whose_package_is_missing_says_so_and_names_the_way_out(backend: Backend) -> None:
    with pytest.raises(BackendUnavailable, match=f'kernels.backend="{backend}".* is not installed.*reference_chunked'):
        _run(_random_inputs(10), backend)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="reference_chunked"):
        _run(_random_inputs(10), "fast")  # type: ignore[arg-type]
