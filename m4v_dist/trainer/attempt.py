"""The start of an attempt: its number, which process is which rank, where to go on, and what the last one lost."""

import os
import time

from m4v_dist import storage
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import DataError
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.metrics import Ledger, Metrics, lost_since, read_rows


def begin_attempt(config: RunConfig, mesh: Mesh) -> tuple[str | None, Ledger, Metrics | None]:
    """Begin an attempt (collective); rank 0 writes `attempts/attempt_0001.json` before any step is done.

    Returns:
        Path of the checkpoint to go on from (None: the start), the run's ledger, and rank 0's metrics.

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
        return saved, Ledger(), None
    folder = config.run.folder
    attempts = storage.join(folder, "attempts")
    attempt = 1 + sum(name.startswith("attempt_") for name in storage.list_folder(attempts))
    facts = {"attempt": attempt, "pids": pids, "started": time.time()}
    storage.write_json(storage.join(attempts, f"attempt_{attempt:04d}.json"), facts)
    rows = read_rows(folder)
    path = storage.join(folder, "ledger.json")
    ledger = Ledger.from_json(storage.read_json(path)) if storage.exists(path) else Ledger()
    metrics = Metrics(folder, attempt, config.logging, config)
    if attempt > 1:
        lost_s, lost_steps, last = lost_since(rows, step)
        restart_s = max(0.0, time.time() - last) if last is not None else 0.0
        ledger.lost_s += lost_s
        ledger.restart_s += restart_s
        row = {"resumed_from": saved, "timing/restart_s": restart_s, "lost_steps": lost_steps, "lost_s": lost_s}
        metrics.write("restart", step, row)
    return saved, ledger, metrics
