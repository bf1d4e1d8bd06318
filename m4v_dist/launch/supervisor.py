"""The driver's part in stopping: it owns the signals and the time limit, and lives until the workers have saved.

`Supervisor` runs the launch in a thread of its own and waits for it in the main thread, where signals arrive; what
comes becomes a StopRequest, handed to the workers. It ends by itself only when nothing can be saved any more: no worker
is up, a second signal comes, or the deadline does. Knows no Ray: it is handed what it asks and tells.

Before the launch and after it there is nothing to save: `ended_by_signals` takes the signals there.
"""

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m4v_dist.config.training_settings import LaunchSettings
from m4v_dist.errors import ConfigError, PreemptedError
from m4v_dist.retries import within
from m4v_dist.stop_request import StopRequest

logger = logging.getLogger(__name__)

POLL_S = 0.2
SIGNALS = (signal.SIGTERM, signal.SIGINT)
LAST_WORDS_S = 5.0
"""What the driver keeps of the time to a deadline, to end Ray and to say how the run ended.

At most a quarter of it, and of launch.stop_margin_s: workers that use a limit up save and end within that margin.
"""
STANDS_WAIT_S = 2.0
"""How long the store is asked which work is kept, for a message: `object_store.ask` would go on for two minutes."""


class _SecondSignal(BaseException):
    """Raised where the main thread stands; whoever sends it wants no more waiting, for Ray's answers neither."""


def process_started() -> float:
    """UNIX time at which this process was started: its imports take seconds of a time limit too."""
    # Field 22, counted behind the program's name, which may hold blanks: clock ticks from boot to start.
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def run_deadline(settings: LaunchSettings, started: float) -> float | None:
    """UNIX time at which the run must have ended; None without a limit.

    Args:
        settings: launch.time_limit_s or launch.stop_at.
        started: UNIX time of the driver's start.
    """
    return settings.stop_at if settings.time_limit_s is None else started + settings.time_limit_s


def time_limit(settings: LaunchSettings, started: float, now: float) -> StopRequest | None:
    """The request that a time limit is, from the start on; None without one.

    Args:
        settings: launch.time_limit_s or launch.stop_at.
        started, now: UNIX times.

    Raises:
        ConfigError: that time is over already, or within launch.stop_margin_s.
    """
    deadline = run_deadline(settings, started)
    if deadline is None:
        return None
    if settings.stop_at is None:
        limit = f"launch.time_limit_s={settings.time_limit_s:g}"
    else:
        limit = f"launch.stop_at={settings.stop_at:.0f}"
    left_s = deadline - now
    if left_s <= settings.stop_margin_s:
        raise ConfigError(
            f"{limit} leaves {left_s:.0f} s from now, of which launch.stop_margin_s={settings.stop_margin_s:g} stay "
            "free for ending; give a later time, or none."
        )
    return StopRequest(f"the time limit ({limit})", deadline, is_urgent=False)


