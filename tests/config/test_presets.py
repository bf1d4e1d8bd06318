"""Presets, ablation rows and SSM variants: one word fills in a working section, and nothing contradicts its name."""

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from m4v_dist.config.load import config_from_json, config_to_json, parse_config
from m4v_dist.config.model_settings import Ablation, ModelSettings
from m4v_dist.config.presets import ABLATIONS, MODEL_PRESETS
from m4v_dist.errors import ConfigError
from tests.config.run_values import run_values


def _model(**values: Any) -> ModelSettings:
    """The section through the door that a run's file takes."""
    return parse_config(run_values() | {"model": values}, "run.toml").model


@pytest.mark.parametrize("preset", MODEL_PRESETS)
def test_a_variant_alone_fills_in_its_sizes(preset: str) -> None:
    base = _model(preset=preset)
    mil = _model(preset=preset, ssm={"variant": "mil"})
    sizes = (mil.ssm.expand, mil.ssm.head_dim, mil.ssm.state_dim, mil.ssm.num_groups, mil.ssm.dt_rank)
    assert sizes == (1, base.head_dim, base.head_dim, base.num_heads, 0)
    assert mil.ssm_num_heads == base.num_heads
    mamba1 = _model(preset=preset, ssm={"variant": "mamba1"})
    sizes = (mamba1.ssm.expand, mamba1.ssm.head_dim, mamba1.ssm.state_dim, mamba1.ssm.num_groups, mamba1.ssm.dt_rank)
    assert sizes == (2, 1, 16, 1, {"tiny": 8, "small": 32, "m4v_2b": 120}[preset])
    assert mil.ssm.chunk_size == mamba1.ssm.chunk_size == base.ssm.chunk_size


def test_a_variant_follows_widths_and_keys_of_the_file() -> None:
    model = _model(hidden_size=192, num_heads=3, ssm={"variant": "mil", "chunk_size": 32})
    assert (model.ssm.num_groups, model.ssm.head_dim, model.ssm.chunk_size) == (3, 64, 32)
    model = _model(hidden_size=200, num_heads=1, rope_axes=(100, 50, 50), ssm={"variant": "mamba1", "state_dim": 8})
    assert (model.ssm.dt_rank, model.ssm.state_dim) == (13, 8)


@pytest.mark.parametrize(
    ("ssm", "words"),
    [
        ({"variant": "mil", "state_dim": 32}, "ssm.state_dim=32 (it has 64)"),
        ({"variant": "mil", "expand": 2}, "ssm.expand=2 (it has 1)"),
        ({"variant": "mil", "num_groups": 1}, "ssm.num_groups=1 (it has 2)"),
        ({"variant": "mamba1", "head_dim": 64}, "ssm.head_dim=64 (it has 1)"),
        ({"variant": "mamba1", "dt_rank": 0}, "ssm.dt_rank=0 (only mamba1 has one, above 0)"),
        ({"dt_rank": 8}, "ssm.dt_rank=8 (only mamba1 has one, above 0)"),
    ],
)
def test_a_size_that_is_not_the_variants_is_refused(ssm: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _model(ssm=ssm)
    assert words in str(caught.value) and "leave these keys out" in str(caught.value)


@pytest.mark.parametrize(("heads", "width", "axes"), [(3, 24, (8, 8, 8)), (3, 40, (16, 12, 12)), (5, 24, (4, 8, 12))])
def test_widths_that_no_ssm_can_have_are_refused_only_where_a_block_has_one(
    heads: int, width: int, axes: tuple[int, int, int]
) -> None:
    sizes = {"hidden_size": heads * width, "num_heads": heads, "rope_axes": axes}
    assert _model(**sizes, mixer="attention").head_dim == width
    assert _model(**sizes, mixer="ssm", num_single_blocks=0).head_dim == width
    for mixer in ("ssm", "parallel", "post_half", "pre_half", "interleaved"):
        with pytest.raises(ConfigError, match=rf"{2 * heads * width} is no multiple of ssm.head_dim=32"):
            _model(**sizes, mixer=mixer)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"ssm": {"num_groups": 3}}, "8 SSM heads cannot share ssm.num_groups=3 evenly"),
        ({"temporal_heads": 3}, "temporal_width=64 is no multiple of 3 heads"),
    ],
)
def test_groups_and_temporal_heads_are_checked_only_where_they_are_used(sizes: dict[str, Any], words: str) -> None:
    assert _model(**sizes, mixer="attention").mixer == "attention"
    with pytest.raises(ConfigError, match=words):
        _model(**sizes)
    if "temporal_heads" in sizes:
        assert _model(**sizes, has_temporal_branch=False).temporal_heads == 3


