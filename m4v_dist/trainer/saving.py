"""When a save may fail and when it may not, and what is written down of each: the loop's side of `CheckpointSaver`.

A save that fails (disk full, store down) is logged, counted and tried again when the next one is due, or after a pause
(`SavePause`) where it must stand; too many in a row end the run. A checkpoint that turns out damaged is passed over
aloud, and the run goes on from the one before it.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from m4v_dist import storage
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import DamagedCheckpointError, DataError, SaveFailedError
from m4v_dist.lease import require_held
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.attempt import Attempt
from m4v_dist.trainer.checkpoint_saver import CheckpointSaver
from m4v_dist.trainer.guards import Clock
from m4v_dist.trainer.metrics import Ledger, read_rows
from m4v_dist.trainer.ranges import Ranges
from m4v_dist.trainer.save_pause import SavePause, pause_s
from m4v_dist.trainer.stopping import Order
from m4v_dist.trainer.validation_videos import publish_videos

logger = logging.getLogger(__name__)

CLOSE_GRACE_S = 5.0
"""An attempt that breaks off waits this long, twice, for a save in flight: what it commits need not be done again."""


class Saving:
    """The saves of one attempt, on one rank.

    Args:
        config: of the run.
        mesh: rank facts.
        attempt: what this attempt began with; its ledger is counted in.
        clock: the loop's; every call laps it.
        note_duration: told on rank 0, of each commit, the seconds from the begin of its snapshot.
        ask_order: asked on rank 0 between the tries of a save that must stand; see `SavePause`.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        attempt: Attempt,
        clock: Clock,
        *,
        note_duration: Callable[[float], None] = lambda _: None,
        ask_order: Callable[[], Order] = lambda: Order.GO_ON,
    ) -> None:
        self.saved = attempt.saved
        self._config, self._mesh, self._clock = config, mesh, clock
        self._note_duration = note_duration
        self._ledger, self._metrics = attempt.ledger, attempt.metrics
        self._folder = config.checkpoint_folder
        self._failed_in_a_row = 0
        self._snapshot_time = 0.0
        self._snapshot_s = 0.0
        self._stall_s = 0.0

        def may_commit() -> None:
            assert attempt.lease is not None, "only rank 0 commits"
            require_held(self._folder, attempt.lease)

        self._saver = CheckpointSaver(config, mesh, attempt.number, may_commit)
        self._pause = SavePause(mesh, ask_order=ask_order, require_lease=may_commit)

    @property
    def has_failed(self) -> bool:
        """Whether this rank's part of the save in flight went wrong: then all ranks must `settle`."""
        return self._saver.has_failed

    @property
    def saving_since(self) -> float | None:
        """UNIX time at which the save that this rank still writes began; None: there is none."""
        return self._snapshot_time if self._saver.is_writing else None

    def reserve(self, tensors: Mapping[str, Ranges]) -> None:
        """Get the memory that saves will take, from the engine that was just built."""
        self._saver.reserve(tensors)

    def save(
        self,
        step: int,
        tensors: Callable[[], Mapping[str, Ranges]],
        state: Callable[[], Mapping[str, Any]],
        *,
        must_stand: bool,
        order: Order = Order.GO_ON,
    ) -> Order:
        """Begin a save, once the one before it has ended (collective); the order that stands then.

        It is a greater one than `order` where a request to stop came between two tries. END: the save was given up.

        Args:
            step: optimizer steps done.
            tensors, state: what to save; asked when it is time.
            must_stand: come back only when it is committed, however many tries it takes.
            order: what it is saved for.

        Raises:
            SaveFailedError: too many in a row have failed.
            RunInUseError: another attempt has taken over.
        """
        self.settle(step)
        while True:
            # Booked as of the snapshot: what is done after it is lost if the run breaks off before the next one.
            ledger = replace(self._ledger)
            self._snapshot_time, self._stall_s = time.time(), 0.0
            self._saver.begin(step, tensors(), state(), partial(self._write_ledger, ledger))
            self._snapshot_s = self._lap()
            ledger.checkpoint_s += self._snapshot_s
            if not must_stand or self.settle(step, is_tried_again=True):
                return order
            order = self._pause.wait(self._failed_in_a_row, order)
            self._lap()
            if order is Order.END:
                return order

    def settle(self, step: int, *, is_tried_again: bool = False) -> bool:
        """Wait for the save in flight (collective); whether it was committed, or there was none.

        Args:
            step: optimizer steps done.
            is_tried_again: as the log says it, after a pause, and not when the next save is due.

        Raises:
            SaveFailedError, RunInUseError: see `save`.
        """
        settled = self._saver.settle()
        self._lap()
        self.note_commit()
        if settled is None:
            return True
        if not settled.failures:
            self.saved, self._failed_in_a_row = settled.path, 0
            return True
        self._failed_in_a_row += 1
        self._ledger.failed_saves += 1
        name, ceiling = settled.path.rsplit("/", 1)[-1], self._config.trainer.max_failed_saves
        row = {"checkpoint": name, "failures": list(settled.failures), "failed_in_a_row": self._failed_in_a_row}
        self._write("failed_save", step, row)
        self._keep_counts()
        why = f"{settled.path} could not be saved ({self._failed_in_a_row} in a row failed): {settled.failures[0]}"
        if self._failed_in_a_row >= ceiling:
            raise SaveFailedError(
                f"{why} That is trainer.max_failed_saves={ceiling}; {self.saved or 'nothing'} is the last checkpoint "
                "that stands. Mend the store or the disk, and submit again."
            )
        if self._mesh.is_main:
            when = f"in {pause_s(self._failed_in_a_row):.0f} s" if is_tried_again else "when the next save is due"
            logger.error("%s It is tried again %s.", why, when)
        return False

    def note_commit(self) -> None:
        """On rank 0, if a save was committed since the last call: its row, and new videos to W&B. No collective."""
        report = self._saver.take_report()
        if report is None:
            return
        self._note_duration(self._snapshot_s + report.write_s)
        row: dict[str, Any] = {
            "checkpoint": checkpoint.folder_name(report.step),
            "snapshot_time": self._snapshot_time,
            "timing/checkpoint_stall_s": self._stall_s,
            "timing/checkpoint_write_s": report.write_s,
            "checkpoint/size_bytes": report.committed.size_bytes,
            "checkpoint/storage_retries": report.committed.num_retries,
        }
        if report.tidy_error is not None:
            row["tidy_error"] = report.tidy_error
        self._write("checkpoint", report.step, row)
        if self._metrics is not None and self._config.trainer.sample_every_steps:
            try:
                publish_videos(self._config.run.folder, self._metrics)
            except OSError as error:
                logger.warning("new videos were not logged: %s; the next commit tries again.", error)

    def fall_back(self, error: DamagedCheckpointError) -> int:
        """Pass over the checkpoint that could not be loaded, for good (collective); the step of the one before it.

        Args:
            error: the same on all ranks.

        Raises:
            DataError: there is none before it.
        """
        assert self.saved is not None, "a run without a checkpoint loads none"
        damaged = self.saved
        before = None
        if self._mesh.is_main:
            names = checkpoint.list_committed(self._folder)
            before = max((name for name in names if name < damaged.rsplit("/", 1)[-1]), default=None)
        older: str | None = self._mesh.from_main(before)
        if older is None:
            # Its marker stays: the next submission must not take the run for one at its start.
            raise DataError(
                f"{error} There is no checkpoint before it to go on from: put a copy in its place, or remove "
                f"{self._folder} to begin anew."
            ) from error
        self.saved = storage.join(self._folder, older)
        step = checkpoint.step_of(older)
        self._ledger.damaged_checkpoints += 1
        if self._mesh.is_main:
            checkpoint.condemn(damaged, str(error))
            self._count_lost(damaged, step, str(error))
            self._keep_counts()
        return step

    def give_up(self) -> str | None:
        """End a save in flight, one way or the other, and begin no other (collective); the checkpoint that stands."""
        self.close()
        newest = checkpoint.newest_committed(self._folder) if self._mesh.is_main else None
        stands: str | None = self._mesh.from_main(newest)
        return stands

    def close(self) -> None:
        """For an attempt that breaks off: end a save in flight, one way or the other."""
        self._saver.close(CLOSE_GRACE_S)
        self.note_commit()

    def _count_lost(self, damaged: str, step: int, reason: str) -> None:
        """On rank 0: steps between the two checkpoints were booked as steps that stand, and are done again."""
        rows, _ = read_rows(self._config.run.folder)
        num_lost = checkpoint.step_of(damaged) - step
        seconds = {
            row["step"]: row["timing/step_s"]
            for row in rows
            if row["kind"] == "train" and step <= row["step"] < step + num_lost
        }
        # With logging.every_steps=n one in n has a row, and stands for those beside it.
        lost_s = min(num_lost * sum(seconds.values()) / max(1, len(seconds)), self._ledger.step_s)
        self._ledger.step_s -= lost_s
        self._ledger.lost_s += lost_s
        name = damaged.rsplit("/", 1)[-1]
        row = {"checkpoint": name, "reason": reason, "resumed_from": self.saved, "lost_steps": num_lost}
        self._write("damaged_checkpoint", step, {**row, "lost_s": lost_s})
        logger.error("%s Going on from %s; %d steps are done again.", reason, self.saved, num_lost)

    def _lap(self) -> float:
        elapsed = self._clock.lap()
        self._ledger.checkpoint_s += elapsed
        self._stall_s += elapsed
        return elapsed

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(kind, step, values)

    def _keep_counts(self) -> None:
        """On rank 0: what went wrong stays counted though the attempt breaks off; its seconds do not."""
        if not self._mesh.is_main:
            return
        path = self._ledger_path
        try:
            stands = Ledger.from_json(storage.read_json(path)) if storage.exists(path) else Ledger()
            counts = self._ledger.failed_saves, self._ledger.damaged_checkpoints
            self._write_ledger(replace(stands, failed_saves=counts[0], damaged_checkpoints=counts[1]))
        except OSError as error:
            # It may be the disk that is full: the next failure or commit writes it.
            logger.error("%s: %s: %s", path, type(error).__name__, error)

    @property
    def _ledger_path(self) -> str:
        return storage.join(self._config.run.folder, "ledger.json")

    def _write_ledger(self, ledger: Ledger) -> None:
        storage.write_json(self._ledger_path, ledger.to_json())