def signal_request(
    number: int, now: float, settings: LaunchSettings, environment: Mapping[str, str] = os.environ
) -> StopRequest:
    """The request that a signal to the driver is, with the deadline that is known of it.

    Args:
        number: SIGTERM or SIGINT.
        now: UNIX time of its arrival.
        settings: launch.stop_grace_s.
        environment: of the driver; `ray job submit` tells there that it is one of its jobs, and how long it waits.
    """
    name = signal.Signals(number).name
    is_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in environment
    grace_s = settings.stop_grace_s
    if grace_s is None and is_job:
        # Ray's own default, where the runtime environment does not say.
        grace_s = float(environment.get("RAY_JOB_STOP_WAIT_TIME_S", "3"))
    why = f"{name}, as of `ray job stop`" if is_job else name
    return StopRequest(why, None if grace_s is None else now + grace_s)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """While inside, where no `Supervisor` takes them, SIGTERM and SIGINT end the job as one that was asked to stop.

    Raises:
        PreemptedError: where the main thread stands when the first one comes; another does what it did before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: object) -> None:
        restore()
        raise PreemptedError(
            f"asked to stop ({signal.Signals(number).name}) while nothing was trained, so there was nothing to save; "
            "what was committed stands. Submit again to go on from there."
        )

    before = {number: signal.signal(number, handle) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield
    finally:
        restore()


class Supervisor:
    """Waits for a launch and hands requests to stop to its workers.

    Args:
        settings: limits and graces.
        ask: hands a request to the workers.
        is_waiting: whether no worker is up, so that nobody would hear a request.
        what_stands: says which work is kept, for messages.
        limit: see `time_limit`.
    """

    def __init__(
        self,
        settings: LaunchSettings,
        *,
        ask: Callable[[StopRequest], None],
        is_waiting: Callable[[], bool],
        what_stands: Callable[[], str],
        limit: StopRequest | None = None,
    ) -> None:
        self._settings, self._ask, self._is_waiting, self._what_stands = settings, ask, is_waiting, what_stands
        self._limit = limit
        self._received: list[tuple[int, float]] = []
        # Each with the time, UNIX, at which the driver ends without the workers; None: it waits for them.
        self._told: dict[StopRequest, float | None] = {}

    def run(self, launch: Callable[[], Any]) -> Any:
        """Call `launch` and return its answer, or raise its error.

        In another thread than the main one no signal can be taken, and only the time limit counts.

        Raises:
            PreemptedError: ended without waiting for the workers, or longer for them; the message says why.
        """
        box: dict[str, Any] = {}

        def work() -> None:
            try:
                box["answer"] = launch()
            except BaseException as error:  # handed to the thread that waits, which raises it
                box["error"] = error

        # A daemon: a launch that is given up must not keep the process alive.
        thread = threading.Thread(target=work, name="launch", daemon=True)
        try:
            with self._signals():
                thread.start()
                while thread.is_alive():
                    thread.join(POLL_S)
                    self._look(thread)
        except _SecondSignal:
            raise PreemptedError(
                f"asked to stop twice ({self._names()}), so it ends at once: what was not saved is lost; "
                f"{self._stands(None)}. Submit again to go on from there."
            ) from None
        if "error" in box:
            raise box["error"]
        return box["answer"]

    def _look(self, thread: threading.Thread) -> None:
        for number, when in self._received[:1]:
            self._tell(signal_request(number, when, self._settings))
        if self._limit is not None:
            self._tell(self._limit)
        due = [request for request in self._told if request.is_urgent or self._is_due(request)]
        if due and self._is_waiting() and thread.is_alive():
            raise PreemptedError(
                f"asked to stop ({due[0].why}) while no worker was up, so there was nothing to save; "
                f"{self._stands(due[0].deadline)}. Submit again to go on from there."
            )
        late = [why for why, end in self._told.items() if end is not None and time.time() > end]
        if late and thread.is_alive():
            # Not asked what stands: a store that hangs is one of the reasons to be late.
            raise PreemptedError(
                f"asked to stop ({late[0].why}), but the workers did not save and end in time: they were building, or "
                "hung, or a save took too long; what was committed stands. Submit again to go on from there."
            )

    def _stands(self, deadline: float | None) -> str:
        """Which work is kept, if that is told in time: the driver ends now, and before a deadline."""
        left_s = STANDS_WAIT_S if deadline is None else max(0.0, deadline - time.time()) / 2
        try:
            return within(self._what_stands, limit_s=min(STANDS_WAIT_S, left_s), what="what stands")
        except TimeoutError:
            return "what stands is not known: the store does not answer"
        except OSError as error:
            return f"what stands is not known: {error}"

    def _is_due(self, request: StopRequest) -> bool:
        assert request.deadline is not None, "what is not urgent has a deadline"
        return time.time() > request.deadline - self._settings.stop_margin_s

    def _tell(self, request: StopRequest) -> None:
        if request not in self._told:
            if request.deadline is None:
                self._told[request] = None
            else:
                margin_s = self._settings.stop_margin_s or math.inf
                last_words_s = min(LAST_WORDS_S, margin_s / 4, (request.deadline - time.time()) / 4)
                self._told[request] = request.deadline - last_words_s
            self._ask(request)

    def _names(self) -> str:
        return " and ".join(signal.Signals(number).name for number, _ in self._received[:2])

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """While inside, the first signal is noted and the second raises where the main thread stands."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, _: object) -> None:
            self._received.append((number, time.time()))
            if len(self._received) > 1:
                raise _SecondSignal
            logger.warning("%s: the workers save and end; once more ends at once.", signal.Signals(number).name)

        before = {number: signal.signal(number, handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
