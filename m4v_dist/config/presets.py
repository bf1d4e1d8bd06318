"""What one word in a config stands for: the model's presets, the paper's ablation rows, the sizes of an SSM variant.

Plain tables and one pure function, `fill_model`; bounds and checks stand in `model_settings.py`. Keys in the file win
over a preset. A key in the file that contradicts the named ablation row is refused: a row is what its name says.

Source: M4V paper, tables of architectures and of components, and its appendix (hybrids); Mamba-2 (Dao & Gu 2024) and
Mamba (Gu & Dao 2023) for the sizes.
"""

from typing import Any

MODEL_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128, "num_heads": 2, "num_double_blocks": 4, "num_single_blocks": 8,
        "text_width": 384, "pooled_width": 384, "temporal_width": 64, "temporal_heads": 2,
        "ssm": {"expand": 2, "head_dim": 32, "state_dim": 32, "chunk_size": 64},
    },
    "small": {
        "hidden_size": 512, "num_heads": 8, "num_double_blocks": 4, "num_single_blocks": 8,
        "text_width": 384, "pooled_width": 384, "temporal_width": 128, "temporal_heads": 2,
    },
    "m4v_2b": {
        "hidden_size": 1920, "num_heads": 30, "num_double_blocks": 8, "num_single_blocks": 16,
        "text_width": 4096, "pooled_width": 768, "temporal_width": 512, "temporal_heads": 8,
    },
}  # fmt: skip


def _row(mixer: str, *, text: bool, vision: bool, temporal: bool) -> dict[str, Any]:
    """Switches of one row. "Vision" is the frames' part of the re-composition: registers and zigzag paths."""
    return {
        "mixer": mixer,
        "has_text_sandwich": text,
        "has_registers": vision,
        "num_zigzag_paths": 8 if vision else 1,
        "has_temporal_branch": temporal,
    }


ABLATIONS: dict[str, dict[str, Any]] = {
    # Architectures. The paper's FLOPs of "parallel" are those of attention plus Mamba: no temporal branch in it.
    "full_attention": {"mixer": "attention", "has_temporal_branch": False},
    "parallel": _row("parallel", text=True, vision=True, temporal=False),
    "full_mamba": _row("ssm", text=True, vision=True, temporal=False),
    "full_mamba_temporal": _row("ssm", text=True, vision=True, temporal=True),
    # Components: Text / Vis / Temp. The last two are the rows above under the other table's name.
    "no_components": _row("ssm", text=False, vision=False, temporal=False),
    "text": _row("ssm", text=True, vision=False, temporal=False),
    "vision": _row("ssm", text=False, vision=True, temporal=False),
    "text_vision": _row("ssm", text=True, vision=True, temporal=False),
    "text_vision_temporal": _row("ssm", text=True, vision=True, temporal=True),
    # Hybrids of blocks: the MM-DiM block whole where it stands, PyramidFlow's attention block elsewhere.
    "post_half": _row("post_half", text=True, vision=True, temporal=True),
    "pre_half": _row("pre_half", text=True, vision=True, temporal=True),
    "interleaved": _row("interleaved", text=True, vision=True, temporal=True),
}


def fill_model(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the model's section with what its preset, ablation and SSM variant stand for filled in.

    Args:
        values: the section as given. What is of a wrong kind stays, for the schema to refuse.

    Raises:
        ValueError: a key contradicts the ablation.
    """
    # As text, since what the file gives may be a list, which no dict can look up.
    preset = MODEL_PRESETS.get(str(values.get("preset", "tiny")))
    if preset is None:
        return values
    ablation = ABLATIONS.get(str(values.get("ablation")), {})
    against = [f"{key}={values[key]!r} (the row has {ablation[key]!r})" for key in ablation if _differs(values, key)]
    if against:
        raise ValueError(
            f"ablation={values['ablation']!r} is contradicted by {', '.join(against)}; leave out the one or the other"
        )
    merged = {**preset, **ablation, **values}
    given = values.get("ssm", {})
    if isinstance(given, dict):
        merged["ssm"] = {**_ssm_values(merged, preset.get("ssm", {}), str(given.get("variant", "mamba2"))), **given}
    return merged


def _differs(values: dict[str, Any], key: str) -> bool:
    row = ABLATIONS[str(values["ablation"])]
    return key in values and values[key] != row[key]


def _ssm_values(model: dict[str, Any], preset: dict[str, Any], variant: str) -> dict[str, Any]:
    """The SSM keys that follow from preset, variant and widths; a preset's sizes are those of mamba2."""
    width, num_heads = model.get("hidden_size"), model.get("num_heads")
    if variant == "mamba2" or not all(type(count) is int and count > 0 for count in (width, num_heads)):
        return preset
    assert isinstance(width, int) and isinstance(num_heads, int)
    sizes = {
        "mil": {
            "expand": 1, "head_dim": width // num_heads, "state_dim": width // num_heads, "num_groups": num_heads,
        },
        "mamba1": {"expand": 2, "head_dim": 1, "state_dim": 16, "num_groups": 1, "dt_rank": -(-width // 16)},
    }  # fmt: skip
    return {**preset, **sizes.get(variant, {})}
