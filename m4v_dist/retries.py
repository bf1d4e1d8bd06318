"""Wait for what is slow or may pass by itself: bounded in time, logged, and counted by whoever wants to know.

Floor 1 of the house: the standard library only. What may pass is the caller's to say.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 8.0

Answer = TypeVar("Answer")


@dataclass
class RetryCount:
    """How often something was tried again inside a `count_retries` block."""

    num_retries: int = 0


_counting: ContextVar[RetryCount | None] = ContextVar("counting", default=None)


@contextmanager
def count_retries() -> Iterator[RetryCount]:
    """Count the retries of this thread while the block runs."""
    count = RetryCount()
    token = _counting.set(count)
    try:
        yield count
    finally:
        _counting.reset(token)


def retrying(call: Callable[[], Answer], *, may_pass: Callable[[Exception], bool], what: str, limit_s: float) -> Answer:
    """Call, and call again after growing pauses while it fails with errors that may pass.

    Args:
        call: may be called several times.
        may_pass: of an error, whether to try again; any other is raised at once.
        what: for the log.
        limit_s: no new try begins later than this many seconds after the first failure; its error is raised.
    """
    first_failure: float | None = None
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return call()
        except Exception as error:
            now = time.monotonic()
            first_failure = now if first_failure is None else first_failure
            if not may_pass(error) or now + pause_s - first_failure > limit_s:
                raise
            logger.warning(
                "%s: %s: %s; trying again in %.1f s (for %.0f of at most %.0f s so far).",
                what, type(error).__name__, error, pause_s, now - first_failure, limit_s,
            )  # fmt: skip
        count = _counting.get()
        if count is not None:
            count.num_retries += 1
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def within(call: Callable[[], Answer], *, limit_s: float, what: str) -> Answer:
    """The answer of `call`, or its error, if it comes in time.

    It runs in a thread of its own, which goes on, unheard, where the limit is passed: no way to end it is known that
    also ends a request to a store, or a read of a mount that hangs.

    Args:
        call: what may hang.
        limit_s: how long it is waited for.
        what: for the message.

    Raises:
        TimeoutError: no answer within `limit_s`.
    """
    answers: list[Answer] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(call())
        except BaseException as error:  # handed to the thread that waits, which raises it
            errors.append(error)

    # A daemon: what hangs must not keep the process alive.
    thread = threading.Thread(target=run, name=what, daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"{what}: no answer in {limit_s:.1f} s.")
    return answers[0]
