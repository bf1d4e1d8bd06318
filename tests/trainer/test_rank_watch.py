"""What a rank leaves behind, and the stall clock: who is late is told and ended, who works is left alone."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from m4v_dist.config.training_settings import TrainerSettings
from m4v_dist.errors import PreemptedError
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer.rank_status import is_echo, last_lines, read_statuses
from m4v_dist.trainer.rank_watch import STALL_EXIT_CODE, RankWatch
from tests.trainer.toy import ToyStepBatch, toy_batch

MESH = Mesh(rank=1, world_size=2, device=torch.device("cpu"))
BATCH = ToyStepBatch(7, (toy_batch(7, [2, 3], 12), toy_batch(7, [4], 12)))


def _watch(folder: Path, ended: list[int] | None = None, **settings: float) -> RankWatch:
    limits = {"stall_timeout_s": 0.2, "stall_start_timeout_s": 0.2, "stall_abort_s": 0.2, **settings}
    note: Any = [].append if ended is None else ended.append
    return RankWatch(TrainerSettings(**limits), MESH, str(folder), 3, end_process=note)


def _status(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "attempts/attempt_0003_ranks/rank_00001.json").read_text())
    return found


def _until(condition: Any, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def test_a_rank_says_its_step_records_and_memory_while_it_works(tmp_path: Path) -> None:
    with _watch(tmp_path, stall_timeout_s=0.0) as watch:
        watch.begin("building", 7)
        assert _status(tmp_path)["doing"] == "building" and _status(tmp_path)["last_step_time"] is None
        watch.begin_step(BATCH)
        during = _status(tmp_path)
        watch.end_step()
        watch.begin("saving", 8)
        saving = _status(tmp_path)
    assert (during["state"], during["step"], during["rank"]) == ("running", 7, 1)
    assert during["records"] == ["clips/key-2", "images/key-3", "clips/key-4"]
    assert 0.01 < during["memory"]["host_rss_gib"] < 100 and "max_reserved_gib" not in during["memory"]
    assert saving["last_step_time"] >= during["time"] and saving["records"] == []
    assert _status(tmp_path)["state"] == "done"


def test_an_error_stands_with_its_traceback_and_one_asked_for_does_not(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), _watch(tmp_path) as watch:
        watch.begin_step(BATCH)
        raise ZeroDivisionError("a bug")
    found = _status(tmp_path)
    assert (found["state"], found["error"], found["is_echo"]) == ("failed", "ZeroDivisionError: a bug", False)
    assert "test_rank_watch.py" in found["traceback"] and found["step"] == 7
    with pytest.raises(PreemptedError), _watch(tmp_path):
        raise PreemptedError("asked to stop")
    assert _status(tmp_path)["state"] == "done"


def test_the_log_is_kept_beside_it_and_left_afterwards(tmp_path: Path) -> None:
    before = list(logging.getLogger().handlers)
    with _watch(tmp_path) as watch:
        logging.getLogger("m4v_dist.somewhere").warning("shard 7 is slow")
    logging.getLogger("m4v_dist.somewhere").warning("too late")
    assert logging.getLogger().handlers == before
    (line,) = last_lines(watch.file.log_path, 5)
    assert line.endswith("WARNING m4v_dist.somewhere: shard 7 is slow")


def test_a_stall_is_told_with_stacks_then_ends_the_process(tmp_path: Path) -> None:
    ended: list[int] = []
    with _watch(tmp_path, ended) as watch:
        watch.begin_step(BATCH)
        watch.at("adding up over ranks")
        _until(lambda: ended)
        stalled = _status(tmp_path)
    assert ended == [STALL_EXIT_CODE]
    assert stalled["state"] == "stalled" and "at step 7 (adding up over ranks)" in stalled["error"]
    stacks = Path(watch.file.stacks_path).read_text()
    assert "records in flight: clips/key-2" in stacks
    # the stack of the thread that hangs: this one
    assert "in _until" in stacks and "test_a_stall_is_told" in stacks


def test_finished_steps_keep_the_clock_quiet_and_a_start_has_its_own_limit(tmp_path: Path) -> None:
    ended: list[int] = []
    with _watch(tmp_path, ended, stall_timeout_s=0.6, stall_start_timeout_s=60.0, stall_abort_s=0.1) as watch:
        watch.begin("building", 0)
        time.sleep(1.2)
        watch.begin_step(BATCH)
        for _ in range(8):
            watch.end_step()
            time.sleep(0.15)
        assert not ended and not Path(watch.file.stacks_path).exists()
        _until(lambda: ended)


def test_without_an_abort_a_stall_is_told_once_and_left_alone(tmp_path: Path) -> None:
    ended: list[int] = []
    with _watch(tmp_path, ended, stall_timeout_s=0.05, stall_start_timeout_s=0.05, stall_abort_s=0.0) as watch:
        _until(lambda: Path(watch.file.stacks_path).exists())
        time.sleep(0.3)
    assert not ended
    assert Path(watch.file.stacks_path).read_text().count("has made no progress") == 1


def test_a_disk_that_takes_no_status_does_not_end_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with _watch(tmp_path, stall_timeout_s=0.0) as watch:
        folder = Path(watch.file.path).parent
        folder.rename(tmp_path / "gone")
        watch.begin("saving", 3)
        watch.begin("saving", 4)
        (tmp_path / "gone").rename(folder)
    assert watch.file.num_failed_writes >= 2 and caplog.text.count("cannot be written") == 1


def test_a_torn_status_is_passed_over_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with _watch(tmp_path) as watch:
        pass
    (Path(watch.file.path).parent / "rank_00000.json").write_text("")
    assert [status.rank for status, _ in read_statuses(str(tmp_path), 3)] == [1]
    assert "rank_00000.json" in caplog.text


def test_only_what_a_lost_partner_causes_is_an_echo() -> None:
    assert is_echo(RuntimeError("[../pair.cc:547] Connection closed by peer [127.0.0.1]:45123"))
    assert is_echo(ConnectionResetError("Connection reset by peer"))
    assert not is_echo(RuntimeError("size mismatch"))
    assert not is_echo(ValueError("Connection closed by peer"))
