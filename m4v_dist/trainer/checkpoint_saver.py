"""Saves beside training: the loop stands still for the snapshot, a thread of each rank writes.

One save at a time. Its thread uses no collective (those of training are under way); what the ranks must agree on is
agreed in `settle`, in the training thread. In between, `has_failed` travels with the numbers that every step sums.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from m4v_dist import storage
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import DataError, JobError
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.checkpoint_save import (
    AbandonedError,
    Committed,
    Save,
    commit,
    discard,
    rank_zero_texts,
    remove_earlier_attempts,
    write_share,
)
from m4v_dist.trainer.ranges import Ranges
from m4v_dist.trainer.snapshot import SnapshotBuffer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settled:
    """How a save ended; equal on all ranks.

    Args:
        path: of the checkpoint.
        failures: what went wrong, in words, by rank; empty: it is committed.
    """

    path: str
    failures: tuple[str, ...]


@dataclass(frozen=True)
class CommitReport:
    """What rank 0 knows of a commit.

    Args:
        step: of the checkpoint.
        committed: bytes, retries.
        write_s: seconds from the snapshot to the commit.
        tidy_error: what went wrong after it, with the ledger, its own files or the removal of old ones; None: nothing.
    """

    step: int
    committed: Committed
    write_s: float
    tidy_error: str | None


class CheckpointSaver:
    """One rank's saver.

    Args:
        config: of the run.
        mesh: rank facts.
        attempt: number of this attempt.
        may_commit: asked on rank 0 before each commit and behind it; raises if another attempt has taken over.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, attempt: int, may_commit: Callable[[], None]) -> None:
        self._config, self._mesh, self._attempt, self._may_commit = config, mesh, attempt, may_commit
        self._folder = config.checkpoint_folder
        self._buffer = SnapshotBuffer()
        self._number = 0
        self._save: Save | None = None
        self._thread: threading.Thread | None = None
        self._has_written = threading.Event()
        self._is_abandoned = threading.Event()
        self._error: BaseException | None = None
        self._is_committed = False
        self._report: CommitReport | None = None

    @property
    def has_failed(self) -> bool:
        """Whether this rank's part of the save in flight went wrong, so that `settle` has something to say."""
        return self._error is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    def reserve(self, tensors: Mapping[str, Ranges]) -> None:
        """Get the memory of the first snapshot before it is due; see `SnapshotBuffer.reserve`."""
        self._buffer.reserve(tensors)

    def begin(
        self,
        step: int,
        tensors: Mapping[str, Ranges],
        state: Mapping[str, Any],
        after_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the snapshot and begin to write; the save before must have been settled.

        Args:
            step: optimizer steps done.
            tensors: keyed `<kind>/<parameter>`, the same keys on every rank.
            state: JSON; rank 0's counts.
            after_commit: called by rank 0's thread once the checkpoint stands, before old ones go.
        """
        assert self._save is None, "a save is in flight"
        mesh = self._mesh
        self._number += 1
        path = storage.join(self._folder, checkpoint.folder_name(step))
        texts = rank_zero_texts(state, self._config, step, mesh.world_size) if mesh.is_main else {}
        snapshot = self._buffer.take(tensors)
        self._save = Save(path, step, self._attempt, self._number, mesh.rank, mesh.world_size, snapshot, texts)
        self._has_written.clear()
        self._is_abandoned.clear()
        self._is_committed = False
        # A daemon: a process that must end does not wait for a store.
        self._thread = threading.Thread(target=self._run, args=(self._save, after_commit), name="save", daemon=True)
        self._thread.start()

    def take_report(self) -> CommitReport | None:
        """On rank 0: the commit that stands since the last call, once."""
        report, self._report = self._report, None
        return report

    def settle(self) -> Settled | None:
        """Wait for the save in flight and agree on how it ended (collective); None if there is none.

        What a failed save left is removed.

        Raises:
            RunInUseError: another attempt has taken over.
            RuntimeError: a rank met an error that is no trouble with disk or store: a fault of the program.
        """
        if self._save is None or self._thread is None:
            return None
        save = self._save
        self._has_written.wait()
        num_failed = self._mesh.sum_over_ranks(torch.tensor([float(self.has_failed)]))
        if num_failed.item():
            # Rank 0 waits for a file that will not come.
            self._is_abandoned.set()
        self._thread.join()
        self._save = self._thread = None
        error, self._error = self._error, None
        # That rank 0 gave up is no cause: the rank that made it give up tells its own.
        is_no_cause = error is None or isinstance(error, AbandonedError)
        mine = None if is_no_cause else (_portable(error), isinstance(error, OSError))
        answers = self._mesh.gather((mine, self._is_committed))
        found = [(rank, *told) for rank, (told, _) in enumerate(answers) if told is not None]
        for rank, told, may_pass in found:
            if not may_pass:
                raise told if isinstance(told, JobError) else RuntimeError(f"rank {rank}, saving {save.path}: {told}")
        if answers[0][1]:
            # Rank 0 had all files, whatever a store told of them later: what is committed is not taken away.
            for rank, told, _ in found:
                logger.warning("%s stands, though rank %d was told: %s", save.path, rank, told)
            return Settled(save.path, ())
        if found and self._mesh.is_main:
            self._discard(save)
        # Before anybody writes to that folder again.
        self._mesh.barrier()
        return Settled(save.path, tuple(f"rank {rank}: {told}" for rank, told, _ in found))

    def close(self, grace_s: float) -> None:
        """Give up what is in flight after `grace_s` seconds, alone: for an attempt that breaks off."""
        if self._thread is not None:
            self._thread.join(grace_s)
            self._is_abandoned.set()
            self._thread.join(grace_s)
            if self._thread.is_alive():
                logger.warning("a save was still being written when the attempt broke off.")
            self._thread = None

    # ---- in the thread

    def _run(self, save: Save, after_commit: Callable[[], None]) -> None:
        started = time.perf_counter()
        try:
            write_share(save)
            self._has_written.set()
            if self._mesh.is_main:
                committed = commit(
                    save,
                    may_commit=self._may_commit,
                    is_abandoned=self._is_abandoned.is_set,
                    timeout_s=self._config.trainer.save_timeout_s,
                )
                self._is_committed = True
                write_s = time.perf_counter() - started
                self._report = CommitReport(save.step, committed, write_s, self._tidy(save, after_commit))
        # Not swallowed: handed to the training thread, which raises it on all ranks.
        except BaseException as error:
            logger.error("%s: %s: %s", save.path, type(error).__name__, error)
            self._error = error
        finally:
            self._has_written.set()

    def _tidy(self, save: Save, after_commit: Callable[[], None]) -> str | None:
        every = self._config.trainer
        try:
            # Asked again: who was overtaken meanwhile must remove nothing under the newer one.
            self._may_commit()
            after_commit()
            # Looked for by name and size before an older one goes: with keep_last=1 that is all there is beside it.
            checkpoint.check(save.path)
            remove_earlier_attempts(save)
            checkpoint.prune(self._folder, keep_last=every.keep_last, keep_every_steps=every.keep_every_steps)
        except OSError as error:
            # The checkpoint stands, and the next commit tries again.
            logger.error("%s: after the commit: %s: %s", self._folder, type(error).__name__, error)
            return f"{type(error).__name__}: {error}"
        except DataError as error:
            # No failed save: the next start passes over it aloud, for the older one that stays.
            logger.error("%s: committed, but not what was written, so nothing older is removed: %s", save.path, error)
            return f"nothing was removed: {error}"
        return None

    def _discard(self, save: Save) -> None:
        try:
            discard(save)
        except OSError as error:
            logger.error("%s: what the failed save left could not be removed: %s", save.path, error)


def _portable(error: BaseException | None) -> JobError | str:
    """An error as it can be sent to the other ranks."""
    return error if isinstance(error, JobError) else f"{type(error).__name__}: {error}"
