"""Parameter groups and the learning rate, as pure functions.

A group is named `<block set>/<decay or no_decay>`. Each freezable set of blocks has groups of its own, because a group
has one AdamW step counter: blocks that are unfrozen later then begin with a fresh counter and fresh moments, instead of
inheriting a bias correction that is not theirs.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from m4v_dist.config.training_settings import CurriculumStageSettings

NO_DECAY_NAMES = ("A_log", "D", "dt_bias")
"""Parameters of the scan that weight decay would pull to a meaning of its own (a decay of A_log slows the state)."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share decay and a step counter.

    Args:
        name: stable over restarts; the step counter is saved under it.
        parameter_names: in model order.
        decays: whether weight decay applies.
    """

    name: str
    parameter_names: tuple[str, ...]
    decays: bool


def is_frozen(name: str, freeze: Sequence[str]) -> bool:
    """Whether the parameter `name` belongs to a frozen set: `double_blocks` freezes `double_blocks.<n>...`."""
    return any(name == item or name.startswith(f"{item}.") for item in freeze)


def has_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether AdamW decays this parameter: not 1-d ones (norms, biases, dt), registers, nor the scan's own."""
    last = name.rsplit(".", 1)[-1]
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) > 1 and last not in NO_DECAY_NAMES and "register" not in last


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], freeze: Sequence[str], freezable: Sequence[str] = ("double_blocks",)
) -> tuple[ParameterGroup, ...]:
    """Split the parameters that train into groups; empty groups are left out.

    Args:
        named: the model's parameters with their names, in model order.
        freeze: sets that do not train.
        freezable: sets that any stage may freeze; each has groups of its own.
    """
    members: dict[tuple[str, bool], list[str]] = {}
    for name, parameter in named:
        if is_frozen(name, freeze):
            continue
        block_set = next((item for item in freezable if is_frozen(name, (item,))), "rest")
        members.setdefault((block_set, has_decay(name, parameter)), []).append(name)
    return tuple(
        ParameterGroup(f"{block_set}/{'decay' if decays else 'no_decay'}", tuple(names), decays)
        for (block_set, decays), names in sorted(members.items(), key=lambda item: (item[0][0], not item[0][1]))
    )


def learning_rate(stage: CurriculumStageSettings, step_in_stage: int) -> float:
    """Learning rate of a step: linear warm-up over `warmup_steps`, then the stage's constant rate.

    A function of the step alone, so that a resumed run cannot differ.

    Args:
        stage: the curriculum stage.
        step_in_stage: 0-based.
    """
    if step_in_stage < stage.warmup_steps:
        return stage.learning_rate * (step_in_stage + 1) / stage.warmup_steps
    return stage.learning_rate
