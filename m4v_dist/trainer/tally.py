"""The numbers of one step over all its slots: loss, the objective's metrics, tokens.

Collected per rank as one float64 vector and summed over ranks once, so that a step costs one small reduction. Sequence
ranks hold the same slots and the same loss: the first of each group counts.
"""

import math
from collections.abc import Mapping
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
        means: the objective's metrics, sum / count; those without a count are absent.
        tokens: of all packed segments.
        bad_records: damaged records that the ranks met, summed.
        order: what rank 0 orders for the end of the step (`stopping.Order`).
        has_failed_save: whether any rank's part of a save went wrong.
    """

    loss: float
    means: dict[str, float]
    tokens: int
    bad_records: int
    order: int
    has_failed_save: bool


def train_row(sums: Sums, *, norm: float | None, step_s: float, data_s: float, world_size: int) -> dict[str, float]:
    """One training step as metrics.

    Args:
        sums: of the step.
        norm: of the gradient; None if the step was skipped, which is shown as NaN.
        step_s, data_s: seconds in the step, and waiting for its data.
        world_size: ranks.
    """
    return {
        "train/loss": sums.loss,
        "train/grad_norm": math.nan if norm is None else norm,
        "data/bad_records": sums.bad_records,
        "timing/step_s": step_s,
        "timing/data_s": data_s,
        "perf/tokens_per_sec_per_gpu": sums.tokens / (step_s + data_s) / world_size,
        **{f"train/{name}": value for name, value in sums.means.items()},
    }


class Tally:
    """This rank's part of the sums."""

    def __init__(self) -> None:
        self._tokens = 0
        # Numbers stay on their device until the sum: no device sync in a micro-batch.
        self._losses: list[Tensor] = []
        self._metrics: dict[str, list[Tensor]] = {}

    def add(self, loss: Tensor, metrics: Mapping[str, Tensor], batch: LatentBatch) -> None:
        """Count one micro-batch.

        Args:
            loss: scalar, this micro-batch's share of the global loss.
            metrics: name to [2], sum and count over slots; the same names on every call and rank.
            batch: where they come from.
        """
        self._losses.append(loss.detach())
        for name, value in metrics.items():
            self._metrics.setdefault(name, []).append(value.detach())
        self._tokens += sum(slot.num_tokens for slot, weight in zip(batch.slots, batch.weights, strict=True) if weight)

    def summed(self, mesh: Mesh, *, bad_records: int = 0, order: int = 0, has_failed_save: bool = False) -> Sums:
        """Sum over ranks (collective).

        Args:
            mesh: rank facts.
            bad_records: this rank's count.
            order: rank 0's, and 0 on the others; it travels with the numbers that every step sums anyway.
            has_failed_save: whether this rank's part of a save went wrong; the same.
        """
        losses = torch.stack([value.double() for value in self._losses]).sum().reshape(1).cpu()
        metrics = [torch.stack(values).double().sum(0).cpu() for values in self._metrics.values()]
        counts = torch.tensor([bad_records, self._tokens]).double()
        values = torch.cat([losses, *metrics, counts])
        if mesh.sequence.rank:
            # Not zeros: a loss that is not finite on any rank must show.
            values = values * 0
        # Of any rank, whatever it counts.
        flags = torch.tensor([order, has_failed_save]).double()
        total = mesh.sum_over_ranks(torch.cat([values, flags])).tolist()
        pairs = total[1 : 1 + 2 * len(metrics)]
        bad, tokens, order, failed_saves = (int(value) for value in total[1 + 2 * len(metrics) :])
        return Sums(
            loss=total[0],
            means={
                name: pairs[2 * at] / pairs[2 * at + 1] for at, name in enumerate(self._metrics) if pairs[2 * at + 1]
            },
            tokens=tokens,
            bad_records=bad,
            order=order,
            has_failed_save=failed_saves > 0,
        )
