"""FLOPs by arithmetic against torch's own counter, against the paper's figures, and against sums made by hand.

The counter sees matrix products and attention. It does not see the causal convolution (written as shifted products) nor
mamba1's recurrence, and has no rule for CPU attention, so that one is given. What is left is equal to the last FLOP.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from m4v_dist.batch import Column, ModelInput, TextFeatures
from m4v_dist.bench.flops_tables import PAPER_GRID, column_of
from m4v_dist.blocks.layout import ColumnShape, FrameShape
from m4v_dist.blocks.lora import is_adapter
from m4v_dist.config.model_settings import KernelSettings, ModelSettings
from m4v_dist.model.build import build_model, build_on_meta
from m4v_dist.model.flops import (
    MIXER_PARTS,
    PARTS,
    attention_mixer,
    attention_pairs,
    chunked_scan_overhead,
    clip_flops,
    embedders,
    forward_flops,
    linear,
    mean_row_flops,
    mixer_flops,
    row_flops,
    scanned_tokens,
    temporal_tokens,
    training_flops,
    unified_block,
)
from m4v_dist.model.paper_flops import CONVENTIONS, REPORTED, paper_figures
from m4v_dist.model.parameters import PARTS as PARAMETER_PARTS
from m4v_dist.model.parameters import parameters_by_part

GRID = (16, 24)
ATEN = torch.ops.aten
Shape = tuple[int, ...]


def _forward_rule(q: Shape, k: Shape, v: Shape, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _backward_rule(grad: Shape, q: Shape, k: Shape, v: Shape, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


CPU_ATTENTION = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: _forward_rule,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _backward_rule,
}
"""The counter's own rules, for the op that it has none for."""


def _settings(**values: Any) -> ModelSettings:
    ssm = {"head_dim": 16, "state_dim": 24, "chunk_size": 32, **values.pop("ssm", {})}
    base = {"hidden_size": 64, "num_heads": 2, "rope_axes": (8, 12, 12), "num_double_blocks": 1, "text_width": 40}
    sizes = {"num_single_blocks": 2, "pooled_width": 20, "temporal_width": 16, "temporal_heads": 2}
    return ModelSettings.model_validate({**base, **sizes, "ssm": ssm, **values})


def _column(settings: ModelSettings, unit: int, stage: int, num_text: int) -> tuple[Column, ColumnShape]:
    """A column with data, and its shape."""
    shape = column_of(GRID, num_text, has_temporal_mask=settings.has_temporal_mask)(unit, stage)
    clips = tuple(torch.randn(16, 1, 2 * frame.height, 2 * frame.width) for frame in shape.frames)
    text = TextFeatures(torch.randn(num_text, settings.text_width), torch.randn(settings.pooled_width))
    return Column(clips, tuple(frame.level for frame in shape.frames), text, torch.tensor(500.0)), shape


def _unseen(flops: Counter[str], settings: ModelSettings) -> int:
    """FLOPs of ops that the counter does not see."""
    scan = flops["unified: ssm scan"] if settings.ssm.variant == "mamba1" else 0
    return flops["unified: ssm convolution"] + scan


def _overhead(settings: ModelSettings, shapes: list[ColumnShape]) -> int:
    """What the plain backend adds in products over all SSM blocks."""
    if settings.ssm.variant == "mamba1":
        return 0
    ssm = settings.ssm
    sizes = {"inner_width": settings.hidden_size * ssm.expand, "state_dim": ssm.state_dim}
    blocks = sum(mixer != "attention" for mixer in settings.block_mixers)
    return blocks * sum(
        chunked_scan_overhead(
            scanned_tokens(settings, shape), num_groups=ssm.num_groups, chunk_size=ssm.chunk_size, **sizes
        )
        for shape in shapes
    )


def _counted(
    settings: ModelSettings, columns: list[Column], *, backward: bool = False, freeze: tuple[str, ...] = ()
) -> int:
    model = build_model(settings, KernelSettings(), seed=0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name) if "base" in freeze else name.split(".")[0] not in freeze)
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with torch.set_grad_enabled(backward), counter:
        outputs = model(ModelInput(tuple(columns)))
        if backward:
            torch.stack([output.square().mean() for output in outputs]).sum().backward()
    return counter.get_total_flops()


