"""Which curriculum stage a step belongs to; pure numbers.

A curriculum stage is a range of global steps with its own data, learning rate, freeze set and micro-batch. At
its boundary the trainer commits a checkpoint, builds a new engine and loads that checkpoint into it: the same path as a
resume, so a boundary cannot carry over anything that a restart would lose.

What carries over: weights, their average (EMA) and its count, AdamW's moments and step counter of each group that
trained, counts of samples and tokens, the number of skipped steps, and how far each source was walked. A walk belongs
to a source and the stage's buckets: the next stage goes on in it where it reads the same sizes, and begins another
where it reads others, which a later stage may come back to.

What begins anew: the warm-up of the learning rate; moments and counter of a set that was frozen until now; the choice
of sources, which are the stage's. Nothing is interpolated between two stages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from m4v_dist.config.training_settings import CurriculumStageSettings
from m4v_dist.trainer.optimizer import is_frozen


@dataclass(frozen=True)
class CurriculumStage:
    """One curriculum stage, placed.

    Args:
        index: position in the curriculum.
        settings: its settings.
        start: first global step.
        stop: first global step of the next stage.
    """

    index: int
    settings: CurriculumStageSettings
    start: int
    stop: int


def curriculum_stages(curriculum: Sequence[CurriculumStageSettings]) -> tuple[CurriculumStage, ...]:
    """Lay the stages end to end."""
    placed, start = [], 0
    for index, settings in enumerate(curriculum):
        placed.append(CurriculumStage(index, settings, start, start + settings.num_steps))
        start += settings.num_steps
    return tuple(placed)


def curriculum_stage_at(curriculum: Sequence[CurriculumStageSettings], step: int) -> CurriculumStage | None:
    """The stage that trains global step `step` (0-based), or None past the end."""
    return next((stage for stage in curriculum_stages(curriculum) if stage.start <= step < stage.stop), None)


def trained_in_some_stage(curriculum: Sequence[CurriculumStageSettings]) -> Callable[[str], bool]:
    """Says of a parameter's name whether any stage trains it; LoRA's base is trained in none."""
    freeze_sets = {stage.freeze for stage in curriculum}
    return lambda name: not all(is_frozen(name, freeze) for freeze in freeze_sets)
