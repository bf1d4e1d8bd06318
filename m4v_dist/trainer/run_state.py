"""Engine and average as the tensors of a checkpoint, and back."""

import math
from collections.abc import Mapping, Sequence

from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.deepspeed_engine import ZeroEngine
from m4v_dist.trainer.ema import Ema

MOMENTS = ("exp_avg", "exp_avg_sq")


def checkpoint_bytes(shapes: Mapping[str, Sequence[int]]) -> int:
    """Size of a whole checkpoint, in bytes: float32 weights, their average and both moments.

    Args:
        shapes: of all parameters; frozen ones have no moments, which is not looked at.
    """
    return 4 * (2 + len(MOMENTS)) * sum(math.prod(shape) for shape in shapes.values())


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


def load_tensors(path: str, engine: ZeroEngine, ema: Ema) -> None:
    """Fill engine and average from a committed checkpoint (collective).

    Moments of a parameter that was frozen at the save are not stored: they stay zero, and with the group's own step
    counter at zero its AdamW begins anew.

    Raises:
        DataError: the checkpoint is damaged, or of another model.
    """
    stored = {f"{kind}/{name}" for kind in MOMENTS for name in checkpoint.stored_names(path, kind)}
    tensors = checkpoint_tensors(engine, ema, to_load=True)
    wanted = {key: ranges for key, ranges in tensors.items() if key.split("/", 1)[0] not in MOMENTS or key in stored}
    checkpoint.load(path, wanted)
    engine.publish()
