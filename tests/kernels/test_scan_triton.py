"""The Triton scan in its interpreter, against the token loop in float64: outputs and every gradient.

Half precision is float16 here: the interpreter multiplies bfloat16 matrices by their bits (seen in 3.7 and 3.9).
bfloat16 and long sequences are tested on a GPU (`test_gpu_scan_triton.py`).
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from m4v_dist.kernels import scan_triton
from m4v_dist.kernels.backend import BackendUnavailable
from m4v_dist.kernels.chunk_table import chunk_table
from m4v_dist.kernels.scan import ssd_scan
from m4v_dist.kernels.scan_reference import ssd_scan_loop
from m4v_dist.kernels.scan_triton import ssd_scan_triton
from tests.conftest import load_golden
from tests.kernels.scan_cases import NAMES, draw_inputs, outputs_and_gradients, worst_error

pytestmark = pytest.mark.skipif(not scan_triton.IS_INTERPRETED, reason="on a GPU test_gpu_scan_triton.py runs")
SOFTPLUS = {"dt_softplus": True}
TOLERANCE = 1e-4
"""Of float32, against each tensor's largest number: those of A and dt_bias are sums that nearly cancel."""


def _segments(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _both(inputs: dict[str, Tensor], dtype: torch.dtype, chunk_size: int, **options: Any) -> tuple[float, str]:
    expected = outputs_and_gradients(ssd_scan_loop, inputs, torch.float64, **options)
    return worst_error(
        outputs_and_gradients(partial(ssd_scan_triton, chunk_size=chunk_size), inputs, dtype, **options), expected
    )


@pytest.mark.parametrize(
    ("lengths", "h", "g", "p", "n", "chunk_size"),
    [
        ([1], 1, 1, 16, 16, 16),
        ([63, 65], 2, 2, 16, 16, 64),
        ([3, 130, 1], 2, 1, 8, 6, 16),  # sizes that are padded, a chunk of one token
        ([70], 4, 2, 32, 16, 32),
        ([90], 1, 1, 64, 128, 128),  # several tiles of a chunk, several tiles of a state
        ([40], 1, 1, 128, 256, 32),
    ],
)
def test_outputs_and_gradients_are_those_of_the_loop(
    lengths: list[int], h: int, g: int, p: int, n: int, chunk_size: int
) -> None:
    inputs = draw_inputs(sum(lengths), h=h, g=g, p=p, n=n, segments=len(lengths))
    error, name = _both(inputs, torch.float32, chunk_size, cu_seqlens=_segments(lengths), **SOFTPLUS)
    assert error < TOLERANCE, name


def test_half_precision_is_as_near_as_its_own_rounding() -> None:
    inputs = draw_inputs(100, h=2, g=1, p=32, n=32, segments=2, dtype=torch.float16)
    error, name = _both(inputs, torch.float16, 64, cu_seqlens=_segments([30, 70]), **SOFTPLUS)
    assert error < 2e-3, name


@pytest.mark.parametrize("case", ["ssd_scan_basic", "ssd_scan_initial_state", "ssd_scan_varlen_gated"])
def test_the_recorded_outputs_and_gradients(case: str) -> None:
    """Of mamba's own scan; in float32, within the recorded tolerance."""
    description, tensors = load_golden(case)
    config, tolerance = description["config"], description["tolerance"]["recommended"]["rel_to_max"]
    inputs = {name: tensors[f"in.{name}"] for name in NAMES if f"in.{name}" in tensors}
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    y, state = ssd_scan(
        *(leaves.get(name) for name in ("x", "dt", "A", "B", "C", "D")),  # type: ignore[arg-type]
        z=leaves.get("z"), dt_bias=leaves.get("dt_bias"), initial_state=leaves.get("initial_state"),
        dt_softplus=config["dt_bias_softplus"], chunk_size=64, backend="triton",
        cu_seqlens=_segments(config["segments"]) if config["segments"] else None,
    )  # fmt: skip
    ((y * tensors["in.grad_y"]).sum() + (state * tensors["in.grad_final_state"]).sum()).backward()
    found = {"out.y": y, "out.final_state": state} | {f"grad.{name}": leaf.grad for name, leaf in leaves.items()}
    for name, value in found.items():
        expected = tensors[name]
        limit = tolerance.get(name.removeprefix("out."), tolerance["grads"])
        assert value is not None
        assert float((value - expected).abs().max() / expected.abs().max()) < limit, name


def test_a_batch_is_scanned_row_by_row() -> None:
    inputs = draw_inputs(37, h=2, g=1, p=16, n=16, segments=2, b=2)
    error, name = _both(inputs, torch.float32, 16, **SOFTPLUS)
    assert error < TOLERANCE, name


@pytest.mark.parametrize("left_out", ["D", "z", "dt_bias", "initial_state"])
def test_what_is_optional_may_be_left_out(left_out: str) -> None:
    inputs = draw_inputs(40, h=1, g=1, p=16, n=16)
    del inputs[left_out]
    error, name = _both(inputs, torch.float32, 32, **SOFTPLUS)
    assert error < TOLERANCE, name


def test_step_sizes_are_taken_as_they_are_without_softplus() -> None:
    inputs = draw_inputs(40, h=1, g=1, p=16, n=16)
    inputs["dt"], inputs["dt_bias"] = inputs["dt"].abs() * 0.1, inputs["dt_bias"].abs() * 0.1
    error, name = _both(inputs, torch.float32, 32)
    assert error < TOLERANCE, name


def test_strong_decays_do_not_blur_the_weak_ones_after_them() -> None:
    """One sum of log decays of -4e4 in a chunk; in float32 alone its differences would be wrong by 4e-3."""
    inputs = draw_inputs(64, h=1, g=1, p=16, n=16)
    inputs["dt"] = inputs["dt"] * 0.1 - 3.0
    inputs["dt"][:, 5] = 5000.0
    inputs["A"] = torch.full_like(inputs["A"], -8.0)
    error, name = _both(inputs, torch.float32, 64, **SOFTPLUS)
    assert error < TOLERANCE, name


def test_views_into_a_wider_tensor_are_read_in_place() -> None:
    """As the mixer gives them: x, B and C are slices of one tensor, dt of another."""
    inputs = draw_inputs(50, h=2, g=1, p=16, n=16)
    wide = torch.cat([inputs[name].flatten(2) for name in ("x", "B", "C", "dt")], dim=-1).float()
    parts = wide.split([32, 16, 16, 2], dim=-1)
    views = {
        "x": parts[0].unflatten(-1, (2, 16)), "B": parts[1].unflatten(-1, (1, 16)),
        "C": parts[2].unflatten(-1, (1, 16)), "dt": parts[3],
    }  # fmt: skip
    A = inputs["A"].float()
    from_views = ssd_scan_triton(
        views["x"], views["dt"], A, views["B"], views["C"], None, dt_softplus=True, chunk_size=32
    )
    whole = {name: view.contiguous() for name, view in views.items()}
    apart = ssd_scan_triton(whole["x"], whole["dt"], A, whole["B"], whole["C"], None, dt_softplus=True, chunk_size=32)
    assert scan_triton._packed(views["x"]).data_ptr() == views["x"].data_ptr()
    for one, other in zip(from_views, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_what_is_not_finite_stays_in_its_segment() -> None:
    inputs = draw_inputs(60, h=2, g=1, p=16, n=16, segments=3)
    cu_seqlens = _segments([20, 17, 23])
    for name in ("x", "B", "C", "dt"):
        inputs[name][:, 25] = float("nan")
    leaves = {name: value.float().requires_grad_() for name, value in inputs.items()}
    y, final = ssd_scan_triton(
        *(leaves[name] for name in ("x", "dt", "A", "B", "C", "D")), dt_bias=leaves["dt_bias"], dt_softplus=True,
        cu_seqlens=cu_seqlens, initial_state=leaves["initial_state"], chunk_size=16,
    )  # fmt: skip
    (y.sum() + final.sum()).backward()
    others = torch.tensor([*range(20), *range(37, 60)])
    assert bool(y[:, others].isfinite().all()) and bool(final[[0, 2]].isfinite().all())
    assert bool(y[:, 25].isnan().all()) and bool(final[1].isnan().all())
    for name in ("x", "dt", "B", "C"):
        gradient = leaves[name].grad
        assert gradient is not None and bool(gradient[:, others].isfinite().all()), name


def test_the_same_inputs_give_the_same_bits() -> None:
    inputs = draw_inputs(50, h=4, g=1, p=16, n=16)
    once, again = (
        outputs_and_gradients(partial(ssd_scan_triton, chunk_size=32), inputs, torch.float32, **SOFTPLUS)
        for _ in range(2)
    )
    for name, value in once.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)


def test_the_op_keeps_what_torch_asks_of_one() -> None:
    """Fake tensors of the right shape, autograd registered, no argument changed."""
    values = {name: value.float() for name, value in draw_inputs(20, h=2, g=1, p=16, n=16).items()}
    arguments = (
        *(values[name].requires_grad_() for name in ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")),
        _segments([20]), True, 16,
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.m4v_dist.ssd_scan.default,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("change", "chunk_size", "message"),
    [
        ({}, 48, "chunk_size in .* but they are 48, 16 and 16"),
        ({"n": 300}, 16, "state size up to 256, but they are 16, 16 and 300"),
        ({"p": 200}, 16, "head width up to 128"),
    ],
)
def test_sizes_that_the_kernels_do_not_take_are_refused(change: dict[str, int], chunk_size: int, message: str) -> None:
    sizes = {"h": 1, "g": 1, "p": 16, "n": 16} | change
    with pytest.raises(ValueError, match=message):
        outputs_and_gradients(partial(ssd_scan_triton, chunk_size=chunk_size), draw_inputs(4, **sizes), torch.float32)


def test_float64_is_refused_and_the_reference_named() -> None:
    inputs = draw_inputs(4, h=1, g=1, p=16, n=16)
    with pytest.raises(ValueError, match="x is torch.float64.*reference_chunked"):
        outputs_and_gradients(partial(ssd_scan_triton, chunk_size=16), inputs, torch.float64)


def test_tensors_on_a_cpu_are_refused_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_triton, "IS_INTERPRETED", False)
    with pytest.raises(BackendUnavailable, match="tensors are on cpu.*launch.use_gpu=true"):
        outputs_and_gradients(
            partial(ssd_scan_triton, chunk_size=16), draw_inputs(4, h=1, g=1, p=16, n=16), torch.float32
        )


def test_chunks_never_cross_a_segment_and_cover_all_of_it() -> None:
    table = chunk_table((0, 20, 21, 53), 16, torch.device("cpu"))
    assert table.chunks.tolist() == [[0, 16], [16, 4], [20, 1], [21, 16], [37, 16]]
    assert table.first_chunks.tolist() == [0, 2, 3, 5]
    assert chunk_table((0, 20, 21, 53), 16, torch.device("cpu")) is table
