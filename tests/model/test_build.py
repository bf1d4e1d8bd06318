"""Building: weights by seed and name, float32, nothing left unwritten, and a refusal before the first step."""

import pytest
import torch

from m4v_dist.config.schema import KernelSettings, ModelSettings
from m4v_dist.errors import ConfigError
from m4v_dist.model.build import build_model, build_on_meta

KERNELS = KernelSettings()
SMALL = {"num_double_blocks": 1, "temporal_width": 16, "temporal_heads": 2}


def test_equal_seeds_give_equal_weights_and_another_seed_does_not() -> None:
    settings = ModelSettings(num_single_blocks=1, **SMALL)
    first, again, other = (build_model(settings, KERNELS, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = {name for name in first if first[name].ndim == 2 and first[name].abs().max() > 0}
    assert drawn and not any(torch.equal(first[name], other[name]) for name in drawn)


def test_a_block_is_the_same_in_a_deeper_model() -> None:
    shallow, deep = (
        build_model(ModelSettings(num_single_blocks=n, **SMALL), KERNELS, seed=1).state_dict() for n in (1, 3)
    )
    assert all(torch.equal(tensor, deep[name]) for name, tensor in shallow.items())


def test_all_weights_are_finite_float32_and_blocks_start_closed() -> None:
    """Fresh memory is NaN in the tests, so a parameter that nobody initialises shows."""
    model = build_model(ModelSettings(num_single_blocks=2, mixer="parallel", **SMALL), KERNELS, seed=1)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.isfinite().all(), name
        if "modulation" in name or name.startswith("video_out") or "temporal_branch.to_out" in name:
            assert torch.count_nonzero(parameter) == 0, name
    registers = model.single_blocks[1].mixer.ssm.registers  # type: ignore[union-attr, index]
    assert 0.015 < registers.std() < 0.025


@pytest.mark.parametrize(
    ("preset", "low", "high"), [("tiny", 4e6, 7e6), ("small", 8e7, 1.4e8), ("m4v_2b", 2.1e9, 2.3e9)]
)
def test_presets_have_the_sizes_they_promise(preset: str, low: float, high: float) -> None:
    model = build_on_meta(ModelSettings(preset=preset), KERNELS)
    assert low < sum(parameter.numel() for parameter in model.parameters()) < high


def test_a_backend_that_cannot_run_is_refused_before_the_model_is_built() -> None:
    with pytest.raises(ConfigError, match='kernels.backend="triton"'):
        build_on_meta(ModelSettings(), KernelSettings(backend="triton"))
    build_on_meta(ModelSettings(mixer="attention"), KernelSettings(backend="triton"))
