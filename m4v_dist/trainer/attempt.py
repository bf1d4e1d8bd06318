"""The start of an attempt: its number, which process is which rank, where to go on, and what the last one lost."""

import logging
import os
import re
import time
from dataclasses import dataclass

from m4v_dist import storage
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import DamagedCheckpointError, DataError, JobError
from m4v_dist.lease import Holder, Lease, claim
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.failure_report import report_failure
from m4v_dist.trainer.metrics import Broken, Ledger, Metrics, broken_attempt, read_rows

logger = logging.getLogger(__name__)

_FILE = re.compile(r"^attempt_(\d+)\.json$")


@dataclass(frozen=True)
class Attempt:
    """What an attempt begins with.

    Args:
        number: from 1; a later attempt's is higher.
        saved: path of the checkpoint to go on from; None: the start.
        lease: of rank 0; None on the others.
        ledger: the run's, of rank 0.
        metrics: of rank 0; None on the others.
        broken: of rank 0: what the attempt before lost if it broke off.
        damage: what is wrong with that checkpoint, as far as the sizes of its files show; None: nothing.
    """

    number: int
    saved: str | None
    lease: Lease | None
    ledger: Ledger
    metrics: Metrics | None
    broken: Broken | None
    damage: str | None


def begin_attempt(config: RunConfig, mesh: Mesh, holder: Holder) -> Attempt:
    """Begin an attempt (collective); rank 0 writes `attempts/attempt_0001.json` before any step is done.

    Args:
        config: of the run.
        mesh: rank facts.
        holder: rank 0's: the driver that the attempt belongs to.

    Raises:
        RunInUseError: another driver holds the run.
        DataError: the newest checkpoint is past the end of the curriculum.
        OSError: on all ranks: run folder or store failed rank 0.
    """
    pids = {str(rank): pid for rank, pid in enumerate(mesh.gather(os.getpid()))}
    begun: Attempt | None = None
    failed: Exception | None = None
    if mesh.is_main:
        try:
            begun = _begin(config, holder, pids)
        # Not swallowed: raised below, on all ranks. Else the others would wait for rank 0.
        except Exception as error:
            failed = error
    told = mesh.from_main((_portable(failed), None if begun is None else (begun.number, begun.saved, begun.damage)))
    if failed is not None:
        raise failed
    if begun is not None:
        return begun
    reason, facts = told
    if isinstance(reason, JobError):
        raise reason
    if reason is not None:
        # Of a kind that restarts the workers, as its own does on rank 0 unless it is a JobError.
        raise OSError(f"rank 0 could not begin the attempt: {reason}")
    number, saved, damage = facts
    return Attempt(number, saved, None, Ledger(), None, None, damage)


def _portable(error: Exception | None) -> JobError | str | None:
    """An error as it can be sent to the other ranks."""
    return error if error is None or isinstance(error, JobError) else f"{type(error).__name__}: {error}"


def _begin(config: RunConfig, holder: Holder, pids: dict[str, int]) -> Attempt:
    """Rank 0's part: all that touches the run folder and the checkpoints."""
    lease, saved, damage = _claim(config, holder)
    folder = config.run.folder
    facts = {"attempt": lease.number, "pids": pids, "started": time.time()}
    storage.write_json(storage.join(folder, "attempts", f"attempt_{lease.number:04d}.json"), facts)
    rows, num_torn = read_rows(folder)
    if num_torn:
        logger.warning("%s/metrics.jsonl: %d torn lines passed over.", folder, num_torn)
    path = storage.join(folder, "ledger.json")
    ledger = Ledger.from_json(storage.read_json(path)) if storage.exists(path) else Ledger()
    metrics = Metrics(folder, lease.number, config.logging, config)
    step = 0 if saved is None else checkpoint.step_of(saved)
    return Attempt(lease.number, saved, lease, ledger, metrics, broken_attempt(rows, step), damage)


def _claim(config: RunConfig, holder: Holder) -> tuple[Lease, str | None, str | None]:
    """The lease of a new attempt, then the newest checkpoint, since the lease keeps it the newest; and its damage."""
    names = storage.list_folder(storage.join(config.run.folder, "attempts"))
    numbers = [int(found[1]) for name in names if (found := _FILE.match(name))]
    lease = claim(
        config.checkpoint_folder, holder, above=max(numbers, default=0), timeout_s=config.trainer.lease_timeout_s
    )
    # Once the attempt before is known to be over, and before any rank of this one leaves a file.
    report_failure(config.run.folder)
    saved = checkpoint.newest_committed(config.checkpoint_folder)
    step = 0 if saved is None else checkpoint.step_of(saved)
    if step > config.total_steps:
        raise DataError(
            f"{saved} is past the curriculum's {config.total_steps} steps; lengthen a stage, or give another folder."
        )
    try:
        if saved is not None:
            checkpoint.check(saved)
    except DamagedCheckpointError as error:
        return lease, saved, str(error)
    return lease, saved, None