SWITCHES: dict[str, dict[str, Any]] = {
    "mamba2": {},
    "groups": {"ssm": {"num_groups": 4}},
    "mil": {"ssm": {"variant": "mil", "head_dim": 32, "state_dim": 32}},
    "mamba1": {"ssm": {"variant": "mamba1", "head_dim": 1, "state_dim": 8, "dt_rank": 6}},
    "attention": {"mixer": "attention"},
    "attention without a mask": {"mixer": "attention", "has_temporal_mask": False},
    "parallel": {"mixer": "parallel"},
    "interleaved": {"mixer": "interleaved"},
    "bare": {"has_text_sandwich": False, "has_registers": False, "has_temporal_branch": False},
    "no double blocks": {"num_double_blocks": 0},
}


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize(("unit", "stage", "num_text"), [(4, 2, 33), (1, 2, 5), (5, 0, 30), (3, 1, 7)])
def test_one_forward_is_what_torch_counts(name: str, unit: int, stage: int, num_text: int) -> None:
    settings = _settings(**SWITCHES[name])
    column, shape = _column(settings, unit, stage, num_text)
    flops = forward_flops(settings, shape)
    assert set(flops) <= set(PARTS)
    expected = flops.total() - _unseen(flops, settings) + _overhead(settings, [shape])
    assert _counted(settings, [column]) == expected


def test_packed_columns_are_the_sum_of_their_forwards() -> None:
    """A sum, with no pair across columns; only the last chunk's filling is of the whole."""
    settings = _settings()
    made = [_column(settings, unit, stage, 20) for unit, stage in ((4, 2), (3, 0), (2, 1))]
    shapes = [shape for _, shape in made]
    flops: Counter[str] = Counter()
    for shape in shapes:
        assert scanned_tokens(settings, shape) >= settings.ssm.chunk_size
        flops += forward_flops(settings, shape)
    expected = flops.total() - _unseen(flops, settings) + _overhead(settings, shapes)
    assert _counted(settings, [column for column, _ in made]) == expected


@pytest.mark.parametrize("name", ["mamba2", "attention", "parallel"])
def test_training_is_three_forwards_but_for_two_known_terms(name: str) -> None:
    """The inputs of the embedders want no gradient, and fused attention computes its scores again: 3.5 and not 3."""
    settings = _settings(**SWITCHES[name])
    column, shape = _column(settings, 4, 2, 33)
    training, forward = training_flops(settings, shape), forward_flops(settings, shape)
    no_input_gradient = embedders(settings, shape) - 2 * linear(settings.hidden_size, settings.hidden_size, 1)
    recomputed = (forward["double: attention"] + forward["unified: attention"]) // 2
    overhead = _overhead(settings, [shape])
    expected = training.total() - 3 * forward["unified: ssm convolution"] - no_input_gradient + recomputed
    expected += 3 * overhead
    assert _counted(settings, [column], backward=True) == expected


def test_recompute_adds_a_forward_of_the_blocks() -> None:
    shape = column_of(GRID, 9)(3, 2)
    plain, again, half = (
        _settings(),
        _settings(recompute="blocks"),
        _settings(recompute="blocks", recompute_fraction=0.5),
    )
    forward = forward_flops(plain, shape)
    blocks = forward.total() - forward["embedders"] - forward["out"]
    assert training_flops(again, shape).total() - training_flops(plain, shape).total() == blocks
    # of one double and two unified blocks, round(0.5) = 0 and 1
    one = unified_block(plain, "ssm", shape).total()
    assert training_flops(half, shape).total() - training_flops(plain, shape).total() == one


@pytest.mark.parametrize("name", ["mamba2", "attention", "parallel"])
def test_selective_recompute_runs_no_linear_and_no_attention_again(name: str) -> None:
    """Counted in a real step: what runs again is scan and temporal attention, whole or up to where backward has all."""
    plain, again = (_settings(**SWITCHES[name], recompute=recompute) for recompute in ("none", "selective"))
    column, shape = _column(plain, 4, 2, 33)
    counted = _counted(again, [column], backward=True) - _counted(plain, [column], backward=True)
    expected = training_flops(again, shape) - training_flops(plain, shape)
    assert set(expected) <= {"unified: ssm convolution", "unified: ssm scan", "unified: temporal attention"}
    overhead = _overhead(again, [shape])
    assert 0 <= counted <= expected.total() - expected["unified: ssm convolution"] + overhead
    assert bool(counted) == (name != "attention")


