"""When to save before a deadline, by a clock that the test sets."""

import logging

import pytest

from m4v_dist.stop_request import StopRequest
from m4v_dist.trainer.stopping import ASSUMED_BYTES_PER_S, Order, Stopping


class FakeTime:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _stopping(time: FakeTime, *, save_s: float | None = 41.0, step_s: float = 2.0, margin_s: float = 30.0) -> Stopping:
    stopping = Stopping(margin_s=margin_s, now=time)
    stopping.stepped(step_s)
    if save_s is not None:
        stopping.saved(save_s)
    return stopping


def test_without_a_request_the_run_goes_on() -> None:
    assert _stopping(FakeTime()).order(()) is Order.GO_ON


def test_a_signal_saves_after_this_step_and_says_how_long_that_takes_and_what_is_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stopping = _stopping(FakeTime())
    with caplog.at_level(logging.WARNING):
        assert stopping.order([StopRequest("SIGTERM", 1090.0)]) is Order.SAVE_AND_END
    assert stopping.reason == "SIGTERM: a save takes 41 s, 90 s left"
    assert stopping.reason in caplog.text
    assert stopping.order([StopRequest("SIGINT")]) is Order.SAVE_AND_END
    assert stopping.reason == "SIGINT: a save takes 41 s, no deadline known"


def test_a_save_that_would_be_cut_off_is_not_begun() -> None:
    stopping = _stopping(FakeTime())
    # this step may last 2 s more
    assert stopping.order([StopRequest("SIGTERM", 1043.0)]) is Order.SAVE_AND_END
    assert stopping.order([StopRequest("SIGTERM", 1042.9)]) is Order.END
    assert "a save takes 41 s, 43 s left, so it would be cut off and is not begun" in stopping.reason
    assert stopping.order([StopRequest("SIGTERM", 900.0)]) is Order.END
    assert " 0 s left" in stopping.reason


def test_a_request_that_wants_no_save_ends_without_one_though_there_is_room() -> None:
    stopping = _stopping(FakeTime(), save_s=None)
    assert stopping.order([StopRequest("enough", 5000.0, saves=False)]) is Order.END
    assert stopping.reason == "enough: no save is wanted"


def test_a_time_limit_is_used_up_to_the_last_step_that_leaves_room_for_a_save() -> None:
    time = FakeTime()
    stopping = _stopping(time)
    limit = StopRequest("the time limit", 2000.0, is_urgent=False)
    # two steps of 2 s, a save of 41 s and a margin of 30 s: 75 s
    time.now = 2000.0 - 75.0
    assert stopping.order([limit]) is Order.GO_ON
    assert stopping.order([limit], upcoming_s=0.5) is Order.SAVE_AND_END
    time.now += 0.1
    assert stopping.order([limit]) is Order.SAVE_AND_END
    time.now = 1995.0
    assert stopping.order([limit]) is Order.END


def test_the_slowest_of_the_recent_steps_counts() -> None:
    time = FakeTime()
    stopping = _stopping(time, step_s=20.0)
    for _ in range(50):
        stopping.stepped(1.0)
    limit = StopRequest("the time limit", time.now + 41 + 30 + 39, is_urgent=False)
    assert stopping.order([limit]) is Order.SAVE_AND_END
    for _ in range(60):
        stopping.stepped(1.0)
    assert stopping.order([limit]) is Order.GO_ON


def test_until_a_save_was_measured_its_size_says_when_to_begin_but_refuses_none() -> None:
    time = FakeTime()
    stopping = _stopping(time, save_s=None)
    stopping.expect_save(100 * ASSUMED_BYTES_PER_S)
    limit = StopRequest("the time limit", time.now + 130, is_urgent=False)
    assert stopping.order([limit]) is Order.SAVE_AND_END
    assert "a save takes 100 s by its size, 130 s left" in stopping.reason
    assert stopping.order([StopRequest("SIGTERM", time.now + 50)]) is Order.SAVE_AND_END
    stopping.saved(3.0)
    stopping.expect_save(100 * ASSUMED_BYTES_PER_S)
    assert stopping.order([limit]) is Order.GO_ON, "what was measured wins"


def test_a_node_that_goes_is_saved_for_at_once_and_once_more_at_the_last_moment_and_the_run_goes_on() -> None:
    time = FakeTime()
    stopping = _stopping(time)
    node = StopRequest("preemption of node abc", time.now + 120, ends=False)
    assert stopping.order([node]) is Order.SAVE
    time.now += 41
    assert stopping.order([node]) is Order.GO_ON
    time.now += 5
    assert stopping.order([node]) is Order.SAVE, "75 s before the end it is the last moment"
    time.now += 5
    assert stopping.order([node]) is Order.GO_ON


def test_a_node_that_goes_soon_is_saved_for_once() -> None:
    stopping = _stopping(FakeTime())
    node = StopRequest("preemption of node abc", 1060.0, ends=False)
    assert [stopping.order([node]) for _ in range(3)] == [Order.SAVE, Order.GO_ON, Order.GO_ON]


def test_a_node_that_goes_too_soon_for_a_save_is_said_once_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    stopping = _stopping(FakeTime())
    node = StopRequest("preemption of node abc", 1020.0, ends=False)
    with caplog.at_level(logging.WARNING):
        assert [stopping.order([node]) for _ in range(3)] == [Order.GO_ON] * 3
    assert caplog.text.count("would be cut off and is not begun") == 1


def test_of_several_requests_the_one_that_ends_wins() -> None:
    stopping = _stopping(FakeTime())
    room, later = StopRequest("room for 2 workers", ends=False), StopRequest("limit", 9999.0, is_urgent=False)
    assert stopping.order([later]) is Order.GO_ON
    assert stopping.order([later, room, StopRequest("SIGTERM")]) is Order.SAVE_AND_END
    assert stopping.reason.startswith("SIGTERM")


def test_a_save_in_flight_is_waited_for_so_the_next_one_must_begin_sooner(caplog: pytest.LogCaptureFixture) -> None:
    stopping = _stopping(FakeTime())
    limit = StopRequest("the time limit", 1100.0, is_urgent=False)
    assert stopping.order([limit]) is Order.GO_ON
    # 31 of its 41 seconds are left
    assert stopping.order([limit], saving_since=990.0) is Order.SAVE_AND_END
    assert stopping.reason.startswith("the time limit: a save takes 41 s and waits 31 s for the one in flight, 100 s")
    term = StopRequest("SIGTERM", 1060.0)
    assert stopping.order([term]) is Order.SAVE_AND_END
    assert stopping.order([term], saving_since=990.0) is Order.END
    assert stopping.order([term], saving_since=900.0) is Order.SAVE_AND_END, "it should have ended by now"
