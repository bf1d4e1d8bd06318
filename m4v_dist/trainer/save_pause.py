"""The wait between two tries of a save that must stand: growing, bounded, and cut short by what cannot wait.

A disk that is full, or a mounted store that is gone, answers at once: without a pause all tries that are allowed
(`trainer.max_failed_saves`) are used up before anybody could make room.
"""

import logging
import time
from collections.abc import Callable

from m4v_dist.errors import RunInUseError
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.retries import within
from m4v_dist.trainer.stopping import Order

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 30.0
"""A signal, or a lease that is lost, is noticed in a poll; what the store needs to come back, in one of these."""
POLL_S = 1.0
LEASE_ANSWER_S = 5.0
"""The lease lies in the store that is in trouble: its answer is not waited for longer than that."""


def pause_s(failed_in_a_row: int) -> float:
    """Seconds between a failed try and the next one: 5, 10, 20, and 30 from then on."""
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(failed_in_a_row - 1, 16))


class SavePause:
    """Waits between tries: rank 0, and the others for it.

    Args:
        mesh: rank facts.
        ask_order: asked on rank 0 in each poll: what the requests to stop that stand lead to.
        require_lease: asked on rank 0 behind each pause; raises RunInUseError if another attempt has taken over.
        now, sleep: handed in so that tests can set them.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        ask_order: Callable[[], Order],
        require_lease: Callable[[], None],
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._mesh, self._ask_order, self._require_lease = mesh, ask_order, require_lease
        self._now, self._sleep = now, sleep

    def wait(self, failed_in_a_row: int, obeyed: Order) -> Order:
        """Wait until the next try is due (collective); the order that stands by then.

        Args:
            failed_in_a_row: saves that failed so far.
            obeyed: the order that the save obeys already: only a new one cuts the wait short.

        Raises:
            RunInUseError: on all ranks: another attempt has taken over.
        """
        answer: Order | RunInUseError = obeyed
        if self._mesh.is_main:
            try:
                answer = self._wait(pause_s(failed_in_a_row), obeyed)
                self._look_at_lease()
            except RunInUseError as error:
                # Raised below, on all ranks: else the others would wait for rank 0.
                answer = error
        answer = self._mesh.from_main(answer)
        if isinstance(answer, RunInUseError):
            raise answer
        return Order(answer)

    def _wait(self, seconds: float, obeyed: Order) -> Order:
        end = self._now() + seconds
        while (left_s := end - self._now()) > 0:
            self._sleep(min(POLL_S, left_s))
            order = self._ask_order()
            # A wish to save and go on is told once. It counts as seen to when it is asked for again: not before a try.
            if order > obeyed or order is Order.SAVE:
                return max(order, obeyed)
        return obeyed

    def _look_at_lease(self) -> None:
        try:
            within(self._require_lease, limit_s=LEASE_ANSWER_S, what="the lease")
        except OSError as error:
            logger.warning("whether the lease is still held is not known, and is asked again at the commit: %s", error)
