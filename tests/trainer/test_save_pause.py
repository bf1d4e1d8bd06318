"""The wait between two tries of a save that must stand, in one process and with a clock of its own."""

import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from m4v_dist import storage
from m4v_dist.errors import RunInUseError, SaveFailedError
from m4v_dist.lease import Holder, claim
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer import checkpoint, save_pause
from m4v_dist.trainer.attempt import Attempt
from m4v_dist.trainer.guards import Clock
from m4v_dist.trainer.metrics import Ledger, Metrics
from m4v_dist.trainer.ranges import Ranges
from m4v_dist.trainer.save_pause import SavePause, pause_s
from m4v_dist.trainer.saving import Saving
from m4v_dist.trainer.stopping import Order
from tests.trainer.test_trainer import rows
from tests.trainer.toy import toy_config

STATE = {"shapes": {"a": [4]}}


class _Time:
    """A clock that only sleep moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def now(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def _wait(
    mesh: Mesh,
    orders: dict[float, Order],
    failed_in_a_row: int = 3,
    obeyed: Order = Order.GO_ON,
    require_lease: Callable[[], None] = lambda: None,
) -> tuple[Order, float]:
    """The order that a wait ends with, and its seconds; `orders` stand from these seconds on."""
    clock = _Time()
    begun = clock.now_s

    def ask_order() -> Order:
        return max((order for since, order in orders.items() if clock.now_s - begun >= since), default=Order.GO_ON)

    pause = SavePause(mesh, ask_order=ask_order, require_lease=require_lease, now=clock.now, sleep=clock.sleep)
    return pause.wait(failed_in_a_row, obeyed), clock.now_s - begun


def test_pauses_grow_to_a_bound(mesh: Mesh) -> None:
    assert [pause_s(failed) for failed in (1, 2, 3, 4, 5, 5000)] == [5, 10, 20, 30, 30, 30]
    assert [_wait(mesh, {}, failed) for failed in (1, 2, 9)] == [(Order.GO_ON, wait_s) for wait_s in (5.0, 10.0, 30.0)]


@pytest.mark.parametrize(
    ("orders", "obeyed", "expected"),
    [
        ({7.5: Order.SAVE_AND_END}, Order.GO_ON, (Order.SAVE_AND_END, 8.0)),
        ({2.5: Order.END}, Order.GO_ON, (Order.END, 3.0)),
        ({2.5: Order.SAVE}, Order.GO_ON, (Order.SAVE, 3.0)),
        ({0.0: Order.SAVE_AND_END}, Order.SAVE_AND_END, (Order.SAVE_AND_END, 20.0)),
        ({0.0: Order.SAVE_AND_END, 9.0: Order.END}, Order.SAVE_AND_END, (Order.END, 9.0)),
    ],
    ids=["a signal", "no time is left", "room for more workers", "the one that it obeys", "time runs out"],
)
def test_a_new_order_cuts_the_pause_short_and_one_that_is_obeyed_already_does_not(
    mesh: Mesh, orders: dict[float, Order], obeyed: Order, expected: tuple[Order, float]
) -> None:
    assert _wait(mesh, orders, obeyed=obeyed) == expected


def test_a_lost_lease_ends_the_wait_and_a_store_that_cannot_say_does_not(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lost() -> None:
        raise RunInUseError("attempt 1 has lost its lease")

    def down() -> None:
        raise OSError("503")

    with pytest.raises(RunInUseError, match="has lost its lease"):
        _wait(mesh, {}, require_lease=lost)
    monkeypatch.setattr(save_pause, "LEASE_ANSWER_S", 0.05)
    for silent, words in ((down, "503"), (lambda: time.sleep(5), "no answer in 0.1 s")):
        caplog.clear()
        assert _wait(mesh, {}, require_lease=silent) == (Order.GO_ON, 20.0)
        assert words in caplog.text


@pytest.fixture
def saving(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Callable[[Callable[[], Order]], Saving], Callable[[int], None]]]:
    """Makes a Saving, given what it asks between tries; and sets how large a file may grow, as on a full disk."""
    monkeypatch.setattr(save_pause, "FIRST_PAUSE_S", 0.2)
    monkeypatch.setattr(save_pause, "POLL_S", 0.02)
    config = toy_config(str(tmp_path))
    lease = claim(config.checkpoint_folder, Holder.of_this_process(), above=0, timeout_s=60.0)
    attempt = Attempt(1, None, lease, Ledger(), Metrics(str(tmp_path), 1, config.logging, config), None, None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size_bytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))

    yield lambda ask_order: Saving(config, mesh, attempt, Clock(), ask_order=ask_order), limit
    limit(soft)


def _tensors() -> dict[str, Ranges]:
    return {"weights/a": Ranges(4, ((0, torch.ones(4)),))}


def test_a_save_that_must_stand_outlives_a_disk_that_is_full_for_a_while(
    saving: tuple[Callable[[Callable[[], Order]], Saving], Callable[[int], None]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make, limit = saving
    asked: list[float] = []

    def ask_order() -> Order:
        asked.append(time.monotonic())
        if asked[-1] - asked[0] > 0.1:
            limit(resource.RLIM_INFINITY)
        return Order.GO_ON

    saver = make(ask_order)
    # A rank's file is larger, with its random state; rows are not.
    limit(1000)
    order = saver.save(3, _tensors, lambda: STATE, must_stand=True)
    assert order is Order.GO_ON and saver.saved is not None and checkpoint.is_committed(saver.saved)
    assert [row["failed_in_a_row"] for row in rows(str(tmp_path), "failed_save")] == [1]
    assert "bytes are needed" in caplog.text and "It is tried again in 0 s" in caplog.text


def test_a_save_that_must_stand_is_given_up_when_no_time_is_left_and_after_too_many_tries(
    saving: tuple[Callable[[Callable[[], Order]], Saving], Callable[[int], None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, limit = saving
    limit(1000)
    saver = make(lambda: Order.END)
    assert saver.save(3, _tensors, lambda: STATE, must_stand=True, order=Order.SAVE_AND_END) is Order.END
    assert saver.saved is None
    monkeypatch.setattr(save_pause, "FIRST_PAUSE_S", 0.01)
    assert Ledger.from_json(storage.read_json(f"{tmp_path}/ledger.json")) == Ledger(failed_saves=1)
    begun = time.monotonic()
    with pytest.raises(SaveFailedError, match="trainer.max_failed_saves=3"):
        make(lambda: Order.GO_ON).save(3, _tensors, lambda: STATE, must_stand=True)
    assert time.monotonic() - begun > 0.01 + 0.02
