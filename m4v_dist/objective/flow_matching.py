"""Pyramid flow matching: draw time and noise of each slot, interpolate, ask the model for the velocity, take the loss.

A slot's flow at pyramid stage s goes from start to end on that stage's grid. Both share one noise n_s:

    start = sigma_start n_s + (1 - sigma_start) upsample(x_{s-1})      (n_0 at stage 0)
    end   = sigma_end   n_s + (1 - sigma_end)   x_s                    (x_{K-1} itself at the last stage)
    noisy = r start + (1 - r) end,  velocity = start - end

with x_s the normalised latents on the grid of s. The model is told the timestep and asked for the velocity, which
points towards the noise. The loss of a slot is the mean squared error over its noisy clip.

The full-sequence form (no history, the whole clip noisy) is `make_column` with an empty history.

Source: PyramidFlow (arXiv 2410.05954) eq. 6-10; pyramid_dit/pyramid_dit_for_video_gen_pipeline.py of its repository at
3040d71 (noise pyramid, history noise, loss); M4V paper eq. 4.

Legend: `c` channels, `t` latents in time, `h` `w` grid; K pyramid stages; r ratio, 1 at a stage's start, 0 at its end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from m4v_dist.batch import Column, LatentBatch, ModelInput, Slot, TextFeatures, slot_generator, to_device
from m4v_dist.config.training_settings import ObjectiveSettings
from m4v_dist.objective.history import add_history_noise, history_clips, history_noise_ceiling, to_level
from m4v_dist.objective.pyramid_schedule import PyramidSchedule, downsample, downsample_noise, upsample

NUM_TIMESTEP_QUANTILES = 4
"""Parts of equal probability of a stage's timesteps that the loss is reported for."""

Model = Callable[[ModelInput], Sequence[Tensor]]
"""Returns one velocity per column, of the shape of its last clip."""


@dataclass(frozen=True)
class SlotDraws:
    """All random numbers of one slot, float32.

    Args:
        position: scalar in [0, 1), picks the entry of the stage's training table.
        text_drop: scalar in [0, 1); below `cfg_dropout` the prompt is replaced by the empty one.
        history_level: scalar in [0, 1), times the ceiling is the noise fraction on the slot's history.
        noise: c t h w, N(0, 1), of the noisy clip at full size.
        history_noise: one per history clip, old to new, N(0, 1) on the clip's own grid.
    """

    position: Tensor
    text_drop: Tensor
    history_level: Tensor
    noise: Tensor
    history_noise: tuple[Tensor, ...]


@dataclass(frozen=True)
class NoisyColumn:
    """What the model sees of a slot and what it should answer.

    Args:
        clips: history old to new, then the noisy clip; c t h w each.
        levels: pyramid stage of each clip's grid.
        target: velocity, of the shape of the noisy clip.
        timestep: in [0, 1000].
        ratio: r in (0, 1], place in the stage.
    """

    clips: tuple[Tensor, ...]
    levels: tuple[int, ...]
    target: Tensor
    timestep: float
    ratio: float


@dataclass(frozen=True)
class ObjectiveOutput:
    """Loss of a micro-batch.

    Args:
        loss: scalar with gradient: sum over slots of weight * mse, divided by the slots of the global batch.
        slot_losses: [slots] float32, detached, unweighted mse.
        metrics: name to [2] float32 (sum, count) over slots of weight above 0, so that ranks and micro-batches add up;
            a mean is sum / count, and absent where count is 0. Every batch has the same names.
    """

    loss: Tensor
    slot_losses: Tensor
    metrics: dict[str, Tensor]


