"""What ends a run and what restarts it."""

import pytest
import torch

from m4v_dist.errors import DataError, NonFiniteError, OutOfMemoryJobError, RunInUseError, StoreError
from m4v_dist.launch.verdict import MAX_FRUITLESS_RESTARTS, Verdict, as_job_error
from m4v_dist.stop_request import StopRequest


def test_a_restart_counts_as_fruitless_only_if_nothing_was_committed_since_the_one_before() -> None:
    verdict = Verdict()
    assert [verdict.begin(None) for _ in range(1 + MAX_FRUITLESS_RESTARTS)] == [1, 2, 3, 4]
    assert [verdict.begin("step_3") for _ in range(1 + MAX_FRUITLESS_RESTARTS)] == [5, 6, 7, 8]
    assert not verdict.has_given_up()
    assert verdict.begin("step_3") is None
    assert verdict.has_given_up()


def test_a_job_error_ends_the_run_and_another_error_does_not() -> None:
    verdict = Verdict()
    verdict.record(1, 0, "here", "ZeroDivisionError: a bug", "", as_job_error(ZeroDivisionError("a bug"), 0))
    assert verdict.begin(None) == 1
    verdict.record(1, 1, "here", "NonFiniteError: diverged", "", as_job_error(NonFiniteError("diverged"), 1))
    assert verdict.begin("step_9") is None
    assert isinstance(verdict.fatal(), NonFiniteError)


def test_what_a_rank_of_lost_workers_tells_later_neither_ends_the_run_nor_is_taken_for_its_cause() -> None:
    verdict = Verdict()
    assert [verdict.begin(None), verdict.begin("step_3")] == [1, 2]
    verdict.record(2, 1, "here", "OSError: lost", "", None)
    overtaken = RunInUseError("attempt 1 has lost its lease")
    verdict.record(1, 0, "there", f"RunInUseError: {overtaken}", "", as_job_error(overtaken, 0))
    assert verdict.fatal() is None and [failure.attempt for failure in verdict.failures()] == [2]
    assert verdict.begin("step_6") == 3


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), MemoryError("host")])
def test_memory_of_device_and_host_is_exit_4(error: BaseException) -> None:
    found = as_job_error(error, 3)
    assert isinstance(found, OutOfMemoryJobError) and found.exit_code == 4
    assert "rank 3" in str(found) and str(error) in str(found)


def test_a_job_error_stays_itself() -> None:
    error = DataError("shard 7")
    assert as_job_error(error, 0) is error


def test_a_store_that_cannot_be_asked_may_come_back_so_its_error_restarts() -> None:
    assert as_job_error(StoreError("s3://bucket/x: no server"), 0) is None


def test_requests_stand_by_their_reason_and_what_was_about_lost_workers_goes_with_them() -> None:
    verdict = Verdict()
    verdict.begin(None)
    limit, room = StopRequest("limit", 9.0, is_urgent=False), StopRequest("room for 2", ends=False)
    for request in (limit, StopRequest("node a", 5.0, ends=False), room, StopRequest("node a", 4.0, ends=False)):
        verdict.ask(request)
    assert verdict.stop_requests() == (limit, StopRequest("node a", 4.0, ends=False), room)
    verdict.begin("step_1")
    assert verdict.stop_requests() == (limit,)


def test_the_driver_learns_whether_anybody_hears_it() -> None:
    verdict = Verdict()
    waiting = []
    for state in ("SchedulingState", "RunningState", "RestartingState", "PreemptingState", "ShuttingDownState"):
        verdict.note_state(state)
        waiting.append(verdict.is_waiting())
    assert Verdict().is_waiting()
    assert waiting == [True, False, True, False, False]


def test_an_attempt_is_whole_until_one_of_its_ranks_told_an_error() -> None:
    verdict = Verdict()
    verdict.begin(None)
    verdict.record(1, 0, "here", "OSError: lost", "", None)
    assert not verdict.is_attempt_whole()
    verdict.begin("step_1")
    assert verdict.is_attempt_whole()


def test_a_request_is_served_when_rank_0_asks_again_or_its_attempt_is_over() -> None:
    verdict = Verdict()
    verdict.begin(None)
    room = StopRequest("room for 2", ends=False)
    served = []
    for step in (lambda: verdict.ask(room), verdict.stop_requests, verdict.stop_requests, lambda: verdict.ask(room)):
        step()
        served.append(verdict.is_served("room for 2"))
    assert served == [False, False, True, False]
    verdict.note_done()
    assert verdict.is_served("room for 2")
    verdict.begin("step_1")
    assert verdict.is_served("room for 2"), "new workers were asked nothing"
    verdict.ask(room)
    assert not verdict.is_served("room for 2")
