"""Classifier-free guidance: how strong it is for a unit, and how two velocities become one.

With guidance g the sampler follows null + g (text - null): 1 is the plain prompt, more leans away from the empty one,
or from a negative prompt in its place.

Source: Ho and Salimans (arXiv 2207.12598); PyramidFlow pyramid_dit/pyramid_dit_for_video_gen_pipeline.py at 3040d71
(first and later units, linear decay).

Legend: `c` channels, `t` latents in time, `h` `w` grid.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from m4v_dist.batch import Column, ModelInput, TextFeatures

Model = Callable[[ModelInput], Sequence[Tensor]]
"""Returns one velocity per column, of the shape of its last clip."""

LINEAR_DECAY = 0.5
LINEAR_FLOOR = 2.0


def unit_guidance(unit: int, first: float, later: float, *, is_linear: bool = False) -> float:
    """Return the guidance of a unit.

    Args:
        unit: number of the latent, from 1.
        first: guidance of unit 1.
        later: guidance of all others.
        is_linear: instead, fall by 0.5 per unit from `first`, down to 2, and never read `later`.
    """
    if is_linear:
        return max(first - LINEAR_DECAY * (unit - 1), LINEAR_FLOOR)
    return first if unit == 1 else later


def combine(null_velocity: Tensor, text_velocity: Tensor, guidance: float) -> Tensor:
    """Follow the prompt away from the null prompt: null + guidance * (text - null); c t h w each."""
    return null_velocity + guidance * (text_velocity - null_velocity)


def guided_velocities(
    model: Model,
    clips: Sequence[tuple[Tensor, ...]],
    levels: tuple[int, ...],
    text: Sequence[TextFeatures],
    null_text: TextFeatures,
    *,
    timestep: Tensor,
    guidance: float,
) -> list[Tensor]:
    """Ask the model once for all prompts and combine the answers.

    The columns are [every prompt with the null text, every prompt with its own]; at guidance 1 the first half would be
    multiplied by 0, so it is not computed.

    Args:
        clips: per prompt, history old to new, then the noisy latent; c t h w each.
        levels: pyramid stage of each clip, the same for all prompts.
        text: per prompt.
        null_text: the empty (or a negative) prompt.
        timestep: scalar float32 in [0, 1000].
        guidance: strength.

    Returns:
        Per prompt, the velocity: c t h w, float32.

    Raises:
        ValueError: the model did not answer with one velocity per column, of the shape of its last clip.
    """
    texts = [*text] if guidance == 1.0 else [null_text] * len(text) + [*text]
    all_clips = [*clips] if guidance == 1.0 else [*clips, *clips]
    columns = tuple(
        Column(column_clips, levels, column_text, timestep)
        for column_clips, column_text in zip(all_clips, texts, strict=True)
    )
    velocities = [velocity.float() for velocity in model(ModelInput(columns))]
    wanted, given = [tuple(c.clips[-1].shape) for c in columns], [tuple(v.shape) for v in velocities]
    if wanted != given:
        raise ValueError(f"sampler: the model returned velocities of shapes {given} for noisy latents {wanted}.")
    if guidance == 1.0:
        return velocities
    null_half, text_half = velocities[: len(text)], velocities[len(text) :]
    return [combine(null, own, guidance) for null, own in zip(null_half, text_half, strict=True)]
