"""What the workers of a run told before they died, and whether that ends the run or restarts it; knows no Ray.

- A `JobError` (wrong config, unusable data, no memory, asked to stop) would fail again in the same way, so it ends the
  run at once. A `StoreError` may pass: it is restarted.
- Any other error is taken for the world's and restarted, also if it is a plain bug: so restarts that bring nothing new
  are counted, and MAX_FRUITLESS_RESTARTS in a row end the run, whatever `launch.max_failures` says.
"""

import logging
from dataclasses import dataclass
from typing import Any

from m4v_dist.errors import JobError, OutOfMemoryJobError, StoreError
from m4v_dist.stop_request import StopRequest

logger = logging.getLogger(__name__)

MAX_FRUITLESS_RESTARTS = 3
"""Restarts in a row without progress that are made; the next one would meet the same fault again."""


@dataclass(frozen=True)
class Failure:
    """What one rank reported before it died.

    Args:
        attempt: worker group, from 1.
        rank: the rank.
        where: host and process.
        summary: error type and message.
        lines: the traceback's text.
        error: the error itself if it must end the run as it is, else None.
    """

    attempt: int
    rank: int
    where: str
    summary: str
    lines: str
    error: JobError | None

    def __str__(self) -> str:
        return f"attempt {self.attempt}, rank {self.rank} ({self.where}): {self.summary}"


class Verdict:
    """A Ray actor beside the workers: collects their errors, and carries requests to stop to them."""

    def __init__(self, max_fruitless_restarts: int = MAX_FRUITLESS_RESTARTS) -> None:
        self._max_fruitless = max_fruitless_restarts
        self._attempt = 0
        self._progress: Any = None
        self._fruitless = 0
        self._failures: list[Failure] = []
        self._requests: dict[str, StopRequest] = {}
        self._handed_out: set[str] = set()
        self._served: set[str] = set()
        self._is_done = False
        self._state = "InitializingState"

    def begin(self, progress: Any) -> int | None:
        """A worker group starts: its number, from 1; None if the run has ended and nothing is to be done.

        Args:
            progress: equal to the last attempt's if nothing was committed since.
        """
        is_fruitless = self._attempt > 0 and progress == self._progress
        self._fruitless = self._fruitless + 1 if is_fruitless else 0
        self._progress = progress
        self._attempt += 1
        # What does not end the run was about the workers before these, or their nodes.
        self._requests = {why: request for why, request in self._requests.items() if request.ends}
        self._handed_out, self._served, self._is_done = set(), set(), False
        return None if self.fatal() is not None or self.has_given_up() else self._attempt

    def has_given_up(self) -> bool:
        """Whether one restart more than allowed began where the one before it did."""
        return self._fruitless > self._max_fruitless

    def record(self, attempt: int, rank: int, where: str, summary: str, lines: str, error: JobError | None) -> None:
        """Note a failure, in the order of arrival; not of workers whose place others have taken.

        Such a rank was taken for dead with its node, and wakes up to find that it has lost its lease. That must not end
        the workers that go on in its place, nor stand for what goes wrong with them.
        """
        if attempt < self._attempt:
            logger.warning("rank %d of attempt %d, which is over, told: %s", rank, attempt, summary)
            return
        self._failures.append(Failure(attempt, rank, where, summary, lines, error))

    def fatal(self) -> JobError | None:
        """The first error that must end the run."""
        return next((failure.error for failure in self._failures if failure.error is not None), None)

    def failures(self) -> list[Failure]:
        """All that was noted."""
        return self._failures

    def ask(self, request: StopRequest) -> None:
        """Ask the function to save, and perhaps to end; the same reason again takes the place of the one before."""
        self._requests[request.why] = request
        self._handed_out.discard(request.why)
        self._served.discard(request.why)

    def stop_requests(self) -> tuple[StopRequest, ...]:
        """All that stand, for rank 0: it asks once a step, so what it was told the time before has been seen to."""
        self._served |= self._handed_out
        self._handed_out = set(self._requests)
        return tuple(self._requests.values())

    def is_served(self, why: str) -> bool:
        """Whether nobody works on a request any more: rank 0 was told it and has asked again, or its attempt is over.

        A commit proves nothing here: it may be of a save that began before the request.
        """
        return why in self._served or why not in self._requests or self._is_done

    def note_done(self) -> None:
        """Rank 0's function has returned: it asks no more."""
        self._is_done = True

    def note_state(self, state: str) -> None:
        """Note the state of Ray Train's controller, by the name of its class."""
        self._state = state

    def is_waiting(self) -> bool:
        """Whether no worker is up, so that nobody hears a request."""
        return self._state in ("InitializingState", "SchedulingState", "ReschedulingState", "RestartingState")

    def is_attempt_whole(self) -> bool:
        """Whether no rank of the newest attempt has told an error."""
        return all(failure.attempt != self._attempt for failure in self._failures)


def as_job_error(error: BaseException, rank: int) -> JobError | None:
    """The error as one that ends the run at once, or None if a restart may help.

    Args:
        error: raised by the function.
        rank: where, for the message.
    """
    import torch

    if isinstance(error, JobError) and not isinstance(error, StoreError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return OutOfMemoryJobError(
            f"rank {rank} ran out of memory: {error}. Lower curriculum.*.micro_batch_slots, set "
            'model.recompute="blocks", '
            "raise trainer.zero_stage, or take more workers."
        )
    return None


def no_progress(failures: list[Failure], num_restarts: int) -> str:
    """Say that restarts were in vain, with the last attempt's first error."""
    cause = "none of them told an error (killed, or their nodes were lost)"
    if failures:
        last = next(failure for failure in failures if failure.attempt == failures[-1].attempt)
        logger.error("traceback of %s\n%s", last, last.lines)
        cause = str(last)
    return (
        f"{num_restarts} restarts in a row brought no new checkpoint, so one more would fail in the same way "
        f"(launch.max_failures does not count here); first error of the last attempt: {cause}. Mend it and submit the "
        "same command again; if workers are lost sooner than a checkpoint is due, lower "
        "trainer.checkpoint_every_steps."
    )
