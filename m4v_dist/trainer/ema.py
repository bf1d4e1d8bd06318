"""Moving average of the weights, sharded as the weights are: float32, the same parameter ranges on the same rank.

A parameter that no curriculum stage trains (the base under LoRA) has none: its average is itself.

The decay warms up: after n updates it is min(decay, (1 + n) / (10 + n)). A run shorter than 1 / (1 - decay) steps would
otherwise sample from weights that are mostly the random start.
"""

from collections.abc import Callable, Collection, Sequence

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
        is_averaged: whether the parameter of a name has an average.
    """

    def __init__(
        self, slices: Sequence[Slice], decay: float, is_averaged: Callable[[str], bool] = lambda _name: True
    ) -> None:
        self.decay, self.is_averaged = decay, is_averaged
        self.num_updates = 0
        averaged = self._averaged(slices)
        self.ranges = [(item.name, item.start) for item in averaged]
        self.averages: list[Tensor] = [item.weight.detach().clone() for item in averaged]

    @torch.no_grad()
    def update(self, slices: Sequence[Slice]) -> None:
        """Move towards the weights; call once after each step that moved them."""
        step = 1.0 - decay_at(self.decay, self.num_updates)
        for average, item in zip(self.averages, self._averaged(slices), strict=True):
            average.lerp_(item.weight, step)
        self.num_updates += 1

    @torch.no_grad()
    def begin(self, slices: Sequence[Slice], stored: Collection[str]) -> None:
        """Begin at the weights where a checkpoint has no average: what did not train until now.

        Args:
            slices: the weights as they were loaded.
            stored: names of the parameters whose average was loaded.
        """
        for average, item in zip(self.averages, self._averaged(slices), strict=True):
            if item.name not in stored:
                average.copy_(item.weight)

    def _averaged(self, slices: Sequence[Slice]) -> list[Slice]:
        return [item for item in slices if self.is_averaged(item.name)]
