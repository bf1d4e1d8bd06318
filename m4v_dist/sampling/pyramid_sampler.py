"""The auto-regressive pyramid sampler: latent after latent, each from the coarsest pyramid stage to full size.

For each unit: noise on the coarsest grid, Euler steps through the stage, upsample, add block noise, steps through the
next stage, and so on. The finished latent joins the history of the next unit, clean (the noise on history in training
is what makes the model stand its errors). The history, the sigmas and the jumps are those of training:
`objective/history.py` and `objective/pyramid_schedule.py`.

Given first latents (a picture's, or the end of another clip) are history like any other, so image to video is the same
walk begun at a later unit.

Source: PyramidFlow pyramid_dit/pyramid_dit_for_video_gen_pipeline.py at 3040d71 (generate, generate_i2v); M4V paper
eq. 4.

Legend: `c` channels, `t` latents in time, `h` `w` grid; K pyramid stages; a unit is one latent, numbered from 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m4v_dist.batch import TextFeatures
from m4v_dist.errors import ConfigError
from m4v_dist.objective.flow_matching import noise_to_level
from m4v_dist.objective.history import history_clips, level_grid
from m4v_dist.objective.pyramid_schedule import PyramidSchedule, block_noise, upsample
from m4v_dist.sampling.guidance import Model, guided_velocities, unit_guidance

DrawNoise = Callable[[int, int, int, tuple[int, int, int, int]], Tensor]
"""(prompt index, unit, pyramid stage, shape c t h w) to noise of that shape. Stage 0 asks for white noise at FULL size
(it is downsampled to the coarsest grid), later stages for block noise on the stage's own grid."""

Progress = Callable[[int, int], None]
"""(Euler steps done, Euler steps in all)."""


@dataclass(frozen=True)
class _Walk:
    """What stays the same over all units of a run of the sampler."""

    model: Model
    text: tuple[TextFeatures, ...]
    null_text: TextFeatures
    schedule: PyramidSchedule
    draw_noise: DrawNoise
    shape: tuple[int, int, int, int]
    device: torch.device


