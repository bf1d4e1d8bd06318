"""What stops a run from going wrong quietly: a ceiling on steps that are not finite, and the time between events."""

import logging
import time
from collections.abc import Callable

from m4v_dist.errors import NonFiniteError

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
