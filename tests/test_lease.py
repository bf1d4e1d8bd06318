"""One driver at a time, and of its attempts the newest: on a local disk and in an object store."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from m4v_dist import lease as lease_module
from m4v_dist import storage
from m4v_dist.errors import RunInUseError
from m4v_dist.lease import Holder, Lease, LeaseKeeper, claim, newest_lease, require_free, require_held
from tests.object_store_server import object_store

TIMEOUT_S = 1.0


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "checkpoints")
        return
    with object_store(monkeypatch) as (bucket, _):
        yield f"{bucket}/checkpoints"


def _elsewhere(name: str) -> Holder:
    """A holder whose process cannot be seen from here."""
    return Holder(name, f"host-of-{name}", "", 4321)


def _write(folder: str, lease: Lease) -> None:
    storage.write_json(f"{folder}/leases/lease_{lease.number:04d}.json", lease.to_json())


def test_attempts_of_one_driver_follow_one_another_at_once_and_the_older_may_not_commit(folder: str) -> None:
    first = claim(folder, _elsewhere("a"), above=0, timeout_s=TIMEOUT_S)
    require_held(folder, first)
    second = claim(folder, _elsewhere("a"), above=0, timeout_s=TIMEOUT_S)
    assert (first.number, second.number) == (1, 2)
    require_held(folder, second)
    with pytest.raises(RunInUseError, match=r"attempt 1 has lost its lease to attempt 2 of process 4321 on host-of-a"):
        require_held(folder, first)
    assert storage.list_folder(f"{folder}/leases") == ["lease_0002.json"]


def test_another_driver_is_refused_with_who_and_since_when_until_the_lease_is_given_back(folder: str) -> None:
    holder = _elsewhere("a")
    with LeaseKeeper(folder, holder, TIMEOUT_S):
        claim(folder, holder, above=6, timeout_s=TIMEOUT_S)
        for refused in (require_free, lambda *given: claim(*given[:2], above=0, timeout_s=given[2])):
            with pytest.raises(
                RunInUseError, match=r"in use by attempt 7 of process 4321 on host-of-a, since 2.*lease_timeout_s=1,"
            ):
                refused(folder, _elsewhere("b"), TIMEOUT_S)
    require_free(folder, _elsewhere("b"), TIMEOUT_S)
    assert claim(folder, _elsewhere("b"), above=0, timeout_s=TIMEOUT_S).number == 8


def test_a_heartbeat_is_renewed_and_one_that_stopped_is_taken_over(folder: str) -> None:
    holder = _elsewhere("a")
    claimed = claim(folder, holder, above=0, timeout_s=TIMEOUT_S)
    with LeaseKeeper(folder, holder, TIMEOUT_S):
        time.sleep(1.5 * TIMEOUT_S)
        renewed = newest_lease(folder)
        assert renewed is not None and renewed.heartbeat > claimed.heartbeat + 0.5 * TIMEOUT_S
        require_held(folder, claimed)
        with pytest.raises(RunInUseError):
            require_free(folder, _elsewhere("b"), TIMEOUT_S)
    _write(folder, replace(claimed, heartbeat=time.time() - 2 * TIMEOUT_S))
    assert claim(folder, _elsewhere("b"), above=0, timeout_s=TIMEOUT_S).number == 2
    with pytest.raises(RunInUseError, match="has lost its lease"):
        require_held(folder, claimed)


def test_a_heartbeat_of_a_slow_clock_is_seen_to_beat(tmp_path: Path) -> None:
    folder = str(tmp_path)
    lease = claim(folder, _elsewhere("a"), above=0, timeout_s=TIMEOUT_S)
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(0.1):
            _write(folder, replace(lease, heartbeat=time.time() - 3600))

    _write(folder, replace(lease, heartbeat=time.time() - 3600))
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(RunInUseError, match="in use by attempt 1"):
            claim(folder, _elsewhere("b"), above=0, timeout_s=TIMEOUT_S)
    finally:
        is_over.set()
        thread.join()


def test_a_driver_that_died_on_this_machine_is_succeeded_at_once(tmp_path: Path) -> None:
    here = Holder.of_this_process()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        driver = replace(here, id="driver", pid=process.pid)
        claim(str(tmp_path), driver, above=0, timeout_s=60.0)
        with pytest.raises(RunInUseError, match=f"process {process.pid} on "):
            require_free(str(tmp_path), here, 60.0)
        process.kill()
        process.wait()
    require_free(str(tmp_path), here, 60.0)
    # The same number on another machine, or in another container of this one, says nothing.
    _write(str(tmp_path), replace(Lease(2, "n", driver, time.time(), time.time()), holder=replace(driver, machine="x")))
    with pytest.raises(RunInUseError):
        require_free(str(tmp_path), here, 60.0)
    assert here.pid == os.getpid() and not here.is_gone()


def test_of_drivers_that_claim_at_the_same_moment_one_wins(folder: str) -> None:
    start = threading.Barrier(4)
    won: list[Lease] = []
    refused: list[str] = []

    def drive(name: str) -> None:
        start.wait()
        try:
            won.append(claim(folder, _elsewhere(name), above=0, timeout_s=60.0))
        except RunInUseError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=drive, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(refused) == 3
    require_held(folder, won[0])
    assert all(f"host-of-{won[0].holder.id}" in error for error in refused)


def test_a_store_that_hangs_keeps_no_driver_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease_module, "GIVE_BACK_S", 0.2)
    is_over = threading.Event()
    claim(str(tmp_path), _elsewhere("a"), above=0, timeout_s=60.0)
    with LeaseKeeper(str(tmp_path), _elsewhere("a"), 60.0):
        monkeypatch.setattr(storage, "list_folder", lambda _: [] if is_over.wait(20) else [])
        begun = time.monotonic()
    assert time.monotonic() - begun < 10 and "was not given back: the lease: no answer in 0.2 s" in caplog.text
    is_over.set()


def test_a_claim_that_is_not_whole_yet_does_not_end_the_heartbeat(tmp_path: Path) -> None:
    """As a mount without hard links shows it for a moment."""
    holder, folder = _elsewhere("a"), str(tmp_path)
    claimed = claim(folder, holder, above=0, timeout_s=TIMEOUT_S)
    torn = tmp_path / "leases" / "lease_0002.json"
    torn.write_text('{"number": 2, "no')
    with LeaseKeeper(folder, holder, 0.1):
        time.sleep(0.3)
        torn.unlink()
        time.sleep(0.3)
        renewed = newest_lease(folder)
        assert renewed is not None and renewed.heartbeat > claimed.heartbeat + 0.2


def test_a_lease_that_was_removed_by_hand_is_lost(tmp_path: Path) -> None:
    lease = claim(str(tmp_path), _elsewhere("a"), above=0, timeout_s=60.0)
    storage.remove(f"{tmp_path}/leases")
    with pytest.raises(RunInUseError, match="nobody"):
        require_held(str(tmp_path), lease)
