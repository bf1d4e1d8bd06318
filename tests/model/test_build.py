"""Building: weights by seed and name, float32, nothing left unwritten, and a refusal before the first step."""

from typing import Any, get_args

import pytest
import torch

from m4v_dist.config.model_settings import Ablation, KernelSettings, ModelSettings
from m4v_dist.errors import ConfigError
from m4v_dist.model.build import build_model, build_on_meta, model_parts

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


@pytest.mark.parametrize("variant", ["mamba2", "mil", "mamba1"])
@pytest.mark.parametrize("preset", ["tiny", "small", "m4v_2b"])
def test_every_preset_builds_with_every_mixer_and_variant(preset: Any, variant: str) -> None:
    mixers = get_args(ModelSettings.model_fields["mixer"].annotation)
    sizes = {}
    for mixer in mixers:
        settings = ModelSettings(preset=preset, mixer=mixer, ssm={"variant": variant})
        model = build_on_meta(settings, KERNELS)
        sizes[mixer] = sum(parameter.numel() for parameter in model.parameters())
        kinds = tuple(type(block.mixer).__name__ for block in model.single_blocks)
        names = {"attention": "AttentionMixer", "ssm": "SsmTokenMixer", "parallel": "ParallelMixer"}
        assert kinds == tuple(names[kind] for kind in settings.block_mixers)
    assert len(mixers) == 6
    # Half of the blocks of one kind, half of the other, wherever they stand.
    halves = {2 * sizes[mixer] for mixer in ("post_half", "pre_half", "interleaved")}
    assert halves == {sizes["attention"] + sizes["ssm"]}


@pytest.mark.parametrize("ablation", get_args(Ablation))
def test_every_ablation_row_builds(ablation: Any) -> None:
    model = build_on_meta(ModelSettings(ablation=ablation), KERNELS)
    has_branch = [block.temporal_branch is not None for block in model.single_blocks]  # type: ignore[union-attr]
    rows_with_one = {"full_mamba_temporal": 8, "text_vision_temporal": 8, "post_half": 4, "pre_half": 4}
    assert sum(has_branch) == {**rows_with_one, "interleaved": 4}.get(ablation, 0)


@pytest.mark.parametrize(("variant", "billions"), [("mamba2", 2.16), ("mil", 2.03), ("mamba1", 2.17)])
def test_full_size_models_have_the_parameters_worked_out_for_them(variant: str, billions: float) -> None:
    """Without temporal branch, which has 63M, and registers, 92k; miniFLUX has 1.97B."""
    settings = ModelSettings(
        preset="m4v_2b", ssm={"variant": variant}, has_temporal_branch=False, has_registers=False
    )  # fmt: skip
    model = build_on_meta(settings, KERNELS)
    assert abs(sum(parameter.numel() for parameter in model.parameters()) / 1e9 - billions) < 0.005


def test_a_backend_that_cannot_run_is_refused_before_the_model_is_built() -> None:
    with pytest.raises(ConfigError, match='kernels.backend="mamba_ssm"'):
        build_on_meta(ModelSettings(), KernelSettings(backend="mamba_ssm"))
    with pytest.raises(ConfigError, match='kernels.backend="mamba_ssm"'):
        build_on_meta(ModelSettings(mixer="interleaved"), KernelSettings(backend="mamba_ssm"))
    build_on_meta(ModelSettings(mixer="attention"), KernelSettings(backend="mamba_ssm"))


def test_parts_hold_each_parameter_once_and_get_memory_one_after_the_other() -> None:
    settings = ModelSettings(num_single_blocks=2, mixer="parallel", **SMALL)
    names = [
        f"{name}.{own}" for name, part in model_parts(build_on_meta(settings, KERNELS)) for own in part.state_dict()
    ]
    placed: list[str] = []

    def place(name: str, part: torch.nn.Module) -> None:
        for own, tensor in part.state_dict().items():
            assert tensor.isfinite().all(), f"{name}.{own} has no weights yet"
            tensor.fill_(len(placed))
        placed.append(name)

    model = build_model(settings, KERNELS, seed=1, place=place)
    assert sorted(names) == sorted(model.state_dict())
    for number, (name, part) in enumerate(model_parts(model)):
        assert placed[number] == name
        assert all((tensor == number).all() for tensor in part.state_dict().values()), "a later part drew it anew"
