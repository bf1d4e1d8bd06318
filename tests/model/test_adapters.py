"""The linears that count as adapted are those that a built model adapts."""

from collections import Counter

import pytest

from m4v_dist.blocks.lora import LoraLinear
from m4v_dist.config.model_settings import KernelSettings, LoraSettings, ModelSettings
from m4v_dist.model.adapters import AdaptedLinear, double_block_adapters, unified_block_adapters
from m4v_dist.model.build import build_on_meta
from tests.model.test_pyramid import TINY, VARIANTS


@pytest.mark.parametrize("targets", [("attention", "ssm", "feed_forward"), ("attention",), ("ssm",), ("feed_forward",)])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mixer", ["attention", "ssm", "parallel"])
def test_a_block_has_the_adapters_that_are_counted(mixer: str, variant: str, targets: tuple[str, ...]) -> None:
    lora = LoraSettings.model_validate({"rank": 3, "targets": targets})
    settings = TINY.model_copy(update={**VARIANTS[variant], "mixer": mixer, "lora": lora})
    built = build_on_meta(settings, KernelSettings())
    double, unified = _adapted(built.double_blocks[0].video), _adapted(built.single_blocks[0])
    assert _widths(double_block_adapters(settings)) == double
    assert _widths(unified_block_adapters(settings, settings.block_mixers[0])) == unified


def _adapted(block) -> Counter[tuple[str, int, int]]:  # type: ignore[no-untyped-def]
    return Counter(
        (path.rpartition(".")[2], module.in_features, module.out_features)
        for path, module in block.named_modules()
        if isinstance(module, LoraLinear)
    )


def _widths(linears: list[AdaptedLinear]) -> Counter[tuple[str, int, int]]:
    return Counter((linear.name, linear.width_in, linear.width_out) for linear in linears)


def test_a_model_without_adapters_has_none() -> None:
    settings = ModelSettings.model_validate({"preset": "m4v_2b"})
    assert double_block_adapters(settings) == unified_block_adapters(settings, "parallel") == []
