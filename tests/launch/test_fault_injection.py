"""The killer strikes once, between two checkpoints of the named stage, and never elsewhere."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from m4v_dist.launch.fault_injection import KillMoment, WorkerKiller

MOMENT = KillMoment("video", min_stage_steps=4, min_steps_after_checkpoint=2, max_steps_after_checkpoint=3)


class Run:
    """A run folder with a living process as rank 1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        (folder / "attempts").mkdir()
        pids = {"0": 1, "1": self.worker.pid}
        (folder / "attempts" / "attempt_0001.json").write_text(json.dumps({"attempt": 1, "pids": pids}))

    def write(self, kind: str, step: int, stage: str = "video") -> None:
        row = {"attempt": 1, "step": step, "kind": kind, "curriculum_stage": stage}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    yield run
    if run.worker.poll() is None:
        run.worker.kill()
    run.worker.wait()


def test_kills_the_highest_rank_two_steps_after_a_checkpoint(run: Run) -> None:
    killer = WorkerKiller(str(run.folder), MOMENT)
    for step in range(4):
        run.write("train", step)
    run.write("checkpoint", 4)
    run.write("train", 4)
    assert killer.look() is None
    run.write("train", 5)
    kill = killer.look()
    assert kill is not None and (kill.rank, kill.pid, kill.step, kill.checkpoint_step) == (1, run.worker.pid, 5, 4)
    assert run.worker.wait(timeout=10) == -signal.SIGKILL
    run.write("train", 6)
    assert killer.look() is None


def test_waits_for_the_next_checkpoint_when_it_is_near(run: Run) -> None:
    killer = WorkerKiller(str(run.folder), MOMENT)
    run.write("checkpoint", 0)
    for step in range(4):
        run.write("train", step)
    assert killer.look() is None


def test_spares_another_stage_and_a_stage_that_has_just_begun(run: Run) -> None:
    killer = WorkerKiller(str(run.folder), MOMENT)
    for step in range(9):
        run.write("train", step, stage="image")
    run.write("checkpoint", 9, stage="image")
    run.write("train", 9, stage="image")
    run.write("train", 10, stage="image")
    assert killer.look() is None
    run.write("checkpoint", 11)
    run.write("train", 11)
    run.write("train", 12)
    assert killer.look() is None


def test_a_line_in_the_middle_of_its_write_is_left_for_later(run: Run) -> None:
    killer = WorkerKiller(str(run.folder), MOMENT)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"attempt": 1, "st')
    assert killer.look() is None
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('ep": 0, "kind": "train", "curriculum_stage": "video"}\n')
    assert killer.look() is None and killer._stage_steps == 1


def test_a_moment_that_cannot_come_is_refused() -> None:
    with pytest.raises(ValueError, match="checkpoint_every_steps"):
        KillMoment("video", 4, min_steps_after_checkpoint=3, max_steps_after_checkpoint=2)