def test_a_frozen_set_has_no_weight_gradients() -> None:
    settings = _settings(num_double_blocks=2)
    column, shape = _column(settings, 4, 2, 33)
    whole, frozen = (_counted(settings, [column], backward=True, freeze=freeze) for freeze in ((), ("double_blocks",)))
    assert frozen < whole
    expected = training_flops(settings, shape).total() - training_flops(settings, shape, ("double_blocks",)).total()
    assert whole - frozen == expected


@pytest.mark.parametrize("name", ["mamba2", "mil", "mamba1", "attention", "parallel"])
def test_adapters_on_a_frozen_base_are_what_torch_counts(name: str) -> None:
    """To the last FLOP, but for fused attention's scores: forward, inputs' gradients, and the adapters' own weights."""
    settings = _settings(**SWITCHES[name], lora={"rank": 3})
    column, shape = _column(settings, 4, 2, 33)
    forward, training = forward_flops(settings, shape), training_flops(settings, shape, ("base",))
    unseen, overhead = _unseen(forward, settings), _overhead(settings, [shape])
    assert forward["adapters"] > 0
    assert _counted(settings, [column]) == forward.total() - unseen + overhead
    seen = training.total() - (_unseen(training, settings) - 3 * overhead)
    scores = (forward["double: attention"] + forward["unified: attention"]) // 2
    assert _counted(settings, [column], backward=True, freeze=("base",)) == seen + scores
    assert training.total() < 0.8 * training_flops(settings, shape).total()


def test_recompute_runs_adapters_again_with_their_blocks() -> None:
    shape = column_of(GRID, 9)(3, 2)
    counted = {
        recompute: training_flops(_settings(lora={"rank": 3}, recompute=recompute), shape, ("base",))["adapters"]
        for recompute in ("none", "selective", "blocks")
    }
    once = forward_flops(_settings(lora={"rank": 3}), shape)["adapters"]
    assert counted == {"none": 3 * once, "selective": 3 * once, "blocks": 4 * once}


# ---- shapes


def test_pairs_under_the_temporal_mask_are_counted_one_by_one() -> None:
    shape = column_of(GRID, 7)(5, 2)
    times = [0] * shape.num_text + [frame.time for frame in shape.frames for _ in range(frame.num_tokens)]
    by_time = Counter(times)
    pairs = sum(by_time[query] * by_time[key] for query in by_time for key in by_time if key <= query)
    assert attention_pairs(shape) == pairs
    assert attention_pairs(replace(shape, has_temporal_mask=False)) == len(times) ** 2


def test_noisy_frames_of_a_full_sequence_fill_rows_each() -> None:
    frames = tuple(FrameShape(8, 12, 2, time) for time in range(3))
    assert temporal_tokens(ColumnShape(5, frames, num_noisy=3, has_temporal_mask=False)) == (48, 6)
    assert temporal_tokens(column_of(GRID, 5)(4, 1)) == (3 + 4, 6)


@pytest.mark.parametrize(
    ("num_latents", "visual"), [(1, (240, 960, 3840)), (16, (3840, 5280, 11760)), (31, (7440, 8880, 15360))]
)
def test_columns_at_768p_have_the_known_token_counts(num_latents: int, visual: tuple[int, ...]) -> None:
    shapes = [column_of(PAPER_GRID, 128)(num_latents, stage) for stage in range(3)]
    assert tuple(shape.num_video for shape in shapes) == visual
    settings = ModelSettings.model_validate({"preset": "m4v_2b"})
    assert scanned_tokens(settings, shapes[2]) == visual[2] + 256 + num_latents


def test_a_grid_that_does_not_halve_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="90x160 .* 4"):
        column_of((90, 160), 128)(1, 0)


# ---- the paper

MODEL_SPEC = {
    "F1": (57.83, 25.76, 28.91, 83.52),
    "F2": (55.71, 26.73, 29.78, 82.36),
    "N1": (36.78, 12.39, 13.69, 49.15),
}
"""Attention, Mamba, Mamba + Temp, Parallel, in TFLOPs: worked out apart from this code."""


@pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda convention: convention.name)
def test_conventions_give_the_figures_that_were_worked_out_apart(convention: Any) -> None:
    figures = paper_figures(convention, column_of(PAPER_GRID, 0))
    assert tuple(round(figures[row], 2) for row in REPORTED) == MODEL_SPEC[convention.name]


