"""The released transformer's config.json: what it says otherwise than our settings stops an import by name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from m4v_dist.config.model_settings import ModelSettings
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.model.checkpoint_config import check_released_config

OURS = ModelSettings(
    hidden_size=128, num_heads=2, num_double_blocks=2, num_single_blocks=4, text_width=64, pooled_width=32,
    temporal_width=32, temporal_heads=2, mixer="ssm", ssm={"head_dim": 32, "state_dim": 16},
)  # fmt: skip
FITTING: dict[str, Any] = {
    "axes_dims_rope": [16, 24, 24], "num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 2,
    "num_single_layers": 4, "in_channels": 64, "joint_attention_dim": 64, "pooled_projection_dim": 32,
    "use_temporal_causal": True, "_class_name": "PyramidFluxTransformer",
}  # fmt: skip


def _write(folder: Path, config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["", "/", "/weights.safetensors", "/weights.bin", "/weights.safetensors.index.json"])
def test_a_config_that_fits_passes_and_another_is_found_beside_folder_and_file(name: str, tmp_path: Path) -> None:
    check_released_config(f"{tmp_path}{name}", OURS)
    _write(tmp_path, FITTING)
    check_released_config(f"{tmp_path}{name}", OURS)
    _write(tmp_path, {"_class_name": "PyramidFluxTransformer"})
    check_released_config(f"{tmp_path}{name}", OURS)
    _write(tmp_path, FITTING | {"axes_dims_rope": [32, 16, 16]})
    with pytest.raises(ConfigError, match="config.json: describes another transformer"):
        check_released_config(f"{tmp_path}{name}", OURS)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("axes_dims_rope", [24, 24, 16], "[24, 24, 16], ours [16, 24, 24] (model.rope_axes)"),
        ("num_attention_heads", 4, "4, ours 2 (model.num_heads)"),
        ("attention_head_dim", 32, "32, ours 64 (model.hidden_size / num_heads)"),
        ("num_layers", 8, "8, ours 2 (model.num_double_blocks)"),
        ("num_single_layers", 16, "16, ours 4 (model.num_single_blocks)"),
        ("in_channels", 16, "16, ours 64 (model.latent_channels * patch_size^2)"),
        ("joint_attention_dim", 4096, "4096, ours 64 (model.text_width)"),
        ("pooled_projection_dim", 768, "768, ours 32 (model.pooled_width)"),
        ("use_temporal_causal", False, "False, ours True (model.has_temporal_mask)"),
    ],
)
def test_every_field_that_differs_is_named_with_both_values(key: str, value: Any, words: str, tmp_path: Path) -> None:
    _write(tmp_path, FITTING | {key: value})
    with pytest.raises(ConfigError, match=re.escape(f"({key}: {words})")):
        check_released_config(str(tmp_path), OURS)


def test_another_network_is_refused_by_its_class(tmp_path: Path) -> None:
    _write(tmp_path, FITTING | {"_class_name": "PyramidDiffusionMMDiT"})
    with pytest.raises(ConfigError, match=r"describes a PyramidDiffusionMMDiT, and only .* \(PyramidFluxTransformer\)"):
        check_released_config(str(tmp_path), OURS)


def test_all_fields_that_differ_are_named_at_once(tmp_path: Path) -> None:
    _write(tmp_path, FITTING | {"num_attention_heads": 4, "attention_head_dim": 32})
    with pytest.raises(ConfigError, match="num_attention_heads: 4, ours 2 .*; attention_head_dim: 32, ours 64 "):
        check_released_config(str(tmp_path), OURS)


@pytest.mark.parametrize(("text", "words"), [("{", "not valid JSON"), ("[]", "holds a list, not the config")])
def test_a_config_that_is_none_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError, match=f"config.json: {words}"):
        check_released_config(str(tmp_path), OURS)
