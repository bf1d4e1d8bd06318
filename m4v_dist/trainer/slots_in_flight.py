"""Which records a step trains on: named where the step goes wrong, so that a person finds them."""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from m4v_dist.batch import LatentBatch, Slot

logger = logging.getLogger(__name__)

MAX_SHOWN = 8
"""Slots that a line of the log names; the row of metrics.jsonl names them all."""


@dataclass(frozen=True)
class SlotInFlight:
    """One slot of a step.

    Args:
        rank: that trained it.
        index: in the global batch.
        record: `source/key`.
        unit, pyramid_stage: what was trained of it.
        loss: its own, before its weight; NaN or infinite is what is looked for.
    """

    rank: int
    index: int
    record: str
    unit: int
    pyramid_stage: int
    loss: float

    @property
    def is_finite(self) -> bool:
        """Whether the loss is a number."""
        return math.isfinite(self.loss)


def record_of(slot: Slot) -> str:
    """How a record is named to people: `source/key`."""
    return f"{slot.source}/{slot.key}"


def slots_in_flight(rank: int, batch: LatentBatch, losses: Tensor) -> list[SlotInFlight]:
    """The slots of one micro-batch that count, fillers left out.

    Args:
        rank: of this process.
        batch: the micro-batch.
        losses: [slots], each slot's own.
    """
    return [
        SlotInFlight(rank, slot.index, record_of(slot), slot.unit, slot.pyramid_stage, loss)
        for slot, loss, weight in zip(batch.slots, losses.tolist(), batch.weights, strict=True)
        if weight
    ]


def once(slots: Sequence[SlotInFlight]) -> list[SlotInFlight]:
    """Each slot once, by index, though all ranks that share a sequence hold it: told by one that is not finite, if any.

    Args:
        slots: of all ranks.
    """
    found: dict[int, SlotInFlight] = {}
    for slot in sorted(slots, key=lambda slot: (slot.index, slot.is_finite, slot.rank)):
        found.setdefault(slot.index, slot)
    return list(found.values())


def skipped_row(slots: Sequence[SlotInFlight], *, step: int, loss: float) -> dict[str, Any]:
    """Log the suspects of a skipped step and return its row.

    They are the slots whose loss is not finite; where all are finite, the gradient was not, and any slot may be it.

    Args:
        slots: of all ranks.
        step: that was skipped.
        loss: of the step.
    """
    suspects = [slot for slot in slots if not slot.is_finite]
    named = suspects or list(slots)
    what = f"the loss of {len(suspects)} of {len(slots)} slots" if suspects else "no slot's loss, but the gradient"
    shown = ", ".join(f"{s.record} (slot {s.index}, rank {s.rank}, loss {s.loss!r})" for s in named[:MAX_SHOWN])
    more = f" and {len(named) - MAX_SHOWN} more" if len(named) > MAX_SHOWN else ""
    logger.warning("step %d: %s was not finite; records: %s%s.", step, what, shown, more)
    return {"train/loss": loss, "num_non_finite_slots": len(suspects), "slots": [asdict(slot) for slot in named]}
