"""Adapters: they start as nothing, train alone, and merge into the base."""

import pytest
import torch
from torch import nn

from m4v_dist.batch import ModelInput
from m4v_dist.blocks.lora import LoraLinear, add_adapters, is_adapter, merge_adapters
from m4v_dist.config.load import parse_config
from m4v_dist.config.model_settings import KernelSettings, LoraSettings, ModelSettings
from m4v_dist.errors import ConfigError
from m4v_dist.model.build import build_model, build_on_meta
from m4v_dist.model.parameters import parameters_by_part
from m4v_dist.trainer.optimizer import is_frozen, parameter_groups
from tests.config.run_values import run_values
from tests.model.test_pyramid import TINY, VARIANTS, _columns, _perturbed

KERNELS = KernelSettings()
LORA = LoraSettings(rank=3, alpha=6.0)


def _settings(variant: str, lora: LoraSettings = LORA) -> ModelSettings:
    return TINY.model_copy(update={"mixer": "parallel", **VARIANTS[variant], "lora": lora})


@pytest.mark.parametrize("variant", ["parallel", "mil", "mamba1"])
def test_merged_weights_in_the_base_give_what_the_adapted_model_gives(variant: str) -> None:
    adapted = _perturbed(_settings(variant))
    base = build_model(_settings(variant, LoraSettings()), KERNELS, seed=1)
    base.load_state_dict(merge_adapters(adapted.state_dict(), LORA))
    bare = {name: tensor for name, tensor in adapted.state_dict().items() if not is_adapter(name)}
    with torch.no_grad():
        merged, expected = (model(ModelInput(_columns())) for model in (base, adapted))
        base.load_state_dict(bare)
        without = base(ModelInput(_columns()))
    for one, other, third in zip(merged, expected, without, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert (other - third).abs().max() > 1e-2, "the adapters did nothing"


def test_a_fresh_adapted_model_is_its_base() -> None:
    adapted, base = (build_model(_settings("parallel", lora), KERNELS, seed=4) for lora in (LORA, LoraSettings()))
    weights = adapted.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in base.state_dict().items())
    downs = [tensor for name, tensor in weights.items() if name.endswith("lora_down")]
    assert downs and all(down.abs().max() > 0 and down.shape[0] == 3 for down in downs)
    assert all(not tensor.any() for name, tensor in weights.items() if name.endswith("lora_up"))


def test_targets_choose_the_linears_and_the_temporal_branch_has_none() -> None:
    counts = {}
    for target in ("attention", "ssm", "feed_forward"):
        model = build_on_meta(_settings("mamba1", LoraSettings(rank=2, targets=(target,))), KERNELS)
        adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
        assert not any("temporal_branch" in name or "modulation" in name for name in adapted)
        counts[target] = len(adapted)
        assert parameters_by_part(model)["adapters"] > 0
    # one double block of two streams, two parallel blocks
    assert counts == {"attention": 2 * 4 + 2 * 3, "ssm": 2 * 4, "feed_forward": 2 * 2 + 2 * 2}
    plain = nn.Sequential(nn.Linear(2, 2))
    add_adapters(plain, LoraSettings())
    assert type(plain[0]) is nn.Linear


def test_a_frozen_base_leaves_the_adapters_in_a_group_of_their_own() -> None:
    model = build_on_meta(_settings("parallel"), KERNELS)
    (group,) = parameter_groups(model.named_parameters(), ("base",))
    assert group.name == "adapters/decay" and all(is_adapter(name) for name in group.parameter_names)
    assert sum(is_adapter(name) for name, _ in model.named_parameters()) == len(group.parameter_names)
    assert not is_frozen("double_blocks.0.text.ff_in.lora_up", ("double_blocks",))
    frozen = {name for name, _ in model.named_parameters() if is_frozen(name, ("embedders",))}
    assert {name.split(".")[0] for name in frozen} == {"conditioning", "text_in", "video_in"}


@pytest.mark.parametrize(("rank", "freeze"), [(4, []), (4, ["double_blocks"]), (0, ["base"])])
def test_adapters_and_a_frozen_base_come_together(rank: int, freeze: list[str]) -> None:
    values = run_values()
    values["model"] = {"lora": {"rank": rank}}
    values["curriculum"] = [{**values["curriculum"][0], "freeze": freeze}]
    with pytest.raises(ConfigError, match=f"curriculum 'video': freeze=.*model.lora.rank={rank}"):
        parse_config(values, where="test")
