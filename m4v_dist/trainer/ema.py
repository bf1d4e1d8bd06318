"""Moving average of the weights, sharded as the weights are: float32, the same parameter ranges on the same rank.

The decay warms up: after n updates it is min(decay, (1 + n) / (10 + n)). A run shorter than 1 / (1 - decay) steps would
otherwise sample from weights that are mostly the random start.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from m4v_dist.trainer.zero_slices import Slice


def decay_at(decay: float, num_updates: int) -> float:
    """Decay of the update that follows `num_updates` earlier ones."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


class Ema:
    """The average of what one rank owns.

    Args:
        slices: the rank's slices; the average begins as a copy of their weights.
        decay: ceiling of the decay.
    """

    def __init__(self, slices: Sequence[Slice], decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.ranges = [(item.name, item.start) for item in slices]
        self.averages: list[Tensor] = [item.weight.detach().clone() for item in slices]

    @torch.no_grad()
    def update(self, slices: Sequence[Slice]) -> None:
        """Move towards the weights; call once after each step that moved them."""
        step = 1.0 - decay_at(self.decay, self.num_updates)
        for average, item in zip(self.averages, slices, strict=True):
            average.lerp_(item.weight, step)
        self.num_updates += 1
