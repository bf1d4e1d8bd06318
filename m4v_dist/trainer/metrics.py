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
from m4v_dist.config.schema import LoggingSettings, RunConfig

logger = logging.getLogger(__name__)


@dataclass
class Ledger:
    """Where the seconds of a run went, over all attempts (goodput = step_s / the sum).

    Args:
        step_s: forward, backward, optimizer of steps that count.
        data_s: waiting for the loader.
        checkpoint_s: the loop standing still for a save.
        validation_s: held-out losses.
        restart_s: from the last row of an attempt to the first step of the next.
        lost_s: steps done after the last commit, and done again.
    """

    step_s: float = 0.0
    data_s: float = 0.0
    checkpoint_s: float = 0.0
    validation_s: float = 0.0
    restart_s: float = 0.0
    lost_s: float = 0.0

    @property
    def goodput(self) -> float:
        """Share of the run's time that was spent in steps that count."""
        total = sum(asdict(self).values())
        return self.step_s / total if total else 0.0

    def to_json(self) -> dict[str, float]:
        """All entries and the goodput."""
        return {**asdict(self), "goodput": self.goodput}

    @classmethod
    def from_json(cls, values: Mapping[str, float]) -> "Ledger":
        """Read back what `to_json` wrote."""
        return cls(**{name: value for name, value in values.items() if name != "goodput"})


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
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._wandb = _start_wandb(folder, settings, config)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one row.

        Args:
            kind: train, held_out, checkpoint, restart, stage or ledger.
            step: optimizer steps done when the row's event happened; a train row's own 0-based step.
            values: numbers and names.
        """
        row = {"attempt": self.attempt, "step": step, "kind": kind, "time": time.time(), **values}
        # One write call: a kill leaves the whole row or nothing of it.
        os.write(self._file, (json.dumps(row) + "\n").encode())
        if self._wandb is not None:
            numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
            self._wandb.log({"train/global_step": step, "attempt": self.attempt, **numbers})

    def close(self) -> None:
        """Close the file and the W&B run."""
        os.close(self._file)
        if self._wandb is not None:
            self._wandb.finish()


def read_rows(folder: str) -> list[dict[str, Any]]:
    """All rows of a run so far, in order; none if there is no file."""
    path = storage.join(folder, "metrics.jsonl")
    if not storage.exists(path):
        return []
    return [json.loads(line) for line in storage.read_bytes(path).decode().splitlines() if line]


def lost_since(rows: list[dict[str, Any]], resume_step: int) -> tuple[float, int, float | None]:
    """What the attempt before this one did in vain.

    Args:
        rows: rows so far.
        resume_step: steps done at the checkpoint that is resumed from.

    Returns:
        Seconds and number of its steps from `resume_step` on, and the time of its last row (None without rows).
    """
    if not rows:
        return 0.0, 0, None
    last = rows[-1]["attempt"]
    lost = [row for row in rows if row["attempt"] == last and row["kind"] == "train" and row["step"] >= resume_step]
    return sum(row["timing/step_s"] for row in lost), len(lost), rows[-1]["time"]


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
