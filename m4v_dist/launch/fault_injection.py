"""Kill one training worker from outside, at a chosen moment: what the demo shows, and what resume must survive.

Reads what the run writes anyway (metrics.jsonl, attempts/attempt_0001.json) and knows nothing else of it. Local runs
only: a process is killed by its id.
"""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m4v_dist.launch.metrics_tail import MetricsTail


@dataclass(frozen=True)
class Kill:
    """What was killed and when.

    Args:
        attempt: the attempt that lost a worker.
        rank: the worker's rank.
        pid: its process.
        step: the newest step in metrics.jsonl at that moment.
        checkpoint_step: the step of the newest checkpoint.
        num_steps_after_checkpoint: train rows since that checkpoint.
    """

    attempt: int
    rank: int
    pid: int
    step: int
    checkpoint_step: int
    num_steps_after_checkpoint: int


@dataclass(frozen=True)
class KillMoment:
    """When to kill: in one curriculum stage, past some steps of it, between two checkpoints.

    Args:
        curriculum_stage: name of the stage.
        min_stage_steps: steps of that stage that must be done.
        min_steps_after_checkpoint: steps that must follow the newest checkpoint, so that there is work to redo.
        max_steps_after_checkpoint: past it the next checkpoint is near: wait for it.
    """

    curriculum_stage: str
    min_stage_steps: int
    min_steps_after_checkpoint: int
    max_steps_after_checkpoint: int

    def __post_init__(self) -> None:
        if self.min_steps_after_checkpoint > self.max_steps_after_checkpoint:
            raise ValueError(
                f"no moment to kill: at least {self.min_steps_after_checkpoint} and at most "
                f"{self.max_steps_after_checkpoint} steps after a checkpoint; raise trainer.checkpoint_every_steps."
            )


class WorkerKiller:
    """Watches a run folder and kills its highest rank with SIGKILL, once.

    Args:
        run_folder: local run folder.
        moment: when to kill.
    """

    def __init__(self, run_folder: str, moment: KillMoment) -> None:
        self._folder = Path(run_folder)
        self._tail = MetricsTail(run_folder)
        self._moment = moment
        self._last_step = 0
        self._stage = ""
        self._stage_steps = 0
        self._checkpoint_step: int | None = None
        self._since_checkpoint = 0
        self.kill: Kill | None = None

    def look(self) -> Kill | None:
        """Read the new rows; kill if the moment has come. Call it often; returns the kill when it happens."""
        if self.kill is not None:
            return None
        for row in self._tail.new_rows():
            self._take(row)
        if not self._is_moment():
            return None
        attempt, rank, pid = self._victim()
        os.kill(pid, signal.SIGKILL)
        assert self._checkpoint_step is not None
        self.kill = Kill(attempt, rank, pid, self._last_step, self._checkpoint_step, self._since_checkpoint)
        return self.kill

    def _take(self, row: dict[str, Any]) -> None:
        match row["kind"]:
            case "train":
                if row["curriculum_stage"] != self._stage:
                    self._stage, self._stage_steps = row["curriculum_stage"], 0
                self._stage_steps += 1
                self._since_checkpoint += 1
                self._last_step = row["step"]
            case "checkpoint":
                # It is written beside training: steps may have been done since.
                self._checkpoint_step = row["step"]
                self._since_checkpoint = max(0, self._last_step + 1 - row["step"])

    def _is_moment(self) -> bool:
        moment = self._moment
        return (
            self._stage == moment.curriculum_stage
            and self._stage_steps >= moment.min_stage_steps
            and self._checkpoint_step is not None
            and moment.min_steps_after_checkpoint <= self._since_checkpoint <= moment.max_steps_after_checkpoint
        )

    def _victim(self) -> tuple[int, int, int]:
        """(attempt, rank, pid) of the highest rank of the newest attempt: not rank 0, which writes the metrics."""
        newest = max((self._folder / "attempts").glob("attempt_????.json"))
        attempt = json.loads(newest.read_text())
        rank = max(attempt["pids"], key=int)
        return attempt["attempt"], int(rank), int(attempt["pids"][rank])
