"""Which latent of a clip is trained at which pyramid stage, which past latents the model sees and how noisy they are.

A *unit* is one latent in time, numbered from 1. A column trains (or samples) one unit at one pyramid stage; the latents
before it are its history, coarser the older they are. Training and sampling walk the same functions.

Source: M4V paper eq. 4 (history) and its noise on conditional frames; PyramidFlow
pyramid_dit/pyramid_dit_for_video_gen_pipeline.py at 3040d71 (unit choice, history layout, history noise).

Legend: `c` channels, `t` latents in time, `h` `w` grid; K pyramid stages; a *level* is the pyramid stage of a grid (0
coarsest, K - 1 full size).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from m4v_dist.objective.pyramid_schedule import downsample


class HistoryPart(NamedTuple):
    """One history clip: `num_latents` past latents in a row, all on the grid of `level`."""

    level: int
    num_latents: int


def choose_unit(
    num_units: int, group_size: int, member: int, turn: int, pyramid_stage: int, num_pyramid_stages: int
) -> int:
    """Choose the unit that a member of a sync group trains: deterministic, and balanced in tokens.

    The members of a group read the same clip, so together they train many of its units at once. The finest stage walks
    the units upwards, coarser stages downwards. A group is at one stage, so its members' units differ widely in tokens;
    but a member of all stages' groups together, a row, has about the same tokens whichever member it is.

    The walk wraps, so `num_units` turns of the group train each unit `group_size` times, also when `group_size` does
    not divide `num_units` or exceeds it. Where it divides, this is the choice of the reference (see
    `choose_unit_of_reference`).

    Args:
        num_units: T, latents of the clip; 1 for an image.
        group_size: G, members that share a clip.
        member: position among all readers; only its remainder by `group_size` counts.
        turn: how often this group has had its turn, from 0; grows without bound.
        pyramid_stage: stage that the unit is trained at.
        num_pyramid_stages: K.

    Returns:
        The unit, 1 .. num_units.

    Raises:
        ValueError: a number out of range.
    """
    _check_choice(num_units, group_size, member, turn, pyramid_stage, num_pyramid_stages)
    ascending = (member % group_size + turn * group_size) % num_units + 1
    return ascending if pyramid_stage == num_pyramid_stages - 1 else num_units + 1 - ascending


def choose_unit_of_reference(
    num_units: int, group_size: int, member: int, turn: int, pyramid_stage: int, num_pyramid_stages: int
) -> int:
    """Choose the unit as PyramidFlow does, for comparison: the last T mod G units never reach the finest stage.

    Its turns repeat after T div G, so at T = 31, G = 8 units 25..31 are trained at coarse stages only, and a clip
    shorter than its group cannot be trained at all.

    Args, Returns: as `choose_unit`; the reference calls `turn` the call number, and starts at 1.

    Raises:
        ValueError: a number out of range, or fewer units than members.
    """
    _check_choice(num_units, group_size, member, turn, pyramid_stage, num_pyramid_stages)
    if num_units < group_size:
        raise ValueError(
            f"choose_unit_of_reference: {num_units} units are fewer than the group's {group_size} members, which the "
            "reference cannot do; use choose_unit."
        )
    ascending = member % group_size + 1 + turn % (num_units // group_size) * group_size
    return ascending if pyramid_stage == num_pyramid_stages - 1 else num_units + 1 - ascending


def _check_choice(
    num_units: int, group_size: int, member: int, turn: int, pyramid_stage: int, num_pyramid_stages: int
) -> None:
    if num_units < 1 or group_size < 1 or member < 0 or turn < 0:
        raise ValueError(
            f"choose_unit: num_units={num_units}, group_size={group_size}, member={member}, turn={turn}; the first two "
            "start at 1, the others at 0."
        )
    if not 0 <= pyramid_stage < num_pyramid_stages:
        raise ValueError(
            f"choose_unit: pyramid stage {pyramid_stage} was asked for; there are 0..{num_pyramid_stages - 1}."
        )


def history_layout(num_history: int, pyramid_stage: int) -> tuple[HistoryPart, ...]:
    """Lay out the history of a column, in pure numbers.

    The newest past latent stands on the column's own grid, the next ones on each coarser grid above the coarsest, and
    all older ones share one clip on the coarsest grid.

    Args:
        num_history: latents before the noisy one, 0 or more.
        pyramid_stage: stage of the column.

    Returns:
        The parts, old to new; none for the first unit.
    """
    newest_levels = tuple(range(pyramid_stage, 0, -1)) or (0,)
    single = [HistoryPart(level, 1) for level in newest_levels[:num_history]]
    num_oldest = num_history - len(single)
    oldest = [HistoryPart(0, num_oldest)] if num_oldest else []
    return (*oldest, *reversed(single))


def history_clips(
    latents: Tensor,  # c t h w, normalised
    pyramid_stage: int,
    num_pyramid_stages: int,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Cut the past latents of a column into clips and bring each to its grid.

    Args:
        latents: c t h w, float32, normalised, full size: the t = unit - 1 clean latents before the noisy one; t may be
            0. Gradients pass.
        pyramid_stage: stage of the column.
        num_pyramid_stages: K.

    Returns:
        clips: old to new, each c t' h' w'; empty for the first unit.
        levels: one per clip.

    Raises:
        ValueError: a grid that cannot be halved as often as needed.
    """
    clips: list[Tensor] = []
    parts = history_layout(latents.shape[1], pyramid_stage)
    first = 0
    for part in parts:
        clip = latents[:, first : first + part.num_latents]
        clips.append(to_level(clip, part.level, num_pyramid_stages))
        first += part.num_latents
    return tuple(clips), tuple(part.level for part in parts)


