"""Tells what this rank is doing, and notices when it stops doing it: the stall clock.

A rank that hangs in a collective cannot raise: its thread stands in C and never comes back. So a thread beside it looks
at the time since the last sign of progress. Past a limit it writes the stacks of all threads to a file; past a second
one it ends the process with STALL_EXIT_CODE, so that whoever started the workers starts them again. All ranks have the
same clock, so all of a group that waits for one of them leave their stacks; the one that is waited for is the one whose
`phase` is behind the others'.

The thread needs Python's lock to run: a rank that hangs while it holds the lock is ended by the others. And it needs
the run folder to answer: where a mounted folder hangs, so does the clock.
"""

import faulthandler
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from m4v_dist.config.training_settings import TrainerSettings
from m4v_dist.errors import PreemptedError
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer.rank_status import StatusFile, is_echo, records_shown
from m4v_dist.trainer.seams import StepBatch
from m4v_dist.trainer.slots_in_flight import record_of

logger = logging.getLogger(__name__)

STALL_EXIT_CODE = 87
"""Of a process that its stall clock ended: none of a job's own codes, and no signal's."""

_POLL_S = 1.0


class RankWatch:
    """Use as a context around an attempt: what leaves it, ends the attempt.

    Args:
        settings: the limits.
        mesh: rank facts.
        run_folder: local or mounted.
        attempt: number of the attempt.
        end_process: ends this process at once with an exit code; handed in so that tests can look on.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        mesh: Mesh,
        run_folder: str,
        attempt: int,
        *,
        end_process: Callable[[int], object] = os._exit,
    ) -> None:
        self._step_limit_s, self._start_limit_s = settings.stall_timeout_s, settings.stall_start_timeout_s
        self._abort_s = settings.stall_abort_s
        self._end_process = end_process
        self.file = StatusFile(run_folder, attempt, mesh)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="stall clock", daemon=True)
        self._doing, self._phase = "starting", 0
        self._last_step_time: float | None = None
        self._limit_s = self._start_limit_s
        self._since = time.monotonic()
        self._is_told = False

    def __enter__(self) -> "RankWatch":
        self.file.open()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        if error is None or isinstance(error, PreemptedError):
            self._write(state="done")
        else:
            summary, lines = f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))
            self._write(state="failed", error=summary, traceback=lines, is_echo=is_echo(error))
        self.file.close()

    def begin(self, doing: str, step: int) -> None:
        """Something that is no step begins, such as building, a save, the held-out loss: the longer limit holds.

        It holds for the step after it too, which may compile.

        Args:
            doing: in words.
            step: steps done so far.
        """
        self._progress(doing, self._start_limit_s)
        self._write(step=step, records=())

    def begin_step(self, batch: StepBatch) -> None:
        """This rank has its slots of a step; waiting for them was part of the step."""
        slots = [s for micro in batch.micro_batches for s, w in zip(micro.slots, micro.weights, strict=True) if w]
        self.at("its first micro-batch")
        self._write(step=batch.step, records=tuple(dict.fromkeys(map(record_of, slots))))

    def at(self, doing: str) -> None:
        """A step has come so far: told if it stalls; costs nothing."""
        self._doing, self._phase = doing, self._phase + 1

    def end_step(self) -> None:
        """A step is finished: the clock starts anew."""
        self._last_step_time = time.time()
        self._progress("waiting for data", self._step_limit_s)

    def _progress(self, doing: str, limit_s: float) -> None:
        self._doing, self._phase = doing, 0
        self._limit_s, self._is_told = limit_s, False
        self._since = time.monotonic()

    def _write(self, **changes: Any) -> None:
        state = {"state": "running", "doing": self._doing, "phase": self._phase}
        self.file.write(**{**state, "last_step_time": self._last_step_time, **changes})

    # ---- the clock's thread

    def _look_on(self) -> None:
        limits = (self._step_limit_s, self._start_limit_s, self._abort_s)
        poll_s = min([_POLL_S, *(limit / 4 for limit in limits if limit)])
        while not self._is_over.wait(poll_s):
            self.file.beat()
            if self._step_limit_s == 0:
                continue
            waited_s = time.monotonic() - self._since
            if waited_s > self._limit_s and not self._is_told:
                self._is_told = True
                self._tell(waited_s)
            if self._is_told and self._abort_s and waited_s > self._limit_s + self._abort_s:
                self._abort(waited_s)
                return

    def _tell(self, waited_s: float) -> None:
        status = self.file.status
        what = (
            f"rank {status.rank} has made no progress for {waited_s:.0f} s at step {status.step} ({self._doing}); "
            f"records in flight: {records_shown(status.records)}"
        )
        try:
            with open(self.file.stacks_path, "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {what}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            # The clock goes on without them: it must still end the rank.
            logger.error("%s cannot be written: %s", self.file.stacks_path, error)
        after = f"in {self._abort_s:g} s this process ends itself" if self._abort_s else "it is left alone"
        logger.error("%s; stacks of all threads: %s; %s.", what, self.file.stacks_path, after)

    def _abort(self, waited_s: float) -> None:
        summary = (
            f"no progress for {waited_s:.0f} s at step {self.file.status.step} ({self._doing}): ended by its stall "
            f"clock (trainer.stall_timeout_s={self._step_limit_s:g}, stall_start_timeout_s={self._start_limit_s:g}, "
            f"stall_abort_s={self._abort_s:g}), to be started again; its stacks: {self.file.stacks_path}"
        )
        self._write(state="stalled", error=summary)
        logger.error("rank %d: %s.", self.file.status.rank, summary)
        logging.shutdown()
        # No exception reaches a thread that stands in C.
        self._end_process(STALL_EXIT_CODE)
