"""The Mamba-2 mixer: equal to mamba's blocks, weights and gradients mapped by name; initial values; gates."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m4v_dist.blocks.mamba1_mixer import Mamba1Mixer
from m4v_dist.blocks.ssm_mixer import MilMixer, SsmMixer, build_ssm_mixer
from m4v_dist.config.model_settings import KernelSettings, ModelSettings, SsmSettings
from m4v_dist.model.build import initialize_weights
from tests.conftest import load_golden

NAMES = {
    "in_proj.weight": "in_proj.weight", "conv1d.weight": "conv_weight", "conv1d.bias": "conv_bias", "A_log": "A_log",
    "dt_bias": "dt_bias", "D": "D", "norm.weight": "norm_weight", "out_proj.weight": "out_proj.weight",
}  # fmt: skip

INTERPRETED = pytest.param(
    "triton",
    marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there Triton compiles, and wants a GPU's tensors"),
)


def _ours(name: str, tensor: Tensor) -> Tensor:
    return tensor.squeeze(1) if name == "conv1d.weight" else tensor


def _mixer(config: dict[str, Any], tensors: dict[str, Tensor], backend: Any) -> SsmMixer:
    settings = SsmSettings(
        expand=config["expand"], head_dim=config["headdim"], state_dim=config["d_state"],
        num_groups=config["ngroups"], conv_width=config["d_conv"], chunk_size=config["chunk_size"],
    )  # fmt: skip
    mixer = SsmMixer(config["d_model"], settings, KernelSettings(backend=backend))
    mixer.load_state_dict({ours: _ours(name, tensors[f"w.{name}"]) for name, ours in NAMES.items()}, strict=True)
    return mixer


def _rel(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float(((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).detach())


@pytest.mark.parametrize("backend", ["reference", "reference_chunked", INTERPRETED])
@pytest.mark.parametrize("case", ["ssd_block_mamba2_simple", "ssd_block_mamba2"])
def test_mixer_equals_mamba_block_in_outputs_and_all_gradients(case: str, backend: str) -> None:
    description, tensors = load_golden(case)
    config, tolerance = description["config"], description["tolerance"]["recommended"]["rel_to_max"]
    mixer = _mixer(config, tensors, backend)
    tokens = tensors["in.u"].clone().requires_grad_()
    state = tensors["w.init_states"].requires_grad_() if "w.init_states" in tensors else None
    initial = None if state is None else state.expand(config["batch"], *state.shape)
    y = mixer(tokens, initial_state=initial)
    assert _rel(y, tensors["out.y"]) < tolerance["y"]
    y.backward(tensors["in.grad_out"])
    grads = {name: dict(mixer.named_parameters())[ours].grad for name, ours in NAMES.items()}
    grads |= {"u": tokens.grad} | ({} if state is None else {"init_states": state.grad})
    assert set(grads) == {name.removeprefix("grad.") for name in tensors if name.startswith("grad.")}
    for name, grad in grads.items():
        assert grad is not None
        assert _rel(grad, _ours(name, tensors[f"grad.{name}"])) < tolerance["grads"], name


@pytest.mark.parametrize("case", ["ssd_block_mamba2_simple", "ssd_block_mamba2"])
def test_packed_segments_equal_mamba_on_each_alone(case: str) -> None:
    description, tensors = load_golden(case)
    mixer = _mixer(description["config"], tensors, "reference_chunked")
    state, segments = tensors.get("w.init_states"), description["config"]["segments"]
    initial = None if state is None else state.expand(len(segments), *state.shape)
    y = mixer(tensors["in.packed_u"], cu_seqlens=tensors["in.packed_cu_seqlens"].int(), initial_state=initial)
    assert _rel(y, tensors["out.packed_y"]) < description["tolerance"]["recommended"]["rel_to_max"]["y"]


def _fresh(**options: Any) -> SsmMixer:
    settings = SsmSettings(**{"expand": 2, "head_dim": 8, "state_dim": 4, "chunk_size": 16, **options})
    mixer = SsmMixer(64, settings, KernelSettings())
    initialize_weights(mixer, seed=0)
    return mixer


def test_initial_values_are_those_of_mamba() -> None:
    mixer = _fresh()
    A, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert 1 <= A.min() < 4 and 12 < A.max() <= 16
    assert 1e-3 * 0.999 < dt.min() < 0.01 < dt.max() < 0.1 * 1.001
    assert torch.all(mixer.D == 1) and torch.all(mixer.norm_weight == 1)


def test_the_sum_gate_adds_what_the_silu_gate_multiplies() -> None:
    mixer = _fresh(gate="sum")
    y, z = torch.randn(1, 5, 128), torch.randn(1, 5, 128)
    merged = y + z
    expected = merged * merged.square().mean(-1, keepdim=True).add(1e-5).rsqrt()
    torch.testing.assert_close(mixer._gated_norm(y, z), expected)
    assert (_fresh()._gated_norm(y, z) - expected).abs().max() > 0.1


def test_mixer_is_causal() -> None:
    mixer, tokens = _fresh(), torch.randn(1, 40, 64)
    changed = tokens.clone()
    changed[:, 20] += 1
    before, after = mixer(tokens), mixer(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().amax(dim=(0, 2)).min() > 0


@pytest.mark.parametrize(("variant", "kind"), [("mamba2", SsmMixer), ("mil", MilMixer), ("mamba1", Mamba1Mixer)])
def test_a_variant_is_never_built_as_another(variant: str, kind: type) -> None:
    settings = ModelSettings(ssm={"variant": variant})
    assert type(build_ssm_mixer(settings.hidden_size, settings.ssm, KernelSettings())) is kind


@pytest.mark.parametrize(("variant", "millions"), [("mamba2", 22.75), ("mil", 14.83), ("mamba1", 23.25)])
def test_a_full_width_mixer_has_the_parameters_worked_out_for_it(variant: str, millions: float) -> None:
    """Within 0.1%: mil's biases and norms, 7,838 of them, were not counted in its figure."""
    settings = ModelSettings(preset="m4v_2b", ssm={"variant": variant})
    with torch.device("meta"):
        mixer = build_ssm_mixer(settings.hidden_size, settings.ssm, KernelSettings())
    count = sum(parameter.numel() for parameter in mixer.parameters())
    assert abs(count / 1e6 / millions - 1) < 1e-3
