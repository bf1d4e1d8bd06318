"""What may pass is tried again, for a bounded time, and counted; all else is raised at once."""

import logging
import threading
import time

import pytest

from m4v_dist import retries
from m4v_dist.retries import count_retries, retrying, within


class _Busy(Exception):
    pass


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_PAUSE_S", 0.01)


def _failing(num_failures: int) -> tuple[list[int], object]:
    calls: list[int] = []

    def call() -> str:
        calls.append(len(calls))
        if len(calls) <= num_failures:
            raise _Busy("busy")
        return "answer"

    return calls, call


def test_what_passes_is_answered_and_each_retry_is_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    calls, call = _failing(3)
    with caplog.at_level(logging.WARNING), count_retries() as count:
        assert retrying(call, may_pass=lambda e: isinstance(e, _Busy), what="s3://b/x", limit_s=5) == "answer"  # type: ignore[arg-type]
    assert (len(calls), count.num_retries) == (4, 3)
    assert [record.getMessage()[:15] for record in caplog.records] == ["s3://b/x: _Busy"] * 3


def test_what_does_not_pass_is_raised_when_the_time_is_up() -> None:
    calls, call = _failing(10**6)
    with pytest.raises(_Busy):
        retrying(call, may_pass=lambda _: True, what="x", limit_s=0.1)  # type: ignore[arg-type]
    assert 2 < len(calls) < 20


def test_an_error_that_cannot_pass_is_raised_at_once_and_not_counted() -> None:
    calls, call = _failing(1)
    with pytest.raises(_Busy), count_retries() as count:
        retrying(call, may_pass=lambda _: False, what="x", limit_s=5)  # type: ignore[arg-type]
    assert (len(calls), count.num_retries) == (1, 0)


def test_what_answers_in_time_is_heard_and_what_hangs_is_not_waited_for() -> None:
    calls, call = _failing(1)
    with pytest.raises(_Busy):
        within(call, limit_s=5, what="x")  # type: ignore[arg-type]
    assert within(call, limit_s=5, what="x") == "answer"  # type: ignore[arg-type]
    is_over = threading.Event()
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"^the store: no answer in 0\.1 s\.$"):
        within(lambda: is_over.wait(20), limit_s=0.1, what="the store")
    assert time.monotonic() - begun < 10
    is_over.set()
