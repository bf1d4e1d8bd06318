"""The rank that failed first is named, whatever the others said after it."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from m4v_dist import storage
from m4v_dist.errors import RunInUseError
from m4v_dist.lease import Holder, claim
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer.attempt import begin_attempt
from m4v_dist.trainer.failure_report import failure_of, report_failure
from m4v_dist.trainer.rank_status import Status, StatusFile, read_statuses
from m4v_dist.trainer.rank_watch import STALL_EXIT_CODE
from tests.trainer.ranks import run_ranks
from tests.trainer.test_trainer import _trainer, rows
from tests.trainer.toy import ToyOutput, toy_config, toy_objective


def _left(rank: int, seen: float, **said: Any) -> tuple[Status, float]:
    memory = {"host_rss_gib": 1.5}
    return Status(rank, f"node-{rank}", 100 + rank, None, started=0.0, time=seen, memory=memory, **said), seen


ECHO = {"state": "failed", "error": "RuntimeError: Connection closed by peer", "is_echo": True}
BUG = {"state": "failed", "error": "KeyError: 'x'", "traceback": "trace"}


def test_an_error_of_its_own_goes_before_an_earlier_echo_and_before_silence() -> None:
    found = failure_of([_left(0, 10.0, **ECHO), _left(1, 10.2, **BUG), _left(2, 9.0)])
    assert (found["kind"], found["first_rank"], found["traceback"]) == ("error", 1, "trace")
    assert found["cause"] == "rank 1 failed: KeyError: 'x'"


def test_where_all_that_was_told_is_an_echo_the_silent_rank_that_lived_shortest_is_the_cause() -> None:
    found = failure_of([_left(0, 10.0, **ECHO), _left(1, 9.9, step=4), _left(2, 9.5, step=4, records=("a/b",))])
    assert (found["kind"], found["first_rank"], found["records"]) == ("silent death", 2, ["a/b"])
    assert "died without a word" in found["cause"] and "at step 4" in found["cause"]


def test_who_started_the_workers_knows_better_which_rank_died() -> None:
    found = failure_of([_left(0, 10.0, **ECHO), _left(1, 9.9, step=4), _left(2, 9.5, step=4)], silent_ranks=[1])
    assert (found["kind"], found["first_rank"]) == ("silent death", 1)


def test_of_ranks_that_stalled_the_one_the_others_wait_for_is_named() -> None:
    stall = {"state": "stalled", "error": "no progress for 600 s", "step": 8}
    found = failure_of([_left(0, 10.0, phase=5, **stall), _left(1, 10.1, phase=3, **stall)], silent_ranks=[0, 1])
    assert (found["kind"], found["first_rank"]) == ("stall", 1)
    assert "of 2 ranks that stalled it is the furthest back" in found["cause"]


def test_nothing_but_echoes_is_said_to_be_that() -> None:
    found = failure_of([_left(0, 10.1, **ECHO), _left(1, 10.0, **ECHO)])
    assert (found["kind"], found["first_rank"]) == ("echo", 1)


def test_the_time_since_the_last_step_of_every_rank_is_counted_to_the_failure() -> None:
    found = failure_of([_left(0, 12.0, last_step_time=7.0, **BUG), _left(1, 12.5, last_step_time=4.0), _left(2, 9.0)])
    assert [entry["seconds_since_last_step"] for entry in found["ranks"]] == [5.0, 8.0, None]


def test_an_attempt_that_left_nothing_or_ended_well_has_no_report(tmp_path: Path) -> None:
    assert report_failure(str(tmp_path)) is None


def _killed_job(folder: str) -> None:
    """Rank 1 is killed in the middle of step 5."""

    def objective(model: Any, batch: Any) -> ToyOutput:
        slot = batch.slots[0]
        if slot.step == 5 and slot.index == 9 and not (Path(folder) / "killed").exists():
            (Path(folder) / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return toy_objective(model, batch)

    _trainer(folder, objective=objective).run()


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("killed"))
    assert run_ranks(_killed_job, 2, folder, watch=lambda _: None) == [None, None]
    assert run_ranks(_killed_job, 2, folder) == [None, None]
    return folder


def test_the_next_attempt_reports_a_rank_that_was_killed_with_its_step_and_records(killed: str) -> None:
    report = storage.read_json(f"{killed}/attempts/attempt_0001_failure.json")
    assert (report["kind"], report["first_rank"], report["step"]) == ("silent death", 1, 5)
    assert report["records"] == [f"{'images' if n % 2 else 'clips'}/key-{n}" for n in range(6, 12)]
    assert report["memory"]["host_rss_gib"] > 0 and report["pid"] > 0
    by_rank = {entry["rank"]: entry for entry in report["ranks"]}
    assert by_rank[0]["state"] == "failed" and by_rank[1]["state"] == "running"
    # steps 0 to 4 stood, so the last of them was just before
    assert 0 <= by_rank[1]["seconds_since_last_step"] < 300
    text = Path(f"{killed}/attempts/attempt_0001_failure.log").read_text()
    assert "rank 1 died without a word" in text and "records in flight: clips/key-6" in text


def test_the_report_s_files_are_no_attempts_and_the_attempt_after_it_left_none(killed: str) -> None:
    assert [row["attempt"] for row in rows(killed, "restart")] == [2]
    assert storage.exists(f"{killed}/attempts/attempt_0002.json")
    assert not storage.exists(f"{killed}/attempts/attempt_0003.json")
    assert {status.state for status, _ in read_statuses(killed, 2)} == {"done"}
    assert report_failure(killed) is None


def _hanging_job(folder: str) -> None:
    """Rank 1 stands still in the second micro-batch of step 5, for ever."""

    def objective(model: Any, batch: Any) -> ToyOutput:
        slot = batch.slots[0]
        if slot.step == 5 and slot.index == 9:
            threading.Event().wait()
        return toy_objective(model, batch)

    _trainer(folder, objective=objective, stall_timeout_s=2.0, stall_start_timeout_s=20.0, stall_abort_s=0.5).run()


@pytest.mark.slow
def test_a_rank_that_hangs_is_ended_and_found_by_its_stacks(tmp_path: Path) -> None:
    codes: list[int | None] = []

    def watch(ranks: Any) -> None:
        for rank in ranks:
            rank.join(100)
        codes.extend(rank.exitcode for rank in ranks)

    folder = str(tmp_path)
    run_ranks(_hanging_job, 2, folder, watch=watch)
    # Rank 0 waits in a collective: its own clock may end it, or rank 1's end, which breaks the connection.
    assert codes[1] == STALL_EXIT_CODE and codes[0] != 0
    sentence = report_failure(folder, silent_ranks=[1])
    assert sentence is not None and "attempt 1: rank 1 stalled: no progress" in sentence
    report = storage.read_json(f"{folder}/attempts/attempt_0001_failure.json")
    assert (report["kind"], report["step"], report["records"][3:]) == (
        "stall",
        5,
        ["images/key-9", "clips/key-10", "images/key-11"],
    )
    assert "in objective" in Path(report["stacks"]).read_text()
    assert any("stacks of all threads" in line for line in report["log"])


def _refused_job(folder: str) -> bool:
    """Another driver's attempt is under way: it holds the lease, and its rank has left its file."""
    mesh, config = Mesh.of_process_group(use_gpu=False), toy_config(folder)
    claim(config.checkpoint_folder, Holder("other", "elsewhere", "", 4321), above=0, timeout_s=60.0)
    status = StatusFile(folder, 1, mesh)
    status.open()
    status.close()
    with pytest.raises(RunInUseError, match="in use by attempt 1 of process 4321"):
        begin_attempt(config, mesh, Holder.of_this_process())
    return storage.exists(f"{folder}/attempts/attempt_0001_failure.json")


def test_an_attempt_that_is_refused_reports_nothing_of_the_one_that_is_under_way(tmp_path: Path) -> None:
    assert run_ranks(_refused_job, 1, str(tmp_path)) == [False]
