"""The start of an attempt: its number, which process is which rank, where to go on, and what the last one lost."""

import logging
import os
import re
import time

from m4v_dist import storage
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import DataError
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.metrics import Broken, Ledger, Metrics, broken_attempt, read_rows

logger = logging.getLogger(__name__)

_FILE = re.compile(r"^attempt_(\d+)\.json$")


def begin_attempt(config: RunConfig, mesh: Mesh) -> tuple[str | None, Ledger, Metrics | None, Broken | None]:
    """Begin an attempt (collective); rank 0 writes `attempts/attempt_0001.json` before any step is done.

    Returns:
        Path of the checkpoint to go on from (None: the start), the run's ledger, and of rank 0 its metrics and what
        the attempt before lost if it broke off.

    Raises:
        DataError: the newest checkpoint is past the end of the curriculum.
    """
    pids = {str(rank): pid for rank, pid in enumerate(mesh.gather(os.getpid()))}
    newest = checkpoint.newest_committed(storage.join(config.run.folder, "checkpoints")) if mesh.is_main else None
    saved: str | None = mesh.from_main(newest)
    step = 0 if saved is None else checkpoint.step_of(saved)
    if step > config.total_steps:
        raise DataError(
            f"{saved} is past the curriculum's {config.total_steps} steps; lengthen a stage, or give another folder."
        )
    if not mesh.is_main:
        return saved, Ledger(), None, None
    folder = config.run.folder
    attempts = storage.join(folder, "attempts")
    numbers = [int(found[1]) for name in storage.list_folder(attempts) if (found := _FILE.match(name))]
    attempt = 1 + max(numbers, default=0)
    facts = {"attempt": attempt, "pids": pids, "started": time.time()}
    storage.write_json(storage.join(attempts, f"attempt_{attempt:04d}.json"), facts)
    rows, num_torn = read_rows(folder)
    if num_torn:
        logger.warning("%s/metrics.jsonl: %d torn lines passed over.", folder, num_torn)
    path = storage.join(folder, "ledger.json")
    ledger = Ledger.from_json(storage.read_json(path)) if storage.exists(path) else Ledger()
    return saved, ledger, Metrics(folder, attempt, config.logging, config), broken_attempt(rows, step)
