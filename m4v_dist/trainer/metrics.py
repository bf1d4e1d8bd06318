"""Numbers of a run: `metrics.jsonl` always, W&B beside it, and the goodput ledger. Rank 0 only.

`metrics.jsonl` is append-only and each row carries `attempt`, so the redone steps of a restart stand beside the first
ones and can be compared. Floats are written in full (the shortest text that reads back as the same float64).
The only file that imports wandb.
"""

import json
import logging
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m4v_dist import storage
from m4v_dist.config.schema import RunConfig
from m4v_dist.config.training_settings import LoggingSettings

logger = logging.getLogger(__name__)

MAX_WAITING_BYTES = 2**26
"""Rows that a full disk did not take; past it the attempt ends."""


@dataclass
class Ledger:
    """Where the seconds of a run went, over all attempts (goodput = step_s / the sum).

    Rank 0's wall clock from the start of the first attempt: every second of an attempt is in one entry, and the
    ledger's file is written at each commit, so that work which is lost stays out of the entries of work that stands.
    Not in it: Ray's and the workers' own start in the first attempt, and the pause after an attempt that ended as it
    was asked to (done, or preempted and saved).

    Args:
        step_s: forward, backward, optimizer of steps that moved the weights and were committed.
        data_s: waiting for the loader.
        checkpoint_s: the loop standing still for a save.
        validation_s: held-out losses.
        restart_s: from the last row of an attempt that broke off to the first step of the next: noticing it, new
            workers, build and load. What an attempt did between its last row and its end is here too.
        lost_s: from the commit that is gone back to until the last row of the attempt that broke off, whatever was
            done then; and steps that were skipped because they were not finite.
        build_s: building the engine and loading a checkpoint, at the start and at each curriculum boundary.
        other_s: the rest: writing rows, asking whether to stop, closing engine and loader.
        failed_saves: saves that did not become a checkpoint, of attempts that broke off too.
        damaged_checkpoints: committed ones that were not what was written, so that the run went on from one before.
    """

    step_s: float = 0.0
    data_s: float = 0.0
    checkpoint_s: float = 0.0
    validation_s: float = 0.0
    restart_s: float = 0.0
    lost_s: float = 0.0
    build_s: float = 0.0
    other_s: float = 0.0
    failed_saves: int = 0
    damaged_checkpoints: int = 0

    @property
    def goodput(self) -> float:
        """Share of the run's time that was spent in steps that count."""
        total = sum(seconds for name, seconds in asdict(self).items() if name.endswith("_s"))
        return self.step_s / total if total else 0.0

    def to_json(self) -> dict[str, float]:
        """All entries and the goodput."""
        return {**asdict(self), "goodput": self.goodput}

    @classmethod
    def from_json(cls, values: Mapping[str, float]) -> "Ledger":
        """Read back what `to_json` wrote."""
        return cls(**{name: value for name, value in values.items() if name != "goodput"})  # type: ignore[arg-type]


def ledger_table(ledger: Ledger) -> str:
    """The ledger to read: seconds and share of each entry, the largest first, and the goodput."""
    seconds = {name: value for name, value in asdict(ledger).items() if name.endswith("_s")}
    counts = {name: value for name, value in asdict(ledger).items() if not name.endswith("_s")}
    total = sum(seconds.values())
    lines = [f"{'':<14}{'seconds':>12}{'share':>9}"]
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        lines.append(f"{name.removesuffix('_s'):<14}{value:>12.2f}{value / total if total else 0.0:>9.1%}")
    lines.append(f"{'all':<14}{total:>12.2f}{'':>9}  goodput {ledger.goodput:.1%}")
    lines += [f"{name} {value}" for name, value in counts.items()]
    return "\n".join(lines)


