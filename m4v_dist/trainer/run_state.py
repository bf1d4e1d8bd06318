"""Engine and average as the tensors of a checkpoint, and back."""

from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.deepspeed_engine import ZeroEngine
from m4v_dist.trainer.ema import Ema
from m4v_dist.trainer.ranges import Ranges, to_ranges

MOMENTS = ("exp_avg", "exp_avg_sq")


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
        **to_ranges("ema", average, shapes),
        **to_ranges("exp_avg", first, training),
        **to_ranges("exp_avg_sq", second, training),
    }


def load_tensors(path: str, engine: ZeroEngine, ema: Ema) -> None:
    """Fill this rank's part of engine and average from a committed checkpoint; `engine.publish()` must follow.

    Moments of a parameter that was frozen at the save are not stored: they stay zero, and with the group's own step
    counter at zero its AdamW begins anew.

    Raises:
        DataError: the checkpoint is of another model.
        DamagedCheckpointError: it is not what was written.
    """
    stored = {f"{kind}/{name}" for kind in MOMENTS for name in checkpoint.stored_names(path, kind)}
    tensors = checkpoint_tensors(engine, ema, to_load=True)
    wanted = {key: ranges for key, ranges in tensors.items() if key.split("/", 1)[0] not in MOMENTS or key in stored}
    checkpoint.load(path, wanted)
