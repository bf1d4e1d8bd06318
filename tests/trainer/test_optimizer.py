"""Groups, learning rate, and the step counters of a checkpoint."""

import pytest
import torch
from torch import nn

from m4v_dist.config.model_settings import KernelSettings, ModelSettings
from m4v_dist.config.training_settings import CurriculumStageSettings
from m4v_dist.errors import DataError
from m4v_dist.model.build import build_on_meta
from m4v_dist.trainer.optimizer import learning_rate, parameter_groups, steps_of_groups
from tests.trainer.toy import ToyModel


def _stage(**changes: object) -> CurriculumStageSettings:
    values = {"name": "a", "num_steps": 10, "num_latents": 1, "buckets": [{"height_px": 64, "width_px": 64}]}
    return CurriculumStageSettings.model_validate({**values, "weights": {"a": 1}, "learning_rate": 0.1, **changes})


@pytest.mark.parametrize("variant", ["mamba2", "mil", "mamba1"])
def test_every_parameter_is_in_one_group_and_scan_norms_and_registers_never_decay(variant: str) -> None:
    settings = ModelSettings.model_validate({"mixer": "parallel", "ssm": {"variant": variant}})
    model = build_on_meta(settings, KernelSettings())
    groups = parameter_groups(model.named_parameters(), freeze=())
    names = [name for group in groups for name in group.parameter_names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert len(names) == len(set(names))
    decaying = {name for group in groups if group.decays for name in group.parameter_names}
    assert decaying
    for name, _ in model.named_parameters():
        spared = any(part in name for part in ("A_log", "dt_bias", ".D", "registers", "norm", "conv_bias", ".bias"))
        assert (name in decaying) != spared, name


@pytest.mark.parametrize("mixer", ["ssm", "parallel", "attention", "interleaved"])
def test_what_attention_does_not_have_is_fresh(mixer: str) -> None:
    """The names that a model of attention alone has not, but for a parallel block's renamed ones."""
    model, twin = (
        build_on_meta(ModelSettings.model_validate({"mixer": kind}), KernelSettings()) for kind in (mixer, "attention")
    )
    attention = {name for name, _ in twin.named_parameters()}
    groups = parameter_groups(model.named_parameters(), freeze=())
    fresh = {name for group in groups if group.is_fresh for name in group.parameter_names}
    assert fresh == {
        name for name, _ in model.named_parameters() if name.replace(".mixer.attention.", ".mixer.") not in attention
    }
    assert bool(fresh) == (mixer != "attention")


def test_a_frozen_set_has_no_group_and_a_freezable_one_has_its_own() -> None:
    named = list(ToyModel(0).named_parameters())
    assert [g.name for g in parameter_groups(named, ("double_blocks",))] == [
        "fresh/no_decay",
        "rest/decay",
        "rest/no_decay",
    ]
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


def test_counters_of_a_checkpoint_go_to_their_groups_and_to_what_was_split_off() -> None:
    groups = parameter_groups(ToyModel(0).named_parameters(), ())
    names = {name for group in groups for name in group.parameter_names}
    saved = {group.name: 3 + number for number, group in enumerate(groups)}
    assert steps_of_groups(groups, saved, names, where="x") == saved
    # a checkpoint from before fresh parameters had groups of their own
    older = {name: count for name, count in saved.items() if not name.startswith("fresh/")}
    assert steps_of_groups(groups, older, names, where="x") == {**saved, "fresh/no_decay": saved["rest/no_decay"]}
    # frozen at the save: no moments, so a fresh counter
    trained = {name for name in names if not name.startswith("double_blocks.")}
    steps = steps_of_groups(groups, older, trained, where="x")
    assert steps["double_blocks/decay"] == steps["double_blocks/no_decay"] == 0 and steps["rest/decay"] > 0


def test_moments_without_a_counter_or_for_half_a_group_are_refused() -> None:
    groups = parameter_groups(ToyModel(0).named_parameters(), ())
    names = {name for group in groups for name in group.parameter_names}
    saved = {group.name: 3 for group in groups}
    with pytest.raises(DataError, match=r"folder: parameter group 'rest/decay' has moments for 3 of its 3 .*'rest/x'"):
        steps_of_groups(groups, {name.replace("rest/decay", "rest/x"): 3 for name in saved}, names, where="folder")
    with pytest.raises(DataError, match=r"'double_blocks/no_decay' has moments for 1 of its 2 parameters"):
        steps_of_groups(groups, saved, names - {"double_blocks.0.bias"}, where="folder")
