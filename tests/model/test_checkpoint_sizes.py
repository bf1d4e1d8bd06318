"""Sizes that names and shapes of a checkpoint show: each that differs is named once, by its setting."""

import re
from typing import Any

import pytest

from m4v_dist.config.model_settings import KernelSettings, ModelSettings
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.model.build import build_on_meta
from m4v_dist.model.checkpoint_names import to_pyramidflow_name
from m4v_dist.model.checkpoint_sizes import check_sizes
from m4v_dist.weights_file import TensorLayout


def _settings(**changed: Any) -> ModelSettings:
    sizes = {"num_double_blocks": 1, "num_single_blocks": 2, "mixer": "attention", "has_temporal_branch": False}
    return ModelSettings.model_validate(sizes | changed)


def _layout(settings: ModelSettings) -> dict[str, TensorLayout]:
    wanted = build_on_meta(settings, KernelSettings()).state_dict()
    return {to_pyramidflow_name(name): TensorLayout(tuple(tensor.shape), "float32") for name, tensor in wanted.items()}


def test_a_checkpoint_of_the_same_sizes_passes_whatever_the_mixer() -> None:
    check_sizes("made", _layout(_settings()), _settings())
    check_sizes("made", _layout(_settings()), _settings(mixer="ssm"))
    check_sizes("made", {}, _settings())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_single_blocks": 1}, "the checkpoint has 2 single blocks, model.num_single_blocks=1"),
        ({"num_double_blocks": 3}, "the checkpoint has 1 double blocks, model.num_double_blocks=3"),
        ({"text_width": 4096}, "context_embedder.weight is 384 wide, model.text_width=4096"),
        ({"pooled_width": 768}, "text_embedder.linear_1.weight is 384 wide, model.pooled_width=768"),
        ({"latent_channels": 4}, "x_embedder.weight is 64 wide, model.latent_channels * patch_size^2=16"),
        ({"hidden_size": 256, "num_heads": 4}, "x_embedder.bias is 128 wide, model.hidden_size=256"),
        (
            {"num_heads": 4, "rope_axes": (8, 12, 12)},
            "attn.norm_q.weight is 64 wide, model.hidden_size / num_heads=32",
        ),
    ],
)
def test_a_size_that_differs_is_named_by_its_setting_with_both_numbers(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"made: is the checkpoint of another model .*{re.escape(words)}"):
        check_sizes("made", _layout(_settings()), _settings(**changed))


def test_all_sizes_that_differ_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"2 single blocks, model.num_single_blocks=1; .*model.text_width=4096\. Set"):
        check_sizes("made", _layout(_settings()), _settings(num_single_blocks=1, text_width=4096))


def test_blocks_with_a_gap_are_no_size_and_left_to_the_strict_comparison() -> None:
    layout = {name: item for name, item in _layout(_settings(num_single_blocks=4)).items() if "blocks.2." not in name}
    check_sizes("made", layout, _settings())


@pytest.mark.parametrize("renamed", [("single_transformer_blocks", "joint_blocks"), ("x_embedder", "pos_embed.proj")])
def test_the_sd3_variant_is_told_apart_by_its_names(renamed: tuple[str, str]) -> None:
    layout = {name.replace(*renamed): item for name, item in _layout(_settings()).items()}
    with pytest.raises(DataError, match=f"SD3 variant .{renamed[1]}.*only its miniFLUX is read"):
        check_sizes("made", layout, _settings())


def test_a_stray_name_alone_does_not_make_a_miniflux_another_model() -> None:
    check_sizes("made", _layout(_settings()) | {"pos_embed.proj.weight": TensorLayout((3,), "float32")}, _settings())
