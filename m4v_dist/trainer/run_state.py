"""A run's state as a checkpoint holds it, and back: engine and average as tensors, the counts as JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from m4v_dist.errors import DamagedCheckpointError
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.curriculum import CurriculumStage
from m4v_dist.trainer.deepspeed_engine import ZeroEngine
from m4v_dist.trainer.ema import Ema
from m4v_dist.trainer.guards import SkippedSteps
from m4v_dist.trainer.optimizer import steps_of_groups
from m4v_dist.trainer.random_state import restore_random_state
from m4v_dist.trainer.ranges import Ranges, to_ranges
from m4v_dist.trainer.seams import Loader

MOMENTS = ("exp_avg", "exp_avg_sq")


def checkpoint_bytes(shapes: Mapping[str, Sequence[int]]) -> int:
    """Size of a whole checkpoint, in bytes: float32 weights, their average and both moments.

    Args:
        shapes: of all parameters; frozen ones have no moments, which is not looked at.
    """
    return 4 * (2 + len(MOMENTS)) * sum(math.prod(shape) for shape in shapes.values())


def checkpoint_tensors(engine: ZeroEngine, ema: Ema, *, to_load: bool) -> dict[str, Ranges]:
    """What this rank holds of weights, average and moments, as views; keys are the same on every rank.

    Args:
        engine: its slices.
        ema: the average of the same slices.
        to_load: frozen weights whole where the engine holds them whole, so that each rank reads what it needs.
    """
    slices, shapes = engine.slices_to_load() if to_load else engine.slices(), engine.shapes
    training = {name: shapes[name] for group in engine.groups for name in group.parameter_names}
    weights = [(item.name, item.start, item.weight) for item in slices]
    average = [(name, start, values) for (name, start), values in zip(ema.ranges, ema.averages, strict=True)]
    first = [(item.name, item.start, item.exp_avg) for item in slices if item.exp_avg is not None]
    second = [(item.name, item.start, item.exp_avg_sq) for item in slices if item.exp_avg_sq is not None]
    return {
        **to_ranges("weights", weights, shapes),
        **to_ranges("ema", average, {name: shape for name, shape in shapes.items() if ema.is_averaged(name)}),
        **to_ranges("exp_avg", first, training),
        **to_ranges("exp_avg_sq", second, training),
    }


def counts_to_json(
    curriculum_stage: CurriculumStage, engine: ZeroEngine, ema: Ema, loader: Loader, skipped: SkippedSteps
) -> dict[str, Any]:
    """What a checkpoint's `state.json` holds beside step and world size; rank 0's counts."""
    return {
        "curriculum_stage": {
            "index": curriculum_stage.index,
            "name": curriculum_stage.settings.name,
            "start": curriculum_stage.start,
        },
        "loader": loader.state_dict(),
        "optimizer_steps": engine.optimizer_steps(),
        "ema_updates": ema.num_updates,
        "skipped_steps": skipped.total,
        "shapes": engine.shapes,
    }


def load_run(path: str, engine: ZeroEngine, ema: Ema, loader: Loader, skipped: SkippedSteps) -> None:
    """Bring all that a checkpoint holds back (collective).

    Moments of a parameter that was frozen at the save are not stored: they stay zero, and with the group's own step
    counter at zero its AdamW begins anew. Of a parameter that no stage trained until then no average
    is stored: it begins at the weights.

    Raises:
        DataError: the checkpoint is of another model, or was written by other parameter groups.
        DamagedCheckpointError: some rank found that it is not what was written; the same error on all of them. The
            engine is then half filled, and good for nothing.
    """
    mesh = engine.mesh
    damage: str | None = None
    try:
        state = checkpoint.read_state(path)
        random = checkpoint.read_random_state(path, mesh.rank)
        checkpoint.load(path, checkpoint_tensors(engine, ema, to_load=True), may_miss=("ema", *MOMENTS))
        stored = checkpoint.stored_names(path, MOMENTS[0])
        averaged = checkpoint.stored_names(path, "ema")
    except DamagedCheckpointError as error:
        damage = str(error)
    found = [told for told in mesh.gather(damage) if told is not None]
    if found:
        raise DamagedCheckpointError(found[0])
    steps = steps_of_groups(engine.groups, state["optimizer_steps"], stored, where=path)
    engine.publish()
    engine.set_optimizer_steps(steps)
    ema.begin(engine.slices(), averaged)
    ema.num_updates = state["ema_updates"]
    loader.load_state_dict(state["loader"])
    skipped.total = state["skipped_steps"]
    # Last, after all that could have drawn from it.
    if random is not None:
        restore_random_state(random)
