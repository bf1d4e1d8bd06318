"""The numbers of one step over all its slots: loss, the objective's metrics, tokens.

Collected per rank as one float64 vector and summed over ranks once, so that a step costs one small reduction. Sequence
ranks hold the same slots and the same loss: the first of each group counts.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from m4v_dist.batch import LatentBatch
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer.measured import Measured, spread_row, utilization_row
from m4v_dist.trainer.seams import ObjectiveOutput
from m4v_dist.trainer.slots_in_flight import SlotInFlight, once, slots_in_flight


@dataclass(frozen=True)
class Sums:
    """Numbers of the global batch, equal on all ranks.

    Args:
        loss: sum over slots of weight * loss / S.
        means: the objective's metrics, sum / count; those without a count are absent.
        tokens: of all packed segments.
        bad_records: damaged records that the ranks met in this attempt, summed.
        order: what rank 0 orders for the end of the step (`stopping.Order`).
        has_failed_save: whether any rank's part of a save went wrong.
        ranks: what each rank measured of the step; empty where nobody did.
    """

    loss: float
    means: dict[str, float]
    tokens: int
    bad_records: int
    order: int
    has_failed_save: bool
    ranks: tuple[Measured, ...] = ()


def train_row(
    sums: Sums, *, norm: float | None, step_s: float, data_s: float, peak_tflops: float | None
) -> dict[str, float]:
    """One training step as metrics.

    Args:
        sums: of the step, with what each rank measured.
        norm: of the gradient; None if the step was skipped, which is shown as NaN.
        step_s, data_s: seconds in the step, and waiting for its data.
        peak_tflops: of one GPU, or None; see `utilization_row`.
    """
    return {
        "train/loss": sums.loss,
        "train/grad_norm": math.nan if norm is None else norm,
        "data/bad_records": sums.bad_records,
        "timing/step_s": step_s,
        "timing/data_s": data_s,
        "perf/tokens_per_sec_per_gpu": sums.tokens / (step_s + data_s) / len(sums.ranks),
        **utilization_row(sums.ranks, seconds=step_s + data_s, peak_tflops=peak_tflops),
        **spread_row(sums.ranks),
        **{f"train/{name}": value for name, value in sums.means.items()},
    }


class Tally:
    """This rank's part of the sums."""

    def __init__(self) -> None:
        self._tokens = 0
        # Numbers stay on their device until the sum: no device sync in a micro-batch.
        self._losses: list[Tensor] = []
        self._metrics: dict[str, list[Tensor]] = {}
        self._slots: list[tuple[LatentBatch, Tensor]] = []

    def add(self, output: ObjectiveOutput, batch: LatentBatch) -> None:
        """Count one micro-batch.

        Args:
            output: of the objective; its metrics have the same names on every call and rank.
            batch: where it comes from.
        """
        self._losses.append(output.loss.detach())
        for name, value in output.metrics.items():
            self._metrics.setdefault(name, []).append(value.detach())
        self._slots.append((batch, output.slot_losses))
        self._tokens += sum(slot.num_tokens for slot, weight in zip(batch.slots, batch.weights, strict=True) if weight)

    def slots_in_flight(self, mesh: Mesh) -> list[SlotInFlight]:
        """The slots of all ranks with their losses (collective): asked for where a step was not finite."""
        mine = [slot for batch, losses in self._slots for slot in slots_in_flight(mesh.rank, batch, losses)]
        return once([slot for part in mesh.gather(mine) for slot in part])

    def summed(
        self,
        mesh: Mesh,
        *,
        bad_records: int = 0,
        order: int = 0,
        has_failed_save: bool = False,
        measured: Measured | None = None,
    ) -> Sums:
        """Sum over ranks (collective).

        Args:
            mesh: rank facts.
            bad_records: this rank's count.
            order: rank 0's, and 0 on the others; it travels with the numbers that every step sums anyway.
            has_failed_save: whether this rank's part of a save went wrong; the same.
            measured: of this rank; every rank gives one, or none does.
        """
        losses = torch.stack([value.double() for value in self._losses]).sum().reshape(1).cpu()
        metrics = [torch.stack(values).double().sum(0).cpu() for values in self._metrics.values()]
        counts = torch.tensor([bad_records, self._tokens]).double()
        values = torch.cat([losses, *metrics, counts])
        if mesh.sequence.rank:
            # Not zeros: a loss that is not finite on any rank must show.
            values = values * 0
        # Of any rank, whatever it counts; and of each rank its own.
        flags = torch.tensor([order, has_failed_save]).double()
        placed = [] if measured is None else [measured.placed(mesh.rank, mesh.world_size)]
        total = mesh.sum_over_ranks(torch.cat([values, flags, *placed])).tolist()
        pairs, rest = total[1 : 1 + 2 * len(metrics)], total[1 + 2 * len(metrics) :]
        bad, tokens, order, failed_saves = (int(value) for value in rest[:4])
        return Sums(
            loss=total[0],
            means={
                name: pairs[2 * at] / pairs[2 * at + 1] for at, name in enumerate(self._metrics) if pairs[2 * at + 1]
            },
            tokens=tokens,
            bad_records=bad,
            order=order,
            has_failed_save=failed_saves > 0,
            ranks=Measured.of_sum(rest[4:]),
        )
