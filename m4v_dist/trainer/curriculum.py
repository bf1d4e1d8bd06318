"""Which curriculum stage a step belongs to; pure numbers.

A curriculum stage is a range of global steps with its own data, learning rate, freeze set and micro-batch. At
its boundary the trainer commits a checkpoint, builds a new engine and loads that checkpoint into it: the same path as a
resume, so a boundary cannot carry over anything that a restart would lose.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from m4v_dist.config.training_settings import CurriculumStageSettings


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
