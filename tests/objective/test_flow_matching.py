"""Flow matching: equal to the reference given its draws, and reproducible slot by slot."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from m4v_dist.batch import LatentBatch, ModelInput, Slot, TextFeatures
from m4v_dist.config.training_settings import ObjectiveSettings
from m4v_dist.objective.flow_matching import (
    NoisyColumn,
    PyramidFlowMatching,
    SlotDraws,
    draw_slot,
    make_column,
    velocity_loss,
)
from m4v_dist.objective.history import history_clips, to_level
from m4v_dist.objective.pyramid_schedule import PyramidSchedule
from tests.conftest import load_golden
from tests.objective.oracle import Oracle

MODES = ("ar_video", "ar_video_other_rank", "full_sequence_video", "image", "ar_image")
SETTINGS = ObjectiveSettings(history_noise_ramp_steps=0)


def _golden_normalize(latents: Tensor, statistics: dict[str, dict[str, float]]) -> Tensor:
    first, later = statistics["image_and_first_frame"], statistics["later_frames"]
    frames = [
        (latents[:, i : i + 1] - part["shift"]) / part["divide_by"]
        for i, part in enumerate([first] + [later] * (latents.shape[1] - 1))
    ]
    return torch.cat(frames, dim=1)


def _golden_column(mode: str, row: int, column: int) -> NoisyColumn:
    """Noise a slot of the reference's batch with its recorded draws, through the objective's own code."""
    description, tensors = load_golden("pyramid_training_noise")
    config = description["config"]
    num_columns = sum(config["sample_ratios"])
    stage = config["columns_to_stage"][column]
    raw = tensors[f"in.{mode}.raw_latents"][row * num_columns + column]
    latents = _golden_normalize(raw, config["normalisation"])
    noise = tensors[f"in.{mode}.draw.noise"][row * num_columns + column]
    units = description["modes"][mode]["units_per_stage"]
    first, last = (0, latents.shape[1]) if units is None else (units[stage] - 1, units[stage])
    clips, levels = history_clips(latents[:, :first], stage, 3)
    prefix = f"in.{mode}.draw.column{column}"
    draws = SlotDraws(
        position=tensors[f"{prefix}.u"][row],
        text_drop=torch.tensor(0.5),
        history_level=tensors[f"{prefix}.corrupt"][row],
        noise=noise[:, first:last],
        history_noise=tuple(tensors[f"{prefix}.clip{i}.noise"][row] for i in range(len(clips))),
    )
    return make_column(
        clips,
        levels,
        latents[:, first:last],
        draws,
        pyramid_stage=stage,
        schedule=PyramidSchedule(),
        history_ceiling=config["corrupt_ceiling"],
    )


def _golden_grid() -> tuple[int, int]:
    config = load_golden("pyramid_training_noise")[0]["config"]
    return config["rows"], sum(config["sample_ratios"])


@pytest.mark.parametrize("mode", MODES)
def test_training_noise_equals_the_reference(mode: str) -> None:
    _, tensors = load_golden("pyramid_training_noise")
    num_rows, num_columns = _golden_grid()
    losses = []
    for row in range(num_rows):
        for column in range(num_columns):
            ours, prefix = _golden_column(mode, row, column), f"out.{mode}.column{column}"
            expected_clips = sum(1 for name in tensors if name.startswith(f"{prefix}.clip"))
            assert len(ours.clips) == expected_clips
            for i, clip in enumerate(ours.clips):
                torch.testing.assert_close(clip, tensors[f"{prefix}.clip{i}"][row], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours.target, tensors[f"{prefix}.target"][row], rtol=1e-5, atol=1e-5)
            assert ours.timestep == pytest.approx(float(tensors[f"{prefix}.timesteps"][row]), abs=1e-3)
            assert ours.timestep == pytest.approx(
                float(tensors[f"out.{mode}.timesteps_flat"][row * num_columns + column]), abs=1e-3
            )
            assert ours.ratio == pytest.approx(float(tensors[f"{prefix}.ratios"][row]), abs=1e-5)
            losses.append(velocity_loss(0.5 * ours.clips[-1], ours.target))
    torch.testing.assert_close(
        torch.stack(losses).mean(), tensors[f"out.{mode}.loss_of_half_noisy"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("mode", MODES)
def test_clean_pyramid_equals_the_reference(mode: str) -> None:
    description, tensors = load_golden("pyramid_training_noise")
    for index, raw in enumerate(tensors[f"in.{mode}.raw_latents"]):
        latents = _golden_normalize(raw, description["config"]["normalisation"])
        for level in range(3):
            expected = tensors[f"out.{mode}.clean_pyramid.{level}"][index]
            torch.testing.assert_close(to_level(latents, level, 3), expected, rtol=1e-5, atol=1e-5)


def _text(value: float) -> TextFeatures:
    return TextFeatures(torch.full((3, 8), value), torch.full((4,), value))


def _slot(index: int, unit: int, stage: int, step: int = 0, seed: int | None = None) -> Slot:
    return Slot(
        step=step,
        index=index,
        source="clips",
        record=index,
        key=f"record-{index}",
        unit=unit,
        pyramid_stage=stage,
        seed=1000 + index if seed is None else seed,
        num_tokens=1,
        num_full_tokens=1,
    )


def _latents(slot: Slot) -> Tensor:
    generator = torch.Generator().manual_seed(slot.record)
    return torch.randn(4, slot.unit, 16, 24, generator=generator).bfloat16()


def _batch(slots: list[Slot], weights: tuple[float, ...] | None = None) -> LatentBatch:
    return LatentBatch(
        slots=tuple(slots),
        latents=tuple(_latents(slot) for slot in slots),
        text=tuple(_text(float(slot.index + 1)) for slot in slots),
        null_text=_text(0.0),
        weights=weights or (1.0,) * len(slots),
        global_num_slots=8,
    )


def _toy_model(model_input: ModelInput) -> list[Tensor]:
    """Depends on all that a column holds, and on nothing of its neighbours."""
    return [
        0.3 * c.clips[-1] + torch.sin(c.timestep / 100) + c.text.pooled.mean() + sum(clip.mean() for clip in c.clips)
        for c in model_input.columns
    ]


def test_loss_is_the_weighted_sum_over_the_global_batch() -> None:
    slots = [_slot(0, 1, 0), _slot(1, 3, 1), _slot(2, 5, 2)]
    output = PyramidFlowMatching(SETTINGS, lambda x: x)(_toy_model, _batch(slots, (1.0, 0.0, 2.0)))
    losses = output.slot_losses
    assert losses.shape == (3,) and not losses.requires_grad
    torch.testing.assert_close(output.loss, (losses[0] + 2 * losses[2]) / 8)


def test_a_slot_has_the_same_loss_in_any_batch() -> None:
    slots = [_slot(0, 1, 0), _slot(1, 3, 1), _slot(2, 5, 2), _slot(3, 2, 1)]
    objective = PyramidFlowMatching(SETTINGS, lambda x: x)
    together = objective(_toy_model, _batch(slots)).slot_losses
    alone = [float(objective(_toy_model, _batch([slot])).slot_losses) for slot in slots]
    turned = objective(_toy_model, _batch(slots[::-1])).slot_losses.flip(0)
    assert together.tolist() == alone == turned.tolist()


def test_another_seed_gives_another_loss() -> None:
    objective = PyramidFlowMatching(SETTINGS, lambda x: x)
    one, other = (objective(_toy_model, _batch([_slot(0, 2, 2, seed=seed)])).slot_losses for seed in (1, 2))
    assert float(one) != float(other)


def test_draws_of_a_slot_come_in_a_fixed_order() -> None:
    """A longer history or another setting moves no draw that comes before it."""
    short = draw_slot(5, (4, 1, 16, 24), [])
    long = draw_slot(5, (4, 1, 16, 24), [(4, 2, 4, 6), (4, 1, 8, 12)])
    assert torch.equal(short.noise, long.noise)
    assert [float(short.position), float(short.text_drop)] == [float(long.position), float(long.text_drop)]
    generator = torch.Generator().manual_seed(5)
    assert torch.rand(3, generator=generator).tolist() == [
        float(x) for x in (long.position, long.text_drop, long.history_level)
    ]
    assert torch.equal(torch.randn(4, 1, 16, 24, generator=generator), long.noise)
    assert torch.equal(torch.randn(4, 2, 4, 6, generator=generator), long.history_noise[0])


def test_text_is_dropped_by_the_slots_own_draw() -> None:
    seen: list[list[float]] = []

    def model(model_input: ModelInput) -> list[Tensor]:
        seen.append([float(column.text.pooled[0]) for column in model_input.columns])
        return [column.clips[-1] for column in model_input.columns]

    slots = [_slot(index, 1, 0) for index in range(400)]
    for dropout in (0.0, 0.25, 1.0):
        settings = SETTINGS.model_copy(update={"cfg_dropout": dropout})
        metrics = PyramidFlowMatching(settings, lambda x: x)(model, _batch(slots)).metrics
        dropped = sum(value == 0.0 for value in seen[-1])
        assert metrics["text_dropped"].tolist() == [dropped, 400]
        assert dropped == pytest.approx(400 * dropout, abs=4 * math.sqrt(400 * 0.25 * 0.75))
    expected = [float(draw_slot(slot.seed, (1, 1, 1, 1), []).text_drop) < 0.25 for slot in slots]
    assert [value == 0.0 for value in seen[1]] == expected


def test_history_is_clean_at_step_zero_and_noisy_after_the_ramp() -> None:
    columns: list[tuple[Tensor, ...]] = []

    def model(model_input: ModelInput) -> list[Tensor]:
        columns.extend(column.clips for column in model_input.columns)
        return [column.clips[-1] for column in model_input.columns]

    settings = ObjectiveSettings(history_noise_max=0.5, history_noise_ramp_steps=10)
    objective = PyramidFlowMatching(settings, lambda x: x)
    for step in (0, 5, 10, 1000):
        objective(model, _batch([_slot(0, 5, 2, step=step)]))
    clean, _ = history_clips(_latents(_slot(0, 5, 2)).float()[:, :-1], 2, 3)
    deviations = [float((clips[0] - clean[0]).abs().mean()) for clips in columns]
    assert deviations[0] == 0 < deviations[1] < deviations[2] == deviations[3]
    assert deviations[2] == pytest.approx(2 * deviations[1], rel=1e-4)


def test_history_noise_by_index_needs_no_ramp_and_spares_the_oldest() -> None:
    columns: list[tuple[Tensor, ...]] = []

    def model(model_input: ModelInput) -> list[Tensor]:
        columns.extend(column.clips for column in model_input.columns)
        return [column.clips[-1] for column in model_input.columns]

    slot = _slot(0, 5, 2)
    by_index = ObjectiveSettings(history_noise="by_index", history_noise_max=0.5, history_noise_ramp_steps=10)
    for settings in (by_index, SETTINGS.model_copy(update={"history_noise_max": 0.5})):
        for step in (0, 1000):
            PyramidFlowMatching(settings, lambda x: x)(model, _batch([replace(slot, step=step)]))
    start, later, by_step = columns[0], columns[1], columns[2]
    assert all(torch.equal(one, other) for one, other in zip(start, later, strict=True))
    clean, _ = history_clips(_latents(slot).float()[:, :-1], 2, 3)
    shares = [
        ours / even
        for clip, other, exact in zip(start[:-1], by_step[:-1], clean, strict=True)
        for ours, even in zip((clip - exact).abs().mean((0, 2, 3)), (other - exact).abs().mean((0, 2, 3)), strict=True)
    ]
    # noise fraction c moves a latent by c * (noise - latent), and both readings draw the same noise
    torch.testing.assert_close(torch.stack(shares), torch.tensor([0.25, 0.5, 0.75, 1.0]), rtol=1e-4, atol=1e-4)
    assert torch.equal(start[-1], by_step[-1])


def test_metrics_add_up_over_micro_batches_and_leave_fillers_out() -> None:
    slots = [_slot(0, 1, 0), _slot(1, 3, 1), _slot(2, 5, 2), _slot(3, 2, 1)]
    objective = PyramidFlowMatching(SETTINGS, lambda x: x)
    whole = objective(_toy_model, _batch(slots, (1.0, 1.0, 1.0, 0.0)))
    halves = [objective(_toy_model, _batch(part)).metrics for part in (slots[:2], slots[2:3])]
    assert all(half.keys() == whole.metrics.keys() for half in halves)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(value, halves[0][name] + halves[1][name])
    assert whole.metrics["loss_pyramid_stage_1"].tolist() == [float(whole.slot_losses[1]), 1.0]
    counts = sum(whole.metrics[f"loss_timestep_quantile_{q}"][1] for q in range(4))
    assert float(counts) == 3


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("unit", [1, 2, 6])
def test_the_true_velocity_has_no_loss(num_stages: int, unit: int) -> None:
    """The oracle of the sampler tests is the optimum of training: the two agree on what a velocity is."""
    settings = ObjectiveSettings(num_pyramid_stages=num_stages, pyramid_stage_columns=(0,))
    slots = [_slot(index, unit, index % num_stages) for index in range(6)]
    schedule = PyramidSchedule(num_stages, gamma=settings.gamma)
    oracle = Oracle(schedule, [_latents(slot).float()[:, -1:] for slot in slots])
    output = PyramidFlowMatching(settings, lambda x: x)(oracle, _batch(slots))
    assert float(output.slot_losses.max()) < 1e-4


def test_gradient_reaches_the_model_only() -> None:
    scale = torch.tensor(0.1, requires_grad=True)
    slots = [_slot(0, 3, 2), _slot(1, 1, 0)]
    output = PyramidFlowMatching(SETTINGS, lambda x: x)(
        lambda model_input: [scale * column.clips[-1] for column in model_input.columns], _batch(slots)
    )
    output.loss.backward()
    assert scale.grad is not None and float(scale.grad.abs()) > 0


def test_wrong_answers_and_wrong_latents_are_refused() -> None:
    objective = PyramidFlowMatching(SETTINGS, lambda x: x)
    slot = _slot(0, 3, 2)
    with pytest.raises(ValueError, match="2 velocities for 1 columns"):
        objective(lambda model_input: [torch.zeros(1), torch.zeros(1)], _batch([slot]))
    with pytest.raises(ValueError, match="shape of the column's last clip"):
        objective(lambda model_input: [torch.zeros(4, 1, 4, 6)], _batch([slot]))
    batch = replace(_batch([slot]), latents=(torch.zeros(4, 2, 16, 24),))
    with pytest.raises(ValueError, match="record-0"):
        objective(_toy_model, batch)
