"""The selective scan: both forms against mamba's recorded numbers, against each other, and against bad shapes."""

import time
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from m4v_dist.kernels.backend import Backend, BackendUnavailable
from m4v_dist.kernels.selective_scan import require_selective_backend, selective_scan
from tests.conftest import load_golden

NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
BUILT: tuple[Backend, ...] = ("reference", "reference_chunked")


def _rel(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30))


def _run(inputs: dict[str, Tensor], backend: Backend, chunk_size: int = 16, **options: Any) -> tuple[Tensor, Tensor]:
    values = {name: inputs.get(name) for name in NAMES}
    return selective_scan(
        *(values[name] for name in ("u", "dt", "A", "B", "C", "D")),  # type: ignore[arg-type]
        z=values["z"], dt_bias=values["dt_bias"], initial_state=values["initial_state"], dt_softplus=True,
        chunk_size=chunk_size, backend=backend, **options,
    )  # fmt: skip


def _outputs_and_grads(
    inputs: dict[str, Tensor], grad_y: Tensor, grad_state: Tensor | None, backend: Backend, **options: Any
) -> dict[str, Tensor]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    y, state = _run(leaves, backend, **options)
    ((y * grad_y).sum() + (0 if grad_state is None else (state * grad_state).sum())).backward()
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    assert all(grad is not None for grad in grads.values())
    return {"y": y.detach(), "final_state": state.detach(), **grads}  # type: ignore[dict-item]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BUILT)
def test_scan_gives_the_recorded_outputs_and_gradients(backend: Backend, dtype: torch.dtype) -> None:
    description, tensors = load_golden("ssd_mamba1_selective_scan")
    tolerance = description["tolerance"]["recommended"]["rel_to_max"]
    theirs = {"dt": "delta", "dt_bias": "delta_bias"}

    def ours(prefix: str, name: str) -> Tensor:
        tensor = tensors[f"{prefix}.{theirs.get(name, name)}"]
        return tensor.transpose(1, 2).contiguous() if tensor.ndim == 3 and name != "final_state" else tensor  # b l .

    inputs = {name: ours("in", name).to(dtype) for name in NAMES if f"in.{theirs.get(name, name)}" in tensors}
    results = _outputs_and_grads(inputs, ours("in", "grad_y").to(dtype), None, backend)
    exact = dtype == torch.float64
    for name in ("y", "final_state"):
        assert _rel(results[name], ours("out", name)) < (1e-9 if exact else tolerance["y"]), name
    assert set(inputs) == set(NAMES) - {"initial_state"}
    for name in inputs:
        assert _rel(results[name], ours("grad", name)) < (1e-6 if exact else tolerance["grads"]), name


def _random_inputs(l: int, states: int = 1, b: int = 1) -> dict[str, Tensor]:
    d, n = 6, 5

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    return {
        "u": draw(b, l, d), "dt": draw(b, l, d), "A": -torch.rand(d, n, dtype=torch.float64) * 15 - 1,
        "B": draw(b, l, n), "C": draw(b, l, n), "D": draw(d), "z": draw(b, l, d), "dt_bias": draw(d) - 2,
        "initial_state": draw(states, d, n),
    }  # fmt: skip


def _forms_agree(inputs: dict[str, Tensor], **options: Any) -> None:
    grad_y, grad_state = torch.randn_like(inputs["u"]), torch.randn_like(inputs["initial_state"])
    loop = _outputs_and_grads(inputs, grad_y, grad_state, "reference", **options)
    chunked = _outputs_and_grads(inputs, grad_y, grad_state, "reference_chunked", **options)
    for name, expected in loop.items():
        torch.testing.assert_close(chunked[name], expected, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 256])
@pytest.mark.parametrize("l", [1, 15, 16, 17, 65])
def test_chunked_equals_the_loop_at_awkward_lengths(l: int, chunk_size: int) -> None:
    _forms_agree(_random_inputs(l, b=2, states=2), chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [8, 64, 256])
@pytest.mark.parametrize("segments", [[70], [1, 1, 1], [16, 16], [1, 33, 40, 1], [3, 50, 5, 5, 9]])
def test_chunked_equals_the_loop_over_segments_with_initial_states(segments: list[int], chunk_size: int) -> None:
    cu_seqlens = torch.tensor([0, *segments]).cumsum(0).int()
    _forms_agree(_random_inputs(sum(segments), states=len(segments)), cu_seqlens=cu_seqlens, chunk_size=chunk_size)


