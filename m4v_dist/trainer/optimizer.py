"""Parameter groups and learning rates, as pure functions.

A group is named `<set>/<decay or no_decay>`. Each set that may freeze, or that has a learning rate of its own, has
groups of its own, because a group has one AdamW step counter: what is unfrozen later then begins with a fresh counter
and fresh moments, instead of inheriting a bias correction that is not theirs.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from m4v_dist.config.training_settings import CurriculumStageSettings
from m4v_dist.errors import DataError

ParameterSet = Literal["adapters", "double_blocks", "embedders", "fresh", "rest"]
"""What a parameter belongs to, by its name: see `parameter_set`."""
EMBEDDERS = ("conditioning", "text_in", "video_in")
FRESH_COMPONENTS = ("ssm", "registers", "temporal_branch")
"""A parameter one of whose name's components is among these is fresh: an SSM mixer, a register, a temporal branch."""
NO_DECAY_NAMES = ("A_log", "D", "dt_bias")
"""Parameters of the scan that weight decay would pull to a meaning of its own (a decay of A_log slows the state)."""
SPLIT_OFF = {"embedders": "rest", "fresh": "rest"}
"""A set to the one that held its parameters in checkpoints written before it had groups of its own."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share decay, learning rate and a step counter.

    Args:
        name: stable over restarts; the step counter is saved under it.
        parameter_names: in model order.
        decays: whether weight decay applies.
    """

    name: str
    parameter_names: tuple[str, ...]
    decays: bool

    @property
    def is_fresh(self) -> bool:
        """Whether the learning rate of fresh parameters applies."""
        return self.name.startswith("fresh/")


def parameter_set(name: str) -> ParameterSet:
    """The one set of a parameter.

    `fresh` is what begins without trained weights when a model warm-starts from one with attention: all of an SSM mixer
    (also the rows of its projection that attention's weights fill: a group cannot cut a parameter), the registers and
    the temporal branch.
    """
    components = name.split(".")
    if components[-1].startswith("lora_"):
        return "adapters"
    if components[0] == "double_blocks":
        return "double_blocks"
    if components[0] in EMBEDDERS:
        return "embedders"
    if any(component in FRESH_COMPONENTS for component in components):
        return "fresh"
    return "rest"


def is_frozen(name: str, freeze: Sequence[str]) -> bool:
    """Whether the parameter `name` belongs to a frozen set; `base` is all sets but the adapters'."""
    of_set = parameter_set(name)
    return of_set in freeze or ("base" in freeze and of_set != "adapters")


def has_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether AdamW decays this parameter: not 1-d ones (norms, biases, dt), registers, nor the scan's own.

    Taps of a convolution decay, as they do in Mamba.
    """
    last = name.rsplit(".", 1)[-1]
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) > 1 and last not in NO_DECAY_NAMES and "register" not in last


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], freeze: Sequence[str]) -> tuple[ParameterGroup, ...]:
    """Split the parameters that train into groups; empty groups are left out.

    Args:
        named: the model's parameters with their names, in model order.
        freeze: sets that do not train.
    """
    members: dict[tuple[str, bool], list[str]] = {}
    for name, parameter in named:
        if not is_frozen(name, freeze):
            members.setdefault((parameter_set(name), has_decay(name, parameter)), []).append(name)
    return tuple(
        ParameterGroup(f"{of_set}/{'decay' if decays else 'no_decay'}", tuple(names), decays)
        for (of_set, decays), names in sorted(members.items(), key=lambda item: (item[0][0], not item[0][1]))
    )


def steps_of_groups(
    groups: Sequence[ParameterGroup], saved: Mapping[str, int], stored: Collection[str], *, where: str
) -> dict[str, int]:
    """Each group's AdamW step counter from a checkpoint; 0 for a group that has no moments in it (it was frozen).

    Args:
        groups: of the model that goes on.
        saved: counters by the names of the groups that wrote the checkpoint.
        stored: parameters whose moments are in it.
        where: the checkpoint, for messages.

    Raises:
        DataError: a group has moments for a part of its parameters only, or no counter: it was written by groups that
            this code does not know.
    """
    steps: dict[str, int] = {}
    for group in groups:
        of_set, kind = group.name.split("/")
        names = [group.name, f"{SPLIT_OFF.get(of_set, of_set)}/{kind}"]
        num_stored = sum(name in stored for name in group.parameter_names)
        counter = next((saved[name] for name in names if name in saved), None)
        if num_stored not in (0, len(group.parameter_names)) or (num_stored and counter is None):
            raise DataError(
                f"{where}: parameter group {group.name!r} has moments for {num_stored} of its "
                f"{len(group.parameter_names)} parameters and the checkpoint has step counters for {sorted(saved)}; it "
                "was written by a version with other groups: go on with that version, or begin a new run.folder from "
                "its weights."
            )
        steps[group.name] = counter if num_stored and counter is not None else 0
    return steps


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
