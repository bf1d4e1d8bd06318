"""What stops a run from going wrong quietly: a ceiling on steps that are not finite, the records of ranks that share a
sequence, and the time between events.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence

import torch

from m4v_dist.batch import LatentBatch
from m4v_dist.errors import NonFiniteError
from m4v_dist.parallel.mesh import Mesh

logger = logging.getLogger(__name__)


class SkippedSteps:
    """Counts steps that all ranks skipped; past a ceiling the run fails.

    Args:
        ceiling: skipped steps in a row that are allowed.
    """

    def __init__(self, ceiling: int) -> None:
        self.ceiling = ceiling
        self.in_a_row = 0
        self.total = 0

    def record(self, *, step: int, is_applied: bool, loss: float) -> None:
        """Note a step; `require_finite` says later, once the step's row is written, whether it was one too many."""
        if is_applied:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.total += 1
        logger.warning("step %d skipped on all ranks: loss %r or its gradient is not finite.", step, loss)

    def require_finite(self, *, step: int, loss: float) -> None:
        """Go on, or not, after the step that was just noted.

        Raises:
            NonFiniteError: the ceiling is passed.
        """
        if self.in_a_row > self.ceiling:
            raise NonFiniteError(
                f"step {step}: {self.in_a_row} steps in a row were not finite (last loss {loss!r}), more than "
                f"trainer.max_skipped_steps={self.ceiling}; the weights are those of the last finite step. Lower the "
                'learning rate, or look at the records that their rows of kind "skipped" in metrics.jsonl name.'
            )


def require_same_slots(mesh: Mesh, micro_batches: Sequence[LatentBatch]) -> None:
    """Check that all ranks of each sequence group hold the same micro-batches (collective, with more than one).

    Before their first exchange: ranks that count other tokens would wait for one another without end. It can happen
    only where one rank reads a record as damaged that the others read well.

    Raises:
        RuntimeError: on all ranks; a restart reads the records anew.
    """
    if mesh.sequence.size == 1:
        return
    slots = [(slot.source, slot.key, slot.seed) for batch in micro_batches for slot in batch.slots]
    digest = int.from_bytes(hashlib.blake2b(repr(slots).encode(), digest_size=5).digest(), "little")
    # Zero if a group agrees; whole numbers below 2^40 times the ranks, so the float64 sum is exact.
    weight = -1 if mesh.sequence.rank else mesh.sequence.size - 1
    if mesh.sum_over_ranks(torch.tensor([weight * digest])).item() != 0:
        raise RuntimeError(
            f"ranks that share a sequence were given different records, here {[key for _, key, _ in slots]}: one of "
            "them met a damaged record that the others did not. Going on from the newest checkpoint reads them anew."
        )


class Clock:
    """Time since the last lap, in seconds; `now` is handed in so that tests can set it."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._last = now()

    def lap(self) -> float:
        """Seconds since the last lap, and start the next."""
        now = self._now()
        elapsed, self._last = now - self._last, now
        return elapsed
