"""Groups and learning rate."""

import torch
from torch import nn

from m4v_dist.config.model_settings import KernelSettings, ModelSettings
from m4v_dist.config.training_settings import CurriculumStageSettings
from m4v_dist.model.build import build_on_meta
from m4v_dist.trainer.optimizer import learning_rate, parameter_groups
from tests.trainer.toy import ToyModel


def _stage(**changes: object) -> CurriculumStageSettings:
    values = {"name": "a", "num_steps": 10, "num_latents": 1, "buckets": [{"height_px": 64, "width_px": 64}]}
    return CurriculumStageSettings.model_validate({**values, "weights": {"a": 1}, "learning_rate": 0.1, **changes})


def test_every_parameter_is_in_one_group_and_scan_norms_and_registers_never_decay() -> None:
    model = build_on_meta(ModelSettings.model_validate({}), KernelSettings())
    groups = parameter_groups(model.named_parameters(), freeze=())
    names = [name for group in groups for name in group.parameter_names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert len(names) == len(set(names))
    decaying = {name for group in groups if group.decays for name in group.parameter_names}
    assert decaying
    for name, parameter in model.named_parameters():
        spared = parameter.ndim < 2 or any(part in name for part in ("A_log", "dt_bias", "register", "norm"))
        assert (name in decaying) != spared, name


def test_a_frozen_set_has_no_group_and_a_freezable_one_has_its_own() -> None:
    named = list(ToyModel(0).named_parameters())
    assert [g.name for g in parameter_groups(named, ("double_blocks",))] == ["rest/decay", "rest/no_decay"]
    free = parameter_groups(named, ())
    assert [g.name for g in free][:2] == ["double_blocks/decay", "double_blocks/no_decay"]
    assert all(n.startswith("double_blocks.") for g in free[:2] for n in g.parameter_names)


def test_a_prefix_of_a_name_is_not_the_set() -> None:
    named = [("double_blocks_gate.weight", nn.Parameter(torch.zeros(2, 2)))]
    assert len(parameter_groups(named, ("double_blocks",))) == 1


def test_warmup_rises_to_the_peak_and_stays() -> None:
    stage = _stage(warmup_steps=4)
    assert [learning_rate(stage, step) for step in range(6)] == [0.025, 0.05, 0.1 * 3 / 4, 0.1, 0.1, 0.1]
    assert learning_rate(_stage(), 0) == 0.1