@pytest.mark.parametrize("axes", [(11, 11, 10), (-2, 42, 24)])
def test_rotary_widths_that_are_no_pairs_are_refused_with_the_widths(axes: tuple[int, int, int]) -> None:
    heads, width = (4, 32) if sum(axes) == 32 else (2, 64)
    with pytest.raises(ConfigError) as caught:
        _model(hidden_size=heads * width, num_heads=heads, rope_axes=axes)
    assert f"rope_axes={axes} must be even widths" in str(caught.value)


def test_an_unknown_variant_or_a_width_of_the_wrong_kind_is_refused_by_its_own_name() -> None:
    with pytest.raises(ConfigError, match=r"model\.ssm\.variant: 'mamba' is not a choice; did you mean 'mamba[12]'"):
        _model(ssm={"variant": "mamba"})
    for width in ("wide", 0, [128]):
        with pytest.raises(ConfigError, match=r"model\.hidden_size"):
            _model(hidden_size=width, ssm={"variant": "mil"})


@pytest.mark.parametrize(
    ("mixer", "count", "expected"),
    [
        ("attention", 3, "aaa"), ("ssm", 3, "sss"), ("parallel", 2, "pp"),
        ("post_half", 4, "aass"), ("pre_half", 4, "ssaa"), ("interleaved", 4, "asas"),
        ("post_half", 5, "aasss"), ("pre_half", 5, "sssaa"), ("interleaved", 5, "asasa"),
    ],
)  # fmt: skip
def test_block_mixers_are_what_the_mixer_says(mixer: str, count: int, expected: str) -> None:
    model = _model(mixer=mixer, num_single_blocks=count)
    assert "".join(name[0] for name in model.block_mixers) == expected


def test_a_hybrid_of_one_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="mixer='interleaved' needs at least 2 unified blocks"):
        _model(mixer="interleaved", num_single_blocks=1)


def test_the_schema_names_every_row_of_the_table() -> None:
    assert set(get_args(Ablation)) == set(ABLATIONS)


def test_each_row_sets_what_the_papers_tables_say() -> None:
    switches = {}
    for name in ABLATIONS:
        model = _model(ablation=name)
        assert model.has_registers == (model.num_zigzag_paths == 8)
        switches[name] = (model.mixer, model.has_text_sandwich, model.has_registers, model.has_temporal_branch)
    assert switches == {
        "full_attention": ("attention", True, True, False),
        "parallel": ("parallel", True, True, False),
        "full_mamba": ("ssm", True, True, False),
        "full_mamba_temporal": ("ssm", True, True, True),
        "no_components": ("ssm", False, False, False),
        "text": ("ssm", True, False, False),
        "vision": ("ssm", False, True, False),
        "text_vision": ("ssm", True, True, False),
        "text_vision_temporal": ("ssm", True, True, True),
        "post_half": ("post_half", True, True, True),
        "pre_half": ("pre_half", True, True, True),
        "interleaved": ("interleaved", True, True, True),
    }


def test_a_key_that_contradicts_the_ablation_is_refused_and_one_that_agrees_is_not() -> None:
    with pytest.raises(ConfigError) as caught:
        _model(ablation="text", mixer="attention", has_registers=True, has_text_sandwich=True)
    words = "ablation='text' is contradicted by mixer='attention' (the row has 'ssm'), has_registers=True"
    assert words in str(caught.value) and "has_text_sandwich" not in str(caught.value)
    assert _model(ablation="text", mixer="ssm").mixer == "ssm"


def test_a_wrong_ablation_lists_the_rows() -> None:
    with pytest.raises(ConfigError, match="'full_mamba_tempral' is not a choice; did you mean 'full_mamba_temporal'"):
        _model(ablation="full_mamba_tempral")
    with pytest.raises(ValidationError):
        ModelSettings(ablation=["text"])  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", ["mil", "mamba1"])
def test_a_resolved_row_and_variant_survive_json(variant: str) -> None:
    values = run_values() | {"model": {"preset": "small", "ablation": "interleaved", "ssm": {"variant": variant}}}
    config = parse_config(values, "test")
    assert config_from_json(config_to_json(config)) == config
