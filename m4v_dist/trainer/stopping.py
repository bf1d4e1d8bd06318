"""When to save before somebody kills the run: requests to stop, weighed against the time that a save takes.

Rank 0 asks in every step, and its order travels with the numbers that the step sums anyway, so that all ranks obey the
same one. A request with a deadline is obeyed as long as a save fits: a save that would be cut is not begun, since the
checkpoint before it stands, and one that can wait is begun while there is still room for it.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum

from m4v_dist.stop_request import StopRequest

logger = logging.getLogger(__name__)

ASSUMED_BYTES_PER_S = 200e6
"""What a save is taken to write until one was measured: a slow network disk."""
RECENT_STEPS = 100
"""The slowest of these is what one more step is taken to last."""


class Order(IntEnum):
    """What to do at the end of a step; of several the greatest counts."""

    GO_ON = 0
    SAVE = 1
    SAVE_AND_END = 2
    END = 3
    """A save would be cut off, or is not wanted: end without one."""

    @property
    def saves(self) -> bool:
        """Whether a checkpoint is to be written."""
        return self in (Order.SAVE, Order.SAVE_AND_END)


class Stopping:
    """Weighs requests against the clock (rank 0's; the other ranks obey).

    Args:
        margin_s: seconds before a deadline that stay free for ending: a save that can wait begins before them.
        now: UNIX time; handed in so that tests can set it.
    """

    def __init__(self, *, margin_s: float, now: Callable[[], float] = time.time) -> None:
        self._margin_s, self._now = margin_s, now
        self._save_s, self._is_measured = 0.0, False
        self._steps_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._served: set[tuple[str, bool]] = set()
        self._told = (Order.GO_ON, "")
        self.reason = ""
        """Why the last order other than GO_ON was given, with both times."""

    def expect_save(self, size_bytes: float) -> None:
        """Take the size of a checkpoint for an estimate; a save that was measured wins."""
        if not self._is_measured:
            self._save_s = size_bytes / ASSUMED_BYTES_PER_S

    def saved(self, seconds: float) -> None:
        """Note how long a save took, from its beginning until it was committed."""
        self._save_s, self._is_measured = seconds, True

    def stepped(self, seconds: float) -> None:
        """Note how long a step took, waiting for its data included."""
        self._steps_s.append(seconds)

    def order(
        self, requests: Sequence[StopRequest], *, upcoming_s: float = 0.0, saving_since: float | None = None
    ) -> Order:
        """Say what to do at the end of the step that is being done.

        Args:
            requests: all that stand; one that does not end the run is served once at once, and once more at the
                last moment before its deadline.
            upcoming_s: what comes before the next step beside it, such as a held-out loss.
            saving_since: UNIX time at which a save that is still being written began: the next one waits for it.
        """
        busy_s = 0.0 if saving_since is None else max(0.0, self._save_s - (self._now() - saving_since))
        given, why = Order.GO_ON, ""
        for request in requests:
            order = self._order_of(request, upcoming_s, busy_s)
            if order > given:
                given, why, self.reason = order, request.why, self._in_words(request, order, busy_s)
        # Once: between the tries of a save that fails it is asked each second.
        if given is not Order.GO_ON and (given, why) != self._told:
            logger.warning("%s.", self.reason)
        self._told = (given, why)
        return given

    def _order_of(self, request: StopRequest, upcoming_s: float, busy_s: float) -> Order:
        if request.ends and not request.saves:
            return Order.END
        left_s = self._left_s(request)
        step_s, save_s = max(self._steps_s, default=0.0), busy_s + self._save_s
        # This step has an unknown part to go, and the next chance is after one more.
        is_last_chance = left_s is not None and 2 * step_s + upcoming_s + save_s + self._margin_s > left_s
        # A guess cuts no work: what is not measured is tried.
        fits = left_s is None or not self._is_measured or step_s + save_s <= left_s
        if request.ends:
            if not (request.is_urgent or is_last_chance):
                return Order.GO_ON
            return Order.SAVE_AND_END if fits else Order.END
        for key, is_due in (((request.why, False), request.is_urgent), ((request.why, True), is_last_chance)):
            if is_due and key not in self._served:
                self._served.add(key)
                # At the last moment already: one save does for both.
                self._served.add((request.why, is_last_chance))
                if fits:
                    return Order.SAVE
                logger.warning("%s.", self._in_words(request, Order.END, busy_s))
        return Order.GO_ON

    def _left_s(self, request: StopRequest) -> float | None:
        return None if request.deadline is None else request.deadline - self._now()

    def _in_words(self, request: StopRequest, order: Order, busy_s: float) -> str:
        if not request.saves:
            return f"{request.why}: no save is wanted"
        left_s = self._left_s(request)
        save = f"a save takes {self._save_s:.0f} s{'' if self._is_measured else ' by its size'}"
        save += f" and waits {busy_s:.0f} s for the one in flight" if busy_s else ""
        left = "no deadline known" if left_s is None else f"{max(0.0, left_s):.0f} s left"
        cut = ", so it would be cut off and is not begun" if order is Order.END else ""
        return f"{request.why}: {save}, {left}{cut}"
