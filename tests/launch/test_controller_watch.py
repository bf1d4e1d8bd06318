"""What Ray's controller waits for before it changes the number of workers."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from m4v_dist.launch.verdict import Verdict


class _Actor:
    """The actor's methods without Ray: `.remote(...)` calls them, and gives the answer itself."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._target, name))


@pytest.fixture
def resizing(monkeypatch: pytest.MonkeyPatch) -> tuple[Verdict, threading.Thread]:
    """A verdict of an attempt under way, and the controller's turn in which it means to change to three workers."""
    from ray.train.v2._internal.execution.controller.state import ResizingState, RunningState
    from ray.train.v2._internal.execution.scaling_policy import ResizeDecision

    from m4v_dist.launch import controller_watch

    monkeypatch.setattr(controller_watch.ray, "get", lambda answer: answer)
    monkeypatch.setattr(controller_watch, "POLL_S", 0.01)
    verdict = Verdict()
    verdict.begin("step_3")
    state = ResizingState(ResizeDecision(num_workers=3, resources_per_worker={"CPU": 1}))
    watch = controller_watch.ControllerWatch(_Actor(verdict))
    turn = threading.Thread(target=watch.after_controller_state_update, args=(RunningState(), state), daemon=True)
    turn.start()
    while not verdict._requests:
        turn.join(0.01)
        assert turn.is_alive()
    return verdict, turn


def test_a_resize_waits_for_the_save_that_it_asked_for_and_not_for_one_that_was_under_way(
    resizing: tuple[Verdict, threading.Thread],
) -> None:
    verdict, turn = resizing
    # A commit of a save that began before is seen by nobody here: what was done since its snapshot would be lost.
    turn.join(0.1)
    assert turn.is_alive()
    (told,) = verdict.stop_requests()
    assert (told.why, told.ends) == ("room for 3 workers", False)
    turn.join(0.1)
    assert turn.is_alive(), "rank 0 was told, and has not saved yet"
    verdict.stop_requests()
    turn.join(5)
    assert not turn.is_alive()


@pytest.mark.parametrize("end", ["done", "failed"])
def test_a_resize_does_not_wait_for_workers_that_have_ended(
    end: str, resizing: tuple[Verdict, threading.Thread]
) -> None:
    verdict, turn = resizing
    if end == "done":
        verdict.note_done()
    else:
        verdict.record(1, 0, "here", "OSError: lost", "", None)
    turn.join(5)
    assert not turn.is_alive()