def draw_slot(
    seed: int, noise_shape: Sequence[int], history_shapes: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> SlotDraws:
    """Make all draws of a slot from its seed, on the CPU, then move them to `device`.

    The order is fixed, and nothing is left out when a setting makes it useless, so that changing a setting moves no
    other draw: (1) three uniforms: position, text_drop, history_level; (2) noise of the noisy clip; (3) noise of each
    history clip, old to new.

    Args:
        seed: `Slot.seed`.
        noise_shape: c t h w of the noisy clip at full size.
        history_shapes: c t h w of each history clip on its grid.
    """
    generator = slot_generator(seed)
    position, text_drop, history_level = torch.rand(3, generator=generator).unbind()
    noise = torch.randn(tuple(noise_shape), generator=generator).to(device)
    history_noise = tuple(torch.randn(tuple(shape), generator=generator).to(device) for shape in history_shapes)
    return SlotDraws(position, text_drop, history_level, noise, history_noise)


def make_column(
    history: Sequence[Tensor],
    history_levels: Sequence[int],
    clean: Tensor,  # c t h w, normalised, full size
    draws: SlotDraws,
    *,
    pyramid_stage: int,
    schedule: PyramidSchedule,
    history_ceiling: float,
    is_history_noise_by_index: bool = False,
) -> NoisyColumn:
    """Noise one slot: pure arithmetic on given draws.

    Args:
        history: clean history clips, old to new, each on its grid (`history_clips`); none in the full-sequence form.
        history_levels: one per clip.
        clean: c t h w, float32, normalised, full size: what is to be learnt; t = 1 for an auto-regressive unit.
        draws: of this slot.
        pyramid_stage: stage of the flow.
        schedule: sigmas and tables.
        history_ceiling: largest noise fraction on history.
        is_history_noise_by_index: that fraction is the newest latent's, and older ones get less (`add_history_noise`).
    """
    level = float(draws.history_level) * history_ceiling
    noisy_history = add_history_noise(history, draws.history_noise, level, is_by_index=is_history_noise_by_index)
    start, end = flow_ends(clean, draws.noise, pyramid_stage, schedule)
    # The product is float32 as in the reference: the last bit decides the entry at a border.
    index = min(int(draws.position.cpu() * schedule.num_train_timesteps), schedule.num_train_timesteps - 1)
    ratio = float(schedule.train_ratios(pyramid_stage)[index])
    return NoisyColumn(
        clips=(*noisy_history, ratio * start + (1.0 - ratio) * end),
        levels=(*history_levels, pyramid_stage),
        target=start - end,
        timestep=float(schedule.train_timesteps(pyramid_stage)[index]),
        ratio=ratio,
    )


def flow_ends(clean: Tensor, noise: Tensor, pyramid_stage: int, schedule: PyramidSchedule) -> tuple[Tensor, Tensor]:
    """Start and end of a stage's flow for clean latents and noise at full size.

    Returns:
        (start, end), c t h' w' on the stage's grid.
    """
    stage_clean = to_level(clean, pyramid_stage, schedule.num_stages)
    stage_noise = noise_to_level(noise, pyramid_stage, schedule.num_stages)
    start_sigma, end_sigma = schedule.start_sigmas[pyramid_stage], schedule.end_sigmas[pyramid_stage]
    if pyramid_stage == 0:
        start = stage_noise
    else:
        start = start_sigma * stage_noise + (1.0 - start_sigma) * upsample(downsample(stage_clean))
    return start, end_sigma * stage_noise + (1.0 - end_sigma) * stage_clean


def noise_to_level(noise: Tensor, level: int, num_pyramid_stages: int) -> Tensor:
    """Bring full-size white noise to the grid of a level; it stays white with variance 1. c t h w to c t h' w'."""
    for _ in range(num_pyramid_stages - 1 - level):
        noise = downsample_noise(noise)
    return noise


def velocity_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of one column's velocity, in float32.

    Raises:
        ValueError: the model answered in another shape.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"flow matching: the model returned a velocity of shape {tuple(prediction.shape)} for a noisy clip of "
            f"shape {tuple(target.shape)}; it must have the shape of the column's last clip."
        )
    return (prediction.float() - target).square().mean()