@pytest.mark.parametrize("backend", BUILT)
def test_packed_segments_equal_each_segment_alone(backend: Backend) -> None:
    lengths = [5, 40, 1, 23]
    inputs = _random_inputs(sum(lengths), states=len(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    y, states = _run(inputs, backend, cu_seqlens=cu_seqlens)
    for number, (start, end) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
        alone = {name: v[:, start:end] if v.ndim > 2 else v for name, v in inputs.items() if name != "initial_state"}
        alone["initial_state"] = inputs["initial_state"][number : number + 1]
        y_alone, state_alone = _run(alone, backend)
        torch.testing.assert_close(y[:, start:end], y_alone, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(states[number : number + 1], state_alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BUILT)
def test_a_segment_moves_nothing_and_pulls_no_gradient_outside_itself(backend: Backend) -> None:
    inputs = _random_inputs(60, states=3)
    cu_seqlens = torch.tensor([0, 20, 45, 60], dtype=torch.int32)
    before, _ = _run(inputs, backend, cu_seqlens=cu_seqlens)
    changed = {name: v.clone() for name, v in inputs.items()}
    for name in ("u", "dt", "B", "C", "z"):
        changed[name][:, 20:45] += 1
    changed["initial_state"][1] += 1
    after, _ = _run(changed, backend, cu_seqlens=cu_seqlens)
    assert torch.equal(before[:, :20], after[:, :20]) and torch.equal(before[:, 45:], after[:, 45:])
    leaf = inputs["u"].clone().requires_grad_()
    _run({**inputs, "u": leaf}, backend, cu_seqlens=cu_seqlens)[0][:, 20:45].sum().backward()
    assert leaf.grad is not None
    assert torch.count_nonzero(leaf.grad[:, :20]) == torch.count_nonzero(leaf.grad[:, 45:]) == 0


def test_strong_decay_stays_finite_in_float32() -> None:
    """Sums of log decay reach -1000 within a chunk: a form that divides by a decay would overflow."""
    inputs = {name: value.float() for name, value in _random_inputs(200).items()}
    inputs["dt"] = inputs["dt"] + 5
    inputs["A"] = torch.full_like(inputs["A"], -16.0)
    results = _outputs_and_grads(
        inputs, torch.ones_like(inputs["u"]), torch.ones_like(inputs["initial_state"]), "reference_chunked",
        chunk_size=256,
    )  # fmt: skip
    assert all(value.isfinite().all() for value in results.values())


@pytest.mark.parametrize("backend", BUILT)
def test_autocast_does_not_round_the_scan(backend: Backend) -> None:
    inputs = {name: value.float() for name, value in _random_inputs(50).items()}
    plain = _outputs_and_grads(inputs, torch.ones_like(inputs["u"]), None, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = _outputs_and_grads(inputs, torch.ones_like(inputs["u"]), None, backend)
    assert cast["final_state"].dtype == torch.float32
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)


def test_chunked_is_faster_than_the_loop() -> None:
    inputs = {name: value.float() for name, value in _random_inputs(800).items()}

    def seconds(backend: Backend) -> float:
        times = []
        for _ in range(3):
            start = time.process_time()
            _run(inputs, backend, chunk_size=256)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds("reference_chunked") < seconds("reference") / 2


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("u", lambda v: v[0], "u must be b l d"),
        ("u", lambda v: v[:, :0], "at least one token"),
        ("dt", lambda v: v[:, :-1], r"dt must be b l d = \(1, 10, 6\)"),
        ("A", lambda v: v[:1], "A must be d n with d=6"),
        ("B", lambda v: v[..., :-1], r"B must be b l n = \(1, 10, 5\)"),
        ("C", lambda v: v[:, :-1], "C must be b l n"),
        ("D", lambda v: v[:2], "D must be d"),
        ("z", lambda v: v[..., :1], "z must be b l d"),
        ("dt_bias", lambda v: v[:1], "dt_bias must be d"),
        ("initial_state", lambda v: v[..., :2], "initial_state must be segments d n"),
    ],
)
def test_bad_shapes_are_refused_with_both_shapes(name: str, change: Any, message: str) -> None:
    inputs = _random_inputs(10)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=message):
        _run(inputs, "reference_chunked")


def test_bad_segments_are_refused() -> None:
    inputs = _random_inputs(10)
    del inputs["initial_state"]
    with pytest.raises(ValueError, match="selective_scan: cu_seqlens must rise from 0 to l=10"):
        _run(inputs, "reference", cu_seqlens=torch.tensor([0, 4], dtype=torch.int32))


def test_the_chunked_form_keeps_the_states_of_no_chunk_for_backward() -> None:
    """They are computed again; a view of a chunk's last state would keep them all the same."""
    inputs = {name: value.requires_grad_() for name, value in _random_inputs(512).items()}
    largest = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = _run(inputs, "reference_chunked", chunk_size=256)
    assert y.requires_grad
    channels, states = inputs["A"].shape
    assert largest < 8 * 256 * channels * states


@pytest.mark.parametrize("backend", sorted(set(get_args(Backend)) - set(BUILT)))
def test_a_backend_without_this_scan_says_so_and_names_the_way_out(backend: Backend) -> None:
    with pytest.raises(BackendUnavailable, match=f'kernels.backend="{backend}".*reference_chunked'):
        require_selective_backend(backend)
    with pytest.raises(BackendUnavailable, match=f'kernels.backend="{backend}".*reference_chunked'):
        _run(_random_inputs(10), backend)
