"""The Mamba-1 mixer: equal to mamba's block, weights and gradients mapped by name; initial values; gates."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m4v_dist.blocks.mamba1_mixer import Mamba1Mixer
from m4v_dist.blocks.ssm_mixer import build_ssm_mixer
from m4v_dist.config.model_settings import KernelSettings, SsmSettings
from m4v_dist.model.build import initialize_weights
from tests.conftest import load_golden

NAMES = {
    "in_proj.weight": "in_proj.weight", "conv1d.weight": "conv_weight", "conv1d.bias": "conv_bias",
    "x_proj.weight": "x_proj.weight", "dt_proj.weight": "dt_proj.weight", "dt_proj.bias": "dt_bias",
    "A_log": "A_log", "D": "D", "out_proj.weight": "out_proj.weight",
}  # fmt: skip


def _ours(name: str, tensor: Tensor) -> Tensor:
    return tensor.squeeze(1) if name == "conv1d.weight" else tensor


def _golden_mixer(backend: Any) -> tuple[Mamba1Mixer, dict[str, Any], dict[str, Tensor]]:
    description, tensors = load_golden("ssd_block_mamba1")
    config = description["config"]
    settings = SsmSettings(
        variant="mamba1", expand=config["expand"], head_dim=1, state_dim=config["d_state"],
        dt_rank=tensors["w.dt_proj.weight"].shape[1], conv_width=config["d_conv"], chunk_size=16,
    )  # fmt: skip
    mixer = build_ssm_mixer(config["d_model"], settings, KernelSettings(backend=backend))
    assert isinstance(mixer, Mamba1Mixer)
    mixer.load_state_dict({ours: _ours(name, tensors[f"w.{name}"]) for name, ours in NAMES.items()}, strict=True)
    return mixer, description["tolerance"]["recommended"]["rel_to_max"], tensors


def _rel(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float(((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).detach())


@pytest.mark.parametrize("backend", ["reference", "reference_chunked"])
def test_mixer_equals_mamba_block_in_outputs_and_all_gradients(backend: str) -> None:
    mixer, tolerance, tensors = _golden_mixer(backend)
    tokens = tensors["in.u"].clone().requires_grad_()
    y = mixer(tokens)
    assert _rel(y, tensors["out.y"]) < tolerance["y"]
    y.backward(tensors["in.grad_out"])
    grads = {name: dict(mixer.named_parameters())[ours].grad for name, ours in NAMES.items()} | {"u": tokens.grad}
    assert set(grads) == {name.removeprefix("grad.") for name in tensors if name.startswith("grad.")}
    for name, grad in grads.items():
        assert grad is not None
        assert _rel(grad, _ours(name, tensors[f"grad.{name}"])) < tolerance["grads"], name


@pytest.mark.parametrize("backend", ["reference", "reference_chunked"])
def test_packed_segments_equal_mamba_on_each_alone(backend: str) -> None:
    mixer, tolerance, tensors = _golden_mixer(backend)
    y = mixer(tensors["in.packed_u"], cu_seqlens=tensors["in.packed_cu_seqlens"].int())
    assert _rel(y, tensors["out.packed_y"]) < tolerance["y"]


def _fresh(**options: Any) -> Mamba1Mixer:
    settings = SsmSettings(**{"variant": "mamba1", "head_dim": 1, "state_dim": 4, "dt_rank": 4} | options)
    mixer = Mamba1Mixer(64, settings, KernelSettings())
    initialize_weights(mixer, seed=0)
    return mixer


def test_initial_values_are_those_of_mamba() -> None:
    mixer = _fresh()
    dt = F.softplus(mixer.dt_bias)
    torch.testing.assert_close(mixer.A_log.exp(), torch.tensor([1.0, 2, 3, 4]).expand(128, 4))
    assert 1e-3 * 0.999 < dt.min() < 0.01 < dt.max() < 0.1 * 1.001
    assert 0.4 < mixer.dt_proj.weight.abs().max() <= 0.5
    assert torch.all(mixer.D == 1)


def test_the_sum_gate_adds_what_the_silu_gate_multiplies() -> None:
    """out_proj is linear, so the gated parts can be told apart by their z alone."""
    tokens = torch.randn(1, 5, 64)
    by_gate = {}
    for gate in ("silu", "sum"):
        mixer = _fresh(gate=gate)
        z = tokens @ mixer.in_proj.weight[mixer.rows["z"]].T
        with_z = mixer(tokens)
        with torch.no_grad():
            mixer.in_proj.weight[mixer.rows["z"]] = 0
        by_gate[gate] = (with_z, mixer(tokens), mixer.out_proj(z))
    with_z, without_z, of_z = by_gate["sum"]
    torch.testing.assert_close(with_z - without_z, of_z, rtol=1e-4, atol=1e-5)
    assert torch.count_nonzero(by_gate["silu"][1]) == 0
    assert torch.count_nonzero(by_gate["silu"][0]) > 0


def test_mixer_is_causal() -> None:
    mixer, tokens = _fresh(), torch.randn(1, 40, 64)
    changed = tokens.clone()
    changed[:, 20] += 1
    before, after = mixer(tokens), mixer(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().amax(dim=(0, 2)).min() > 0
