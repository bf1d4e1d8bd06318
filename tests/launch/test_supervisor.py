"""The driver's part in stopping: signals to requests, the time limit, and an end that waits for nobody; without Ray."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from m4v_dist.config.training_settings import LaunchSettings
from m4v_dist.errors import ConfigError, DataError, PreemptedError, StoreError
from m4v_dist.launch.supervisor import Supervisor, ended_by_signals, signal_request, time_limit
from m4v_dist.stop_request import StopRequest


class Workers:
    """A launch that lasts until it is asked to stop, or for ever."""

    def __init__(self, *, is_waiting: bool = False, hears: bool = True) -> None:
        self.asked: list[StopRequest] = []
        self.waiting, self.hears = is_waiting, hears
        self.is_over = threading.Event()

    def supervise(
        self,
        settings: LaunchSettings,
        limit: StopRequest | None = None,
        what_stands: Callable[[], str] = lambda: "step_00000003 stands",
    ) -> Supervisor:
        return Supervisor(
            settings,
            ask=self.ask,
            is_waiting=lambda: self.waiting,
            what_stands=what_stands,
            limit=limit,
        )

    def ask(self, request: StopRequest) -> None:
        self.asked.append(request)
        if self.hears and request.is_urgent:
            self.is_over.set()

    def launch(self) -> str:
        assert self.is_over.wait(20), "nobody asked"
        return "saved"


def _soon(*numbers: int) -> None:
    def send() -> None:
        for number in numbers:
            time.sleep(0.3)
            os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


SETTINGS = LaunchSettings()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_a_request_and_the_driver_waits_for_the_workers(number: int) -> None:
    workers = Workers()
    before = signal.getsignal(number)
    _soon(number)
    assert workers.supervise(SETTINGS).run(workers.launch) == "saved"
    assert workers.asked == [StopRequest(signal.Signals(number).name)]
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_at_once_and_says_what_stands() -> None:
    workers = Workers(hears=False)
    _soon(signal.SIGTERM, signal.SIGINT)
    started = time.monotonic()
    with pytest.raises(PreemptedError, match=r"twice \(SIGTERM and SIGINT\).*is lost; step_00000003 stands.*again"):
        workers.supervise(SETTINGS).run(workers.launch)
    assert time.monotonic() - started < 10
    workers.is_over.set()


def test_a_signal_while_no_worker_is_up_ends_at_once() -> None:
    """They may be waited for until a node comes: nobody would hear it."""
    workers = Workers(is_waiting=True, hears=False)
    _soon(signal.SIGTERM)
    with pytest.raises(PreemptedError, match=r"SIGTERM\) while no worker was up.*step_00000003 stands"):
        workers.supervise(SETTINGS).run(workers.launch)
    workers.is_over.set()


def test_a_time_limit_is_told_from_the_start_and_ends_a_run_that_only_waits() -> None:
    settings = LaunchSettings(stop_margin_s=0.0)
    workers = Workers(is_waiting=True)
    limit = StopRequest("the time limit", time.time() + 0.6, is_urgent=False)
    with pytest.raises(PreemptedError, match="the time limit"):
        workers.supervise(settings, limit).run(workers.launch)
    assert workers.asked == [limit]
    workers.is_over.set()


def _hang() -> str:
    time.sleep(20)
    return "step_00000003 stands"


def _refuse() -> str:
    raise StoreError("s3://runs: 503")


@pytest.mark.parametrize(
    ("what_stands", "words"), [(_hang, "the store does not answer"), (_refuse, "s3://runs: 503")], ids=["down", "error"]
)
def test_a_store_that_is_down_keeps_no_driver_past_its_deadline_and_hides_no_reason(
    what_stands: Callable[[], str], words: str
) -> None:
    settings, workers = LaunchSettings(stop_margin_s=1.0), Workers(is_waiting=True, hears=False)
    limit = StopRequest("the time limit", time.time() + 1.6, is_urgent=False)
    with pytest.raises(PreemptedError, match=rf"while no worker was up.*; what stands is not known: {words}\. Submit"):
        workers.supervise(settings, limit, what_stands).run(workers.launch)
    assert limit.deadline is not None and time.time() < limit.deadline
    workers.is_over.set()
    twice = Workers(hears=False)
    _soon(signal.SIGTERM, signal.SIGINT)
    started = time.monotonic()
    with pytest.raises(PreemptedError, match=rf"twice.*is lost; what stands is not known: {words}\. Submit"):
        twice.supervise(SETTINGS, what_stands=what_stands).run(twice.launch)
    assert time.monotonic() - started < 10
    twice.is_over.set()


def test_workers_that_do_not_end_by_the_deadline_are_not_waited_for() -> None:
    """They build, or hang: the driver tells how the run ended before it is killed."""
    workers = Workers(hears=False)
    _soon(signal.SIGTERM)
    started = time.monotonic()
    with pytest.raises(PreemptedError, match=r"SIGTERM\), but the workers did not save and end in time.*again"):
        workers.supervise(LaunchSettings(stop_grace_s=2.0)).run(workers.launch)
    assert 0.3 + 1.0 < time.monotonic() - started < 0.3 + 2.0, "most of the grace is the workers'"
    limit = StopRequest("the time limit", time.time() + 1.0, is_urgent=False)
    with pytest.raises(PreemptedError, match=r"asked to stop \(the time limit\), but"):
        workers.supervise(SETTINGS, limit).run(workers.launch)
    assert limit.deadline is not None and time.time() < limit.deadline
    workers.is_over.set()


def test_workers_that_end_within_the_margin_are_waited_for() -> None:
    """They save when the margin begins, and take some of it to end."""
    workers = Workers()
    limit = StopRequest("the time limit", time.time() + 3.0, is_urgent=False)
    threading.Timer(2.5, workers.is_over.set).start()
    assert workers.supervise(LaunchSettings(stop_margin_s=1.0), limit).run(workers.launch) == "saved"


def test_a_signal_before_or_after_the_launch_ends_the_job_as_one_that_was_asked_to_stop() -> None:
    before, workers = signal.getsignal(signal.SIGTERM), Workers()
    with pytest.raises(PreemptedError, match=r"\(SIGTERM\) while nothing was trained"), ended_by_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is before
    with ended_by_signals():
        _soon(signal.SIGTERM)
        assert workers.supervise(SETTINGS).run(workers.launch) == "saved", "inside, the launch is asked"
        with pytest.raises(PreemptedError, match=r"\(SIGINT\) while nothing was trained"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_of_the_launch_comes_through_as_itself() -> None:
    def launch() -> Any:
        raise DataError("shard 7 is gone")

    with pytest.raises(DataError, match="shard 7"):
        Workers().supervise(SETTINGS).run(launch)


def test_beside_the_main_thread_it_runs_without_signals() -> None:
    workers, answers = Workers(), []
    workers.is_over.set()
    thread = threading.Thread(target=lambda: answers.append(workers.supervise(SETTINGS).run(workers.launch)))
    thread.start()
    thread.join(10)
    assert answers == ["saved"]


def test_a_time_limit_counts_from_the_start_and_a_moment_stands_for_itself() -> None:
    assert time_limit(SETTINGS, 1000.0, 1007.0) is None
    limit = time_limit(LaunchSettings(time_limit_s=3600), 1000.0, 1007.0)
    assert limit == StopRequest("the time limit (launch.time_limit_s=3600)", 4600.0, is_urgent=False)
    at = time_limit(LaunchSettings(stop_at=1700000000), 1000.0, 1699990000.0)
    assert at is not None and at.deadline == 1700000000


def test_a_process_knows_when_it_was_started() -> None:
    code = "import time; from m4v_dist.launch.supervisor import process_started; print(time.time() - process_started())"
    before = time.time()
    age_s = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert 0.05 < age_s <= time.time() - before + 0.1


def test_a_limit_that_is_over_is_refused_with_the_seconds() -> None:
    with pytest.raises(ConfigError, match=r"launch.stop_at=1000 leaves 20 s from now, .*stop_margin_s=30.*later time"):
        time_limit(LaunchSettings(stop_at=1000), 900.0, 980.0)


def test_the_deadline_of_a_signal_is_what_is_known_of_it() -> None:
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}
    assert signal_request(signal.SIGTERM, 100.0, SETTINGS, {}).deadline is None
    assert signal_request(signal.SIGTERM, 100.0, LaunchSettings(stop_grace_s=60), job).deadline == 160.0
    told = signal_request(signal.SIGTERM, 100.0, SETTINGS, job | {"RAY_JOB_STOP_WAIT_TIME_S": "300"})
    assert told == StopRequest("SIGTERM, as of `ray job stop`", 400.0)
    # nobody said so: Ray waits for 3 s
    assert signal_request(signal.SIGTERM, 100.0, SETTINGS, job).deadline == 103.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_workers": 2, "min_workers": 3}, "min_workers=3 is more than num_workers=2"),
        ({"time_limit_s": 100, "stop_at": 1e9}, "give one of them"),
        ({"time_limit_s": 20}, "time_limit_s=20 leaves nothing to train in"),
        ({"min_workers": 0}, "min_workers"),
        ({"resize_check_s": 0}, "resize_check_s"),
        ({"stop_grace_s": -1}, "stop_grace_s"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LaunchSettings.model_validate(values)