class PyramidFlowMatching:
    """The objective of auto-regressive pyramid training: one slot, one unit, one pyramid stage.

    Args:
        settings: the objective's section of the run.
        normalize: raw latents c t h w to normalised ones; frame 0 by image statistics, later ones by video statistics.
        device: where latents and text are moved to; None leaves the latents where they are and brings the text there.
    """

    def __init__(
        self,
        settings: ObjectiveSettings,
        normalize: Callable[[Tensor], Tensor],
        device: torch.device | str | None = None,
    ) -> None:
        self.settings = settings
        self.normalize = normalize
        self.device = device
        self.schedule = PyramidSchedule(
            settings.num_pyramid_stages, gamma=settings.gamma, num_train_timesteps=settings.num_train_timesteps
        )

    def __call__(self, model: Model, batch: LatentBatch) -> ObjectiveOutput:
        """Noise every slot of the batch, call the model once, and return its loss.

        Raises:
            ValueError: a batch whose latents do not fit their slots, or a model whose answer does not fit the columns.
        """
        noisy, columns = [], []
        dropped: list[bool] = []
        for slot, latents, text in zip(batch.slots, batch.latents, batch.text, strict=True):
            column, is_dropped = self._noise_slot(slot, latents)
            noisy.append(column)
            dropped.append(is_dropped)
            columns.append(_model_column(column, batch.null_text if is_dropped else text))
        velocities = model(ModelInput(tuple(columns)))
        if len(velocities) != len(noisy):
            raise ValueError(
                f"flow matching: the model returned {len(velocities)} velocities for {len(noisy)} columns; one each."
            )
        losses = torch.stack([velocity_loss(v, column.target) for v, column in zip(velocities, noisy, strict=True)])
        weights = torch.tensor(batch.weights, dtype=torch.float32, device=losses.device)
        slot_losses = losses.detach()
        return ObjectiveOutput(
            loss=(weights * losses).sum() / batch.global_num_slots,
            slot_losses=slot_losses,
            metrics=self._metrics(batch, noisy, dropped, slot_losses),
        )

    def _noise_slot(self, slot: Slot, raw_latents: Tensor) -> tuple[NoisyColumn, bool]:
        """Return the noised slot, and whether its prompt is dropped."""
        if raw_latents.ndim != 4 or raw_latents.shape[1] != slot.unit:
            raise ValueError(
                f"flow matching: slot {slot.index} of step {slot.step} (record {slot.key!r}) trains unit {slot.unit}, "
                f"but its latents are {tuple(raw_latents.shape)}; give c t h w cut to t = unit."
            )
        device = raw_latents.device if self.device is None else self.device
        latents = self.normalize(to_device(raw_latents, device))
        history, clean = latents[:, :-1], latents[:, -1:]
        clips, levels = history_clips(history, slot.pyramid_stage, self.schedule.num_stages)
        draws = draw_slot(slot.seed, clean.shape, [clip.shape for clip in clips], device)
        column = make_column(
            clips,
            levels,
            clean,
            draws,
            pyramid_stage=slot.pyramid_stage,
            schedule=self.schedule,
            history_ceiling=self._history_ceiling(slot.step),
            is_history_noise_by_index=self.settings.history_noise == "by_index",
        )
        return column, float(draws.text_drop) < self.settings.cfg_dropout

    def _history_ceiling(self, step: int) -> float:
        settings = self.settings
        match settings.history_noise:
            case "by_step":
                return history_noise_ceiling(step, settings.history_noise_max, settings.history_noise_ramp_steps)
            case "by_index":
                return settings.history_noise_max
            case _:
                assert_never(settings.history_noise)

    def _metrics(
        self, batch: LatentBatch, noisy: Sequence[NoisyColumn], dropped: Sequence[bool], slot_losses: Tensor
    ) -> dict[str, Tensor]:
        counted = [weight > 0 for weight in batch.weights]
        stages = [slot.pyramid_stage for slot in batch.slots]
        quantiles = [min(int((1.0 - c.ratio) * NUM_TIMESTEP_QUANTILES), NUM_TIMESTEP_QUANTILES - 1) for c in noisy]
        metrics = {}
        for stage in range(self.schedule.num_stages):
            chosen = [use and stage == other for use, other in zip(counted, stages, strict=True)]
            metrics[f"loss_pyramid_stage_{stage}"] = _sum_and_count(slot_losses, chosen)
        for quantile in range(NUM_TIMESTEP_QUANTILES):
            chosen = [use and quantile == other for use, other in zip(counted, quantiles, strict=True)]
            metrics[f"loss_timestep_quantile_{quantile}"] = _sum_and_count(slot_losses, chosen)
        metrics["text_dropped"] = _sum_and_count(slot_losses.new_tensor(dropped), counted)
        return metrics


def _model_column(column: NoisyColumn, text: TextFeatures) -> Column:
    device = column.target.device
    timestep = torch.tensor(column.timestep, dtype=torch.float32, device=device)
    return Column(column.clips, column.levels, text.to(device), timestep)


def _sum_and_count(values: Tensor, chosen: Sequence[bool]) -> Tensor:
    """[2]: sum of the chosen values, and how many; a value that is not chosen cannot spoil the sum, not even NaN."""
    mask = torch.tensor(chosen, dtype=torch.bool, device=values.device)
    return torch.stack([values.where(mask, 0.0).sum(), mask.sum().to(values.dtype)])