@torch.no_grad()
def sample_latents(
    model: Model,
    text: Sequence[TextFeatures],
    null_text: TextFeatures,
    *,
    schedule: PyramidSchedule,
    num_latents: int,
    grid_height: int,
    grid_width: int,
    channels: int,
    first_unit_steps: Sequence[int],
    later_unit_steps: Sequence[int],
    first_unit_guidance: float,
    later_unit_guidance: float,
    generators: Sequence[torch.Generator] = (),
    device: torch.device | str = "cpu",
    first_latents: Sequence[Tensor] | None = None,
    has_linear_guidance: bool = False,
    draw_noise: DrawNoise | None = None,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Sample one clip of latents per prompt; all prompts go through the model together.

    A prompt's clip depends on its text and its generator only, not on the other prompts; its first n latents do not
    depend on `num_latents`. Nor does the noise of a unit depend on whether the latents before it were
    sampled or given: a clip that is begun again from its own first latents, with the same generator, goes on the same.

    Args:
        model: velocity of each column; put it in eval mode first. Runs without gradient.
        text: one per prompt.
        null_text: the empty (or a negative) prompt.
        schedule: that of training.
        num_latents: length of the clip in latents, the given ones counted.
        grid_height, grid_width: full-size latent grid.
        channels: c.
        first_unit_steps, later_unit_steps: Euler steps for each pyramid stage, of unit 1 and of the others.
        first_unit_guidance, later_unit_guidance: classifier-free guidance, 1 or more.
        generators: one CPU generator per prompt; advanced by the draws. Unused when `draw_noise` is given.
        device: where the model runs.
        first_latents: per prompt c t h w, normalised, the same t < num_latents: the clip begins with them unchanged and
            goes on from them (image to video with t = 1).
        has_linear_guidance: guidance falls by 0.5 a unit from the first to 2, instead of first and later.
        draw_noise: source of noise instead of the generators, to replay recorded draws.
        progress: called after each Euler step.

    Returns:
        Per prompt c t h w with t = num_latents, float32, normalised, on `device`.

    Raises:
        ConfigError: steps, guidance or sizes that cannot work.
        ValueError: counts or shapes of the arguments that do not fit each other, first latents that are not finite, or
            a model that gave NaN or infinity.
    """
    shape = (channels, 1, grid_height, grid_width)
    first_unit = _check_request(text, first_latents, generators, draw_noise, shape, num_latents)
    _check_plan(schedule, grid_height, grid_width, first_unit_steps, later_unit_steps)
    target = torch.device(device)
    walk = _Walk(
        model=model,
        text=tuple(features.to(target) for features in text),
        null_text=null_text.to(target),
        schedule=schedule,
        draw_noise=draw_noise or _generator_noise(generators, schedule, shape, first_unit),
        shape=shape,
        device=target,
    )
    history = [torch.zeros(channels, 0, grid_height, grid_width, device=target) for _ in text]
    if first_latents is not None:
        history = [latents.to(target, torch.float32) for latents in first_latents]
    units = range(first_unit, num_latents + 1)
    steps = {unit: tuple(first_unit_steps if unit == 1 else later_unit_steps) for unit in units}
    count = _Count(sum(sum(stage_steps) for stage_steps in steps.values()), progress)
    for unit in units:
        guidance = unit_guidance(unit, first_unit_guidance, later_unit_guidance, is_linear=has_linear_guidance)
        latents = _sample_unit(walk, history, unit, steps[unit], guidance, count)
        history = [torch.cat([past, latent], dim=1) for past, latent in zip(history, latents, strict=True)]  # c t h w
    return history


class _Count:
    """Counts Euler steps and tells whoever listens."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self.progress = progress
        self.done = 0

    def add_step(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def _sample_unit(
    walk: _Walk, history: Sequence[Tensor], unit: int, steps: Sequence[int], guidance: float, count: _Count
) -> list[Tensor]:
    """Sample one latent per prompt, c 1 h w, given the latents before it."""
    schedule = walk.schedule
    noise = [_draw(walk, prompt, unit, 0, walk.shape) for prompt in range(len(history))]
    latents = [noise_to_level(full_size, 0, schedule.num_stages) for full_size in noise]
    for stage in range(schedule.num_stages):
        if stage > 0:
            latents = [_jump(walk, latent, prompt, unit, stage) for prompt, latent in enumerate(latents)]
        parts = [history_clips(past, stage, schedule.num_stages) for past in history]
        levels = (*parts[0][1], stage)
        timesteps, ratios = schedule.inference_table(stage, steps[stage])
        for step, timestep in enumerate(timesteps):
            velocities = guided_velocities(
                walk.model,
                [(*clips, latent) for (clips, _), latent in zip(parts, latents, strict=True)],
                levels,
                walk.text,
                walk.null_text,
                timestep=timestep.to(walk.device, torch.float32),
                guidance=guidance,
            )
            # The velocity points to the noise and the ratio falls, so this walks towards the data.
            change = float(ratios[step + 1] - ratios[step])
            latents = [latent + change * v for latent, v in zip(latents, velocities, strict=True)]
            count.add_step()
    for prompt, latent in enumerate(latents):
        if not bool(torch.isfinite(latent).all()):
            raise ValueError(
                f"sampler: unit {unit} of prompt {prompt} is not finite; the model's velocities overflowed. Take "
                "another checkpoint, or a lower guidance."
            )
    return latents


def _jump(walk: _Walk, latents: Tensor, prompt: int, unit: int, stage: int) -> Tensor:
    """Carry latents over a stage border: c 1 h w to c 1 2h 2w."""
    alpha, beta = walk.schedule.stage_jump(stage)
    larger = upsample(latents)
    channels, num_latents, height, width = larger.shape
    return alpha * larger + beta * _draw(walk, prompt, unit, stage, (channels, num_latents, height, width))


def _draw(walk: _Walk, prompt: int, unit: int, stage: int, shape: tuple[int, int, int, int]) -> Tensor:
    return walk.draw_noise(prompt, unit, stage, shape).to(walk.device, torch.float32)


def _generator_noise(
    generators: Sequence[torch.Generator],
    schedule: PyramidSchedule,
    full_shape: tuple[int, int, int, int],
    first_unit: int,
) -> DrawNoise:
    """Draw from each prompt's own generator, on the CPU so that the numbers do not depend on the device.

    The draws of the units before `first_unit` are made and left, so that giving them moves no other draw.
    """

    def draw(prompt: int, unit: int, pyramid_stage: int, shape: tuple[int, int, int, int]) -> Tensor:
        white = torch.randn(shape, generator=generators[prompt])
        return white if pyramid_stage == 0 else block_noise(white, schedule.gamma)

    channels, num_latents, height, width = full_shape
    for generator in generators:
        for _ in range(1, first_unit):
            torch.randn(full_shape, generator=generator)
            for stage in range(1, schedule.num_stages):
                grid = level_grid((height, width), stage, schedule.num_stages)
                torch.randn((channels, num_latents, *grid), generator=generator)
    return draw


def _check_request(
    text: Sequence[TextFeatures],
    first_latents: Sequence[Tensor] | None,
    generators: Sequence[torch.Generator],
    draw_noise: DrawNoise | None,
    shape: tuple[int, int, int, int],
    num_latents: int,
) -> int:
    """Return the first unit to sample."""
    if not text:
        raise ValueError("sampler: no prompts; give at least one.")
    if draw_noise is None and len(generators) != len(text):
        raise ValueError(f"sampler: {len(generators)} generators for {len(text)} prompts; give one to each.")
    lengths = {0}
    if first_latents is not None:
        shapes = [tuple(latents.shape) for latents in first_latents]
        lengths = {dims[1] for dims in shapes if len(dims) == 4}
        are_fitting = all(len(dims) == 4 and (dims[0], 1, *dims[2:]) == shape for dims in shapes)
        if len(shapes) != len(text) or len(lengths) != 1 or not are_fitting:
            raise ValueError(
                f"sampler: first latents {shapes} for {len(text)} prompts; give one c t h w to each, of one length t "
                f"and of c, h, w = {shape[0]}, {shape[2]}, {shape[3]}."
            )
        if not all(bool(torch.isfinite(latents).all()) for latents in first_latents):
            raise ValueError("sampler: first latents are not finite; every later latent would come out so.")
    first_unit = lengths.pop() + 1
    if num_latents < first_unit:
        raise ConfigError(
            f"sampler: num_latents={num_latents} leaves nothing to sample after {first_unit - 1} first latents; ask "
            f"for {first_unit} or more, or give fewer."
        )
    return first_unit


def _check_plan(
    schedule: PyramidSchedule, height: int, width: int, first_steps: Sequence[int], later_steps: Sequence[int]
) -> None:
    level_grid((height, width), 0, schedule.num_stages)
    for name, steps in (("first_unit_steps", first_steps), ("later_unit_steps", later_steps)):
        if len(steps) != schedule.num_stages or min(steps) < 1:
            raise ConfigError(
                f"sampler: {name}={tuple(steps)}; give one number of 1 or more for each of the {schedule.num_stages} "
                "pyramid stages."
            )
