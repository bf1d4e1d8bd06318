"""Engine and average as the tensors of a checkpoint, and back."""

from collections.abc import Mapping

from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.deepspeed_engine import ZeroEngine
from m4v_dist.trainer.ema import Ema
from m4v_dist.trainer.optimizer import steps_of_groups

MOMENTS = ("exp_avg", "exp_avg_sq")


def checkpoint_tensors(engine: ZeroEngine, ema: Ema, *, to_load: bool) -> dict[str, checkpoint.Ranges]:
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
        **checkpoint.to_ranges("weights", weights, shapes),
        **checkpoint.to_ranges("ema", average, shapes),
        **checkpoint.to_ranges("exp_avg", first, training),
        **checkpoint.to_ranges("exp_avg_sq", second, training),
    }


def load_tensors(path: str, engine: ZeroEngine, ema: Ema, optimizer_steps: Mapping[str, int]) -> None:
    """Fill engine and average from a committed checkpoint (collective).

    Moments of a parameter that was frozen at the save are not stored: they stay zero, and with the group's own step
    counter at zero its AdamW begins anew.

    Args:
        path: the checkpoint.
        engine, ema: to fill.
        optimizer_steps: the step counters of the groups that wrote it.

    Raises:
        DataError: the checkpoint is damaged, or of another model, or was written by other parameter groups.
    """
    stored = {f"{kind}/{name}" for kind in MOMENTS for name in checkpoint.stored_names(path, kind)}
    with_moments = set(checkpoint.stored_names(path, MOMENTS[0]))
    steps = steps_of_groups(engine.groups, optimizer_steps, with_moments, where=path)
    tensors = checkpoint_tensors(engine, ema, to_load=True)
    wanted = {key: ranges for key, ranges in tensors.items() if key.split("/", 1)[0] not in MOMENTS or key in stored}
    checkpoint.load(path, wanted)
    engine.publish()
    engine.set_optimizer_steps(steps)
