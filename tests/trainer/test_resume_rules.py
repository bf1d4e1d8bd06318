"""What a resumed run may change."""

from typing import Any

import pytest

from m4v_dist.errors import ConfigError
from m4v_dist.trainer.resume import require_same_run
from tests.trainer.toy import toy_config


def _json(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = toy_config("/run").model_dump(mode="json")
    for dotted, value in changes.items():
        target: Any = values
        *sections, key = dotted.split("__")
        for section in sections:
            target = target[int(section) if section.isdigit() else section]
        target[key] = value
    return values


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model__hidden_size", 256),
        ("run__seed", 1),
        ("trainer__global_batch_slots", 24),
        ("trainer__sync_group", 3),
        ("trainer__precision", "bfloat16"),
        ("objective__cfg_dropout", 0.5),
        ("warm_start__source", "/release/diffusion_transformer_384p"),
        ("warm_start__weights", "/run/other.safetensors"),
        ("curriculum__0__learning_rate", 1.0),
        ("curriculum__1__weights", {"clips": 9.0}),
        ("curriculum__1__buckets", [{"height_px": 64, "width_px": 64}, {"height_px": 128, "width_px": 64}]),
        ("curriculum__0__buckets", [{"height_px": 128, "width_px": 64}]),
        ("sources", []),
    ],
)
def test_what_decides_weights_or_data_order_is_refused_with_both_values(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{key.replace('__', '.')}.*->.*another run.folder"):
        require_same_run(_json(), _json(**{key: value}), stage_index=1, where="step_00000006")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("launch__num_workers", 4),
        ("logging__wandb", "offline"),
        ("trainer__zero_stage", 3),
        ("trainer__keep_last", 1),
        ("run__folder", "/moved"),
        ("curriculum__1__num_steps", 99),
        ("curriculum__1__micro_batch_slots", 1),
    ],
)
def test_where_and_how_it_runs_may_change(key: str, value: Any) -> None:
    require_same_run(_json(), _json(**{key: value}), stage_index=1, where="step_00000006")


def test_a_bucket_that_is_dropped_is_refused_like_one_that_is_added() -> None:
    two = _json(curriculum__0__buckets=[{"height_px": 64, "width_px": 64}, {"height_px": 128, "width_px": 64}])
    with pytest.raises(ConfigError, match=r"curriculum.0.buckets.*128.*->"):
        require_same_run(two, _json(), stage_index=0, where="step_00000002")


def test_a_stage_that_has_not_begun_may_change() -> None:
    require_same_run(_json(), _json(curriculum__1__learning_rate=0.5), stage_index=0, where="step_00000002")
    require_same_run(_json(), _json(curriculum__1__buckets=[]), stage_index=0, where="step_00000002")
    with pytest.raises(ConfigError, match="curriculum.0.num_steps"):
        require_same_run(_json(), _json(curriculum__0__num_steps=9), stage_index=1, where="step_00000006")