def test_f1_is_within_five_percent_of_every_reported_figure_and_one_forward_is_not() -> None:
    by_name = {convention.name: convention for convention in CONVENTIONS}
    columns = column_of(PAPER_GRID, 0)
    errors = {
        name: [abs(figure / REPORTED[row] - 1) for row, figure in paper_figures(convention, columns).items()]
        for name, convention in by_name.items()
    }
    assert max(errors["F1"]) < 0.05 and max(errors["F2"]) < 0.01 and min(errors["N1"]) > 0.3


def test_a_241_frame_clip_with_dense_attention_is_50_7_pflops() -> None:
    """Worked out apart: 960 forwards at guidance batch 2; the double blocks are 16.9 of it."""
    settings = ModelSettings.model_validate({"preset": "m4v_2b", "ablation": "full_attention"})
    columns = column_of(PAPER_GRID, 128, has_temporal_mask=False)
    flops = clip_flops(settings, columns, 31, first_unit_steps=(20, 20, 20), later_unit_steps=(10, 10, 10))
    double = sum(count for part, count in flops.items() if part.startswith("double"))
    assert round(flops.total() / 1e15, 1) == 50.7 and round(double / 1e15, 1) == 16.9


# ---- sums


def test_mixer_flops_are_all_that_an_exchange_of_mixers_changes() -> None:
    shape = column_of(GRID, 9)(3, 2)
    models = [_settings(**SWITCHES[name]) for name in ("mamba2", "attention", "parallel")]
    rests = {forward_flops(model, shape).total() - mixer_flops(model, shape) for model in models}
    assert len(rests) == 1
    assert mixer_flops(models[1], shape) == 2 * attention_mixer(64, shape).total()
    assert "double: attention" not in MIXER_PARTS


def test_mean_row_is_the_mean_of_all_rows_of_a_walk() -> None:
    settings, columns, stages = _settings(), column_of(GRID, 9), (0, 1, 1, 2)
    rows = [row_flops(settings, columns, (5 - u, 5 - u, 5 - u, u), stages).total() for u in range(1, 5)]
    assert mean_row_flops(settings, columns, 4, stages) == pytest.approx(sum(rows) / 4, rel=1e-12)


@pytest.mark.parametrize("first_unit", [1, 2])
def test_a_clip_is_every_sampled_unit_stage_and_step(first_unit: int) -> None:
    settings, columns = _settings(), column_of(GRID, 9)
    by_hand = 0
    for unit in (1, 2, 3)[first_unit - 1 :]:
        for stage, steps in enumerate((3, 2, 1) if unit == 1 else (1, 2, 3)):
            by_hand += steps * (1 if unit == 1 else 2) * forward_flops(settings, columns(unit, stage)).total()
    counted = clip_flops(
        settings, columns, 3, first_unit_steps=(3, 2, 1), later_unit_steps=(1, 2, 3),
        num_columns=lambda unit: 1 if unit == 1 else 2, first_unit=first_unit,
    )  # fmt: skip
    assert counted.total() == by_hand


# ---- parameters


@pytest.mark.parametrize("preset", ["tiny", "small", "m4v_2b"])
@pytest.mark.parametrize("mixer", ["ssm", "attention", "parallel", "interleaved"])
def test_every_parameter_belongs_to_one_part(preset: str, mixer: str) -> None:
    model = build_on_meta(ModelSettings.model_validate({"preset": preset, "mixer": mixer}), KernelSettings())
    counted = parameters_by_part(model)
    assert counted.total() == sum(parameter.numel() for parameter in model.parameters())
    assert set(counted) <= set(PARAMETER_PARTS)
    assert (counted["unified: attention"] > 0) == (mixer != "ssm")
    assert (counted["unified: ssm"] > 0) == (mixer != "attention")


def test_miniflux_has_its_known_number_of_parameters_by_part() -> None:
    settings = ModelSettings.model_validate({"preset": "m4v_2b", "ablation": "full_attention"})
    counted = parameters_by_part(build_on_meta(settings, KernelSettings()))
    assert counted.total() == 1_972_059_200
    assert round(counted["double blocks"] / 1e6, 1) == 1062.1
    assert round(sum(count for part, count in counted.items() if part.startswith("unified")) / 1e6, 1) == 885.1


def test_a_parameter_of_no_part_is_refused_by_name() -> None:
    model = build_on_meta(_settings(), KernelSettings())
    model.register_parameter("stray", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match="stray"):
        parameters_by_part(model)
