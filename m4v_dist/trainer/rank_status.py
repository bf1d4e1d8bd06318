"""What one rank is doing, in a small file that outlives it: all that is left to read when it dies without a word.

`<run>/attempts/attempt_0003_ranks/` holds, of each rank:
    rank_00001.json         step, records in flight, memory, times, and its error if it told one
    rank_00001.log          its lines of the log
    rank_00001_stacks.txt   the stacks of its threads, if it stalled
The JSON is renamed into place at each step, so a reader sees a whole one; it is not flushed to the disk, because the
page cache outlives a process. Its time of change is the rank's last sign of life.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import torch

from m4v_dist import storage
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer.memory import memory_facts

State = Literal["running", "done", "failed", "stalled"]
"""Running is also what a rank says that was killed; done is also one that was asked to stop."""

logger = logging.getLogger(__name__)

_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@dataclass(frozen=True)
class Status:
    """What a rank last said of itself.

    Args:
        rank: this rank.
        host, pid, gpu: where it runs; gpu is None on the CPU.
        state: see `State`.
        doing: in words.
        phase: how far within a step, growing; of ranks that wait for one another, the smallest is waited for.
        step: the step that it is in.
        records: `source/key` of that step's slots of this rank.
        started, time, last_step_time: seconds since the epoch: of the attempt, of this file, of the last finished step
            (None before the first).
        memory: GiB, see `memory_facts`.
        error: type and message of what it told before it ended.
        is_echo: whether that error is but another rank's death, seen from here.
        traceback: of the error.
    """

    rank: int
    host: str
    pid: int
    gpu: str | None
    started: float
    state: State = "running"
    doing: str = "starting"
    phase: int = 0
    step: int = 0
    records: tuple[str, ...] = ()
    time: float = 0.0
    last_step_time: float | None = None
    memory: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    is_echo: bool = False
    traceback: str | None = None


_FIELDS = frozenset(entry.name for entry in fields(Status))


def ranks_folder(run_folder: str, attempt: int) -> str:
    """Where the ranks of an attempt leave their files."""
    return storage.join(run_folder, "attempts", f"attempt_{attempt:04d}_ranks")


def newest_attempt(run_folder: str) -> int | None:
    """The highest attempt whose ranks left files; None if there is none."""
    names = storage.list_folder(storage.join(run_folder, "attempts"))
    numbers = [int(name.split("_")[1]) for name in names if name.startswith("attempt_") and name.endswith("_ranks")]
    return max(numbers, default=None)


def read_statuses(run_folder: str, attempt: int) -> list[tuple[Status, float]]:
    """What each rank of an attempt left, by rank, with its last sign of life in seconds since the epoch."""
    folder = ranks_folder(run_folder, attempt)
    names = [name for name in storage.list_folder(folder) if name.endswith(".json")]
    found = []
    for name in names:
        path = storage.join(folder, name)
        try:
            values = storage.read_json(path)
        # Of a node that was lost before its disk had the file.
        except ValueError as error:
            logger.warning("a rank's status is passed over: %s", error)
            continue
        known = {key: value for key, value in values.items() if key in _FIELDS}
        found.append((Status(**{**known, "records": tuple(known["records"])}), os.path.getmtime(path)))
    return found


class StatusFile:
    """Keeps one rank's files.

    Args:
        run_folder: local or mounted.
        attempt: number of the attempt.
        mesh: rank facts.
    """

    def __init__(self, run_folder: str, attempt: int, mesh: Mesh) -> None:
        stem = storage.join(ranks_folder(run_folder, attempt), f"rank_{mesh.rank:05d}")
        self.path, self.log_path, self.stacks_path = f"{stem}.json", f"{stem}.log", f"{stem}_stacks.txt"
        self._device = mesh.device
        gpu = None
        if mesh.device.type == "cuda":
            gpu = f"{mesh.device}, {torch.cuda.get_device_name(mesh.device)}"
        self.status = Status(mesh.rank, socket.gethostname(), os.getpid(), gpu, started=time.time())
        self._handler: logging.Handler | None = None
        self.num_failed_writes = 0

    def open(self) -> None:
        """Make the folder and the first file, and begin to keep the log's lines."""
        storage.make_folder(os.path.dirname(self.path))
        self.write()
        self._handler = logging.FileHandler(self.log_path, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter(_LOG_FORMAT))
        logging.getLogger().addHandler(self._handler)

    def write(self, **changes: Any) -> None:
        """Change the status and put it in place; training does not end for a disk that will not take it.

        The clock's thread writes too, when this one may hang in here: so there is no lock, and each has its own file.
        """
        self.status = replace(self.status, **changes, time=time.time(), memory=memory_facts(self._device))
        temporary = f"{self.path}.tmp-{threading.get_ident()}"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(asdict(self.status), file)
            os.replace(temporary, self.path)
        except OSError as error:
            self._count_failure(error)

    def beat(self) -> None:
        """Show that this process lives."""
        try:
            os.utime(self.path)
        except OSError as error:
            self._count_failure(error)

    def _count_failure(self, error: OSError) -> None:
        self.num_failed_writes += 1
        if self.num_failed_writes == 1:
            logger.warning("%s cannot be written (%s): should this rank die, its report is old.", self.path, error)

    def close(self) -> None:
        """Leave the log."""
        if self._handler is not None:
            logging.getLogger().removeHandler(self._handler)
            handler, self._handler = self._handler, None
            try:
                handler.close()
            except OSError as error:
                # A full disk: what ended the attempt must not be hidden by lines that have no room.
                self._count_failure(error)


def last_lines(path: str, count: int) -> list[str]:
    """The last lines of a log; none if there is none."""
    if not storage.exists(path):
        return []
    size = storage.size_bytes(path)
    start = max(0, size - 400 * count)
    text = storage.read_bytes(path, start, size - start).decode("utf-8", errors="replace")
    return text.splitlines()[-count:]


_ECHOES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "remote process exited",
    "ncclRemoteError",
    "Watchdog caught collective operation timeout",
    "caused pair closure",
    "Timed out waiting",
)
"""What gloo and NCCL say on a rank whose partner is gone."""


def is_echo(error: BaseException) -> bool:
    """Whether an error is what a rank meets when another one has died: the other one is the cause."""
    return isinstance(error, RuntimeError | ConnectionError) and any(words in str(error) for words in _ECHOES)


def records_shown(records: Sequence[str], limit: int = 8) -> str:
    """The first records, and how many more."""
    shown = ", ".join(records[:limit]) or "none"
    return shown if len(records) <= limit else f"{shown} and {len(records) - limit} more"