def to_level(latents: Tensor, level: int, num_pyramid_stages: int) -> Tensor:
    """Bring full-size latents to the grid of a level by halving, frame by frame: c t h w to c t h' w'."""
    for _ in range(num_pyramid_stages - 1 - level):
        latents = downsample(latents)
    return latents


def level_grid(grid: tuple[int, int], level: int, num_pyramid_stages: int) -> tuple[int, int]:
    """Return (h, w) of a level for a full-size (h, w).

    Raises:
        ValueError: the grid cannot be halved that often.
    """
    factor = 2 ** (num_pyramid_stages - 1 - level)
    if grid[0] % factor or grid[1] % factor:
        raise ValueError(
            f"pyramid: a grid of {grid[0]}x{grid[1]} latents cannot be divided by {factor} for level {level} of "
            f"{num_pyramid_stages}; choose a bucket whose sides in latents are multiples of it."
        )
    return grid[0] // factor, grid[1] // factor


def num_segment_tokens(
    unit: int, pyramid_stage: int, num_pyramid_stages: int, grid: tuple[int, int], patch_size: int
) -> int:
    """Count the visual tokens of a column: noisy latent and history, without text and registers.

    Args:
        unit: number of the noisy latent, from 1.
        pyramid_stage: stage of the column.
        num_pyramid_stages: K.
        grid: (h, w) of the full-size latents.
        patch_size: side of a token in latents.

    Raises:
        ValueError: a grid that a stage or the patches do not divide.
    """
    if unit < 1:
        raise ValueError(f"num_segment_tokens: unit={unit}; units are numbered from 1.")
    parts = (*history_layout(unit - 1, pyramid_stage), HistoryPart(pyramid_stage, 1))
    total = 0
    for part in parts:
        height, width = level_grid(grid, part.level, num_pyramid_stages)
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"pyramid: the {height}x{width} grid of level {part.level} is not divisible by patch_size={patch_size};"
                f" full-size sides must be multiples of {2 ** (num_pyramid_stages - 1) * patch_size} latents."
            )
        total += part.num_latents * (height // patch_size) * (width // patch_size)
    return total


def history_noise_ceiling(step: int, maximum: float, ramp_steps: int) -> float:
    """Return the largest noise fraction on history at a training step, for `objective.history_noise = "by_step"`.

    The paper has "linearly increasing noise" on conditional frames to steady early training. This reads it as a ceiling
    that grows linearly with the step, from 0 at step 0 to `maximum` at `ramp_steps` and after. `ramp_steps` 0 means
    no ramp. `add_history_noise` has the other reading, in which noise grows along the clip.
    """
    return maximum if ramp_steps == 0 else maximum * min(1.0, step / ramp_steps)


def add_history_noise(
    clips: Sequence[Tensor], noise: Sequence[Tensor], level: float, *, is_by_index: bool = False
) -> tuple[Tensor, ...]:
    """Mix noise into history: each latent becomes c * noise + (1 - c) * latent.

    Args:
        clips: c t h w each, old to new.
        noise: one per clip, of its shape; fresh for each clip.
        level: noise fraction in [0, 1] of the column.
        is_by_index: c grows linearly with the latent's place in time: latent j of i (from 0, over all clips) gets
            level * (j + 1) / i, so that the newest has `level`, as the errors of an auto-regressive sampler grow with
            each latent. Otherwise c is `level` for all.

    Raises:
        ValueError: noise that does not match the clips.
    """
    shapes, noise_shapes = [tuple(clip.shape) for clip in clips], [tuple(part.shape) for part in noise]
    if shapes != noise_shapes:
        raise ValueError(f"history noise: clips have shapes {shapes}, but the noise {noise_shapes}; draw one for each.")
    levels: Sequence[float | Tensor] = _levels_by_index(clips, level) if is_by_index else [level] * len(clips)
    return tuple(c * part + (1.0 - c) * clip for c, clip, part in zip(levels, clips, noise, strict=True))


def _levels_by_index(clips: Sequence[Tensor], level: float) -> list[Tensor]:
    """Per clip, t 1 1: the noise fraction of each of its latents, growing over all clips up to `level`."""
    num_history = sum(clip.shape[1] for clip in clips)
    first, levels = 0, []
    for clip in clips:
        places = torch.arange(first + 1, first + clip.shape[1] + 1, device=clip.device)
        levels.append(rearrange(level * places / num_history, "t -> t 1 1"))
        first += clip.shape[1]
    return levels
