"""The numbers of one step over all its slots: loss, loss per pyramid stage, tokens and samples per source.

Collected per rank as one float64 vector and summed over ranks once, so that a step costs one small reduction.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m4v_dist.batch import LatentBatch
from m4v_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class Sums:
    """Numbers of the global batch, equal on all ranks.

    Args:
        loss: sum over slots of weight * loss / S.
        stage_losses: mean loss of the slots of each pyramid stage that had any.
        tokens: of all packed segments.
        samples: slots per source, fillers left out.
        full_tokens: tokens per source, counted without a pyramid.
    """

    loss: float
    stage_losses: dict[int, float]
    tokens: int
    samples: dict[str, int]
    full_tokens: dict[str, int]


class Tally:
    """This rank's part of the sums.

    Args:
        num_pyramid_stages: resolution levels.
        sources: names that samples are counted for; others are not counted.
    """

    def __init__(self, num_pyramid_stages: int, sources: Sequence[str]) -> None:
        self.num_stages, self.sources = num_pyramid_stages, tuple(sources)
        # The loss stays on its device until the sum: no device sync in a micro-batch.
        self._losses: list[Tensor] = []
        self._stage_losses: list[tuple[Tensor, Tensor, Tensor]] = []
        self._tokens = 0
        self._samples = dict.fromkeys(self.sources, 0)
        self._full_tokens = dict.fromkeys(self.sources, 0)

    def add(self, loss: Tensor, slot_losses: Tensor, batch: LatentBatch) -> None:
        """Count one micro-batch.

        Args:
            loss: scalar, this micro-batch's share of the global loss.
            slot_losses: one per slot, detached.
            batch: where the losses come from.
        """
        self._losses.append(loss.detach())
        stages = torch.tensor([slot.pyramid_stage for slot in batch.slots])
        self._stage_losses.append((slot_losses, stages, torch.tensor(batch.weights, dtype=torch.float64)))
        for slot, weight in zip(batch.slots, batch.weights, strict=True):
            self._tokens += slot.num_tokens
            if weight > 0 and slot.source in self._samples:
                self._samples[slot.source] += 1
                self._full_tokens[slot.source] += slot.num_full_tokens

    def summed(self, mesh: Mesh) -> Sums:
        """Sum over ranks (collective)."""
        sums, weights = torch.zeros(self.num_stages, dtype=torch.float64), torch.zeros(self.num_stages).double()
        for losses, stages, slot_weights in self._stage_losses:
            sums.index_add_(0, stages, losses.detach().cpu().double() * slot_weights)
            weights.index_add_(0, stages, slot_weights)
        loss = torch.stack([value.cpu().double() for value in self._losses]).sum().reshape(1)
        counts = torch.tensor([self._tokens, *self._samples.values(), *self._full_tokens.values()]).double()
        total = mesh.sum_over_ranks(torch.cat([loss, sums, weights, counts]))
        loss, sums, weights, counts = total.split([1, self.num_stages, self.num_stages, len(counts)])
        tokens, *others = (int(value) for value in counts.tolist())
        samples, full_tokens = others[: len(self.sources)], others[len(self.sources) :]
        means = {k: float(sums[k] / weights[k]) for k in range(self.num_stages) if float(weights[k]) > 0}
        return Sums(
            loss=float(loss),
            stage_losses=means,
            tokens=tokens,
            samples=dict(zip(self.sources, samples, strict=True)),
            full_tokens=dict(zip(self.sources, full_tokens, strict=True)),
        )
