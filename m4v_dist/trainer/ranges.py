"""What one rank holds of flat tensors: the currency between engine, average and checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BYTES_A_VALUE = 4


@dataclass(frozen=True)
class Ranges:
    """What this rank holds of one flat tensor: a list of (first element, 1-d float32 values).

    Values are views: read from, and loaded into, in place.
    """

    num_elements: int
    parts: tuple[tuple[int, Tensor], ...]


def to_ranges(kind: str, owned: Sequence[tuple[str, int, Tensor]], shapes: Mapping[str, Any]) -> dict[str, Ranges]:
    """Key what a rank owns by `<kind>/<parameter>`; parameters that it owns nothing of have no parts.

    Args:
        kind: weights, ema, exp_avg or exp_avg_sq.
        owned: (parameter, first element, 1-d values).
        shapes: of all parameters to be named, in model order.
    """
    parts: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in shapes}
    for name, start, values in owned:
        parts[name].append((start, values.detach()))
    return {f"{kind}/{name}": Ranges(torch.Size(shapes[name]).numel(), tuple(found)) for name, found in parts.items()}