class Metrics:
    """The run's rows.

    Args:
        folder: run folder, local.
        attempt: number of this attempt, from 1.
        settings: W&B mode and project.
        config: resolved config, shown in W&B.
    """

    def __init__(self, folder: str, attempt: int, settings: LoggingSettings, config: RunConfig) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        self.attempt = attempt
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._waiting = b""
        self._end_torn_line()
        self._wandb = _start_wandb(folder, settings, config)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one row.

        Args:
            kind: train, skipped, replicas_differ, held_out, checkpoint, failed_save, damaged_checkpoint, restart, stage
                or ledger.
            step: optimizer steps done when the row's event happened; of a train row its own 0-based step, of a
                checkpoint those that it holds.
            values: numbers and names.
        """
        row = {"attempt": self.attempt, "step": step, "kind": kind, "time": time.time(), **values}
        # One write call, so that a kill leaves the whole row or nothing of it; only a full disk takes less than all.
        self._append((json.dumps(row) + "\n").encode())
        if self._wandb is not None:
            numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
            self._wandb.log({"train/global_step": step, "attempt": self.attempt, **numbers})

    def log_videos(self, step: int, videos: Mapping[str, str]) -> None:
        """Show validation videos in W&B; the files themselves are their record.

        Args:
            step: of the checkpoint.
            videos: prompt to path of an mp4.
        """
        if self._wandb is None:
            return
        import wandb

        shown = {f"validation/{prompt}": wandb.Video(path, format="mp4") for prompt, path in videos.items()}
        self._wandb.log({"train/global_step": step, **shown})

    def close(self, *, is_success: bool = True) -> None:
        """Close the file and the W&B run.

        Args:
            is_success: shown in W&B: the run finished, or failed.
        """
        self._append(b"")
        if self._waiting:
            logger.error("%s: %d rows were never written: %r", self.path, self._waiting.count(b"\n"), self._waiting)
        os.close(self._file)
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if is_success else 1)

    def _end_torn_line(self) -> None:
        """End a line that a lost node or a full disk cut short, so that the next row stands on its own."""
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            logger.warning("%s ends in a torn line; it is left as it is and passed over.", self.path)
            self._append(b"\n")

    def _append(self, data: bytes) -> None:
        """Write, or keep for the next row what a full disk does not take: training does not end for it."""
        was_waiting, self._waiting = bool(self._waiting), self._waiting + data
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError as error:
            if error.errno not in storage.NO_SPACE or len(self._waiting) > MAX_WAITING_BYTES:
                raise
            if not was_waiting:
                logger.error("%s: %s: rows wait in memory until there is room.", self.path, error.strerror)


def read_rows(folder: str) -> tuple[list[dict[str, Any]], int]:
    """All rows of a run so far, in order, and the number of torn lines; none if there is no file."""
    path = storage.join(folder, "metrics.jsonl")
    return storage.parse_json_lines(storage.read_bytes(path)) if storage.exists(path) else ([], 0)


@dataclass(frozen=True)
class Broken:
    """An attempt that did not end as it was asked to.

    Args:
        lost_s: seconds from the commit that is resumed from, or from its first row, to its last row.
        lost_steps: steps done after that commit, up to the last one that has a row; with logging.every_steps = n up
            to n - 1 more were done.
        last_time: of its last row, in seconds since the epoch.
        world_size: its ranks; None if it broke off before a curriculum stage began.
    """

    lost_s: float
    lost_steps: int
    last_time: float
    world_size: int | None = None


def broken_attempt(rows: list[dict[str, Any]], resume_step: int) -> Broken | None:
    """What the attempt before this one did in vain; None if there was none, or if it ended as it was asked to.

    Args:
        rows: rows so far.
        resume_step: steps done at the checkpoint that is resumed from.
    """
    if not rows or rows[-1]["kind"] == "ledger":
        return None
    mine = [row for row in rows if row["attempt"] == rows[-1]["attempt"]]
    # A kill between a commit and its row: the last step before it is the next best.
    stood = [row["time"] for row in mine if row["kind"] == "train" and row["step"] < resume_step]
    # Since its snapshot, not since the commit: steps were done between the two.
    commits = [row for row in mine if row["kind"] == "checkpoint" and row["step"] <= resume_step]
    stood += [row.get("snapshot_time", row["time"]) for row in commits]
    since = max(stood, default=mine[0]["time"])
    done = max((row["step"] + 1 for row in mine if row["kind"] == "train"), default=resume_step)
    sizes = [row.get("world_size") for row in mine if row["kind"] == "stage"]
    lost_s, last_time = max(0.0, mine[-1]["time"] - since), mine[-1]["time"]
    return Broken(lost_s, max(0, done - resume_step), last_time, sizes[-1] if sizes else None)


def _start_wandb(folder: str, settings: LoggingSettings, config: RunConfig) -> Any:
    if settings.wandb == "disabled":
        return None
    import wandb

    # The id is a function of the run folder's own file, so that a restart continues the same W&B run.
    id_file = storage.join(folder, "wandb_id.json")
    if not storage.exists(id_file):
        storage.write_json(id_file, {"id": secrets.token_hex(4)})
    return wandb.init(
        project=settings.wandb_project,
        name=config.run.name,
        id=storage.read_json(id_file)["id"],
        resume="allow",
        mode=settings.wandb,
        dir=folder,
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True),
    )
