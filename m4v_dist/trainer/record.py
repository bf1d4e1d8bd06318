"""What one attempt writes down: its rows, and where its time went. Every rank counts, and rank 0 alone writes."""

import logging
import time
from collections.abc import Mapping
from typing import Any

from m4v_dist import storage
from m4v_dist.config.schema import RunConfig
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer.attempt import Attempt
from m4v_dist.trainer.guards import Clock
from m4v_dist.trainer.measured import gpu_peak_tflops
from m4v_dist.trainer.metrics import Broken, ledger_table
from m4v_dist.trainer.seams import Loader
from m4v_dist.trainer.slots_in_flight import skipped_row
from m4v_dist.trainer.tally import Sums, Tally, train_row

logger = logging.getLogger(__name__)


class Record:
    """The record of one attempt, on one rank.

    Args:
        config: of the run.
        mesh: rank facts.
        attempt: what this attempt began with; its ledger is counted in.
        clock: the loop's.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, attempt: Attempt, clock: Clock) -> None:
        self.ledger = attempt.ledger
        self._metrics, self._mesh, self._clock = attempt.metrics, mesh, clock
        self._folder, self._every_steps = config.run.folder, config.logging.every_steps
        self._sources = tuple(source.name for source in config.train_sources)
        self._peak_tflops = gpu_peak_tflops(mesh.device, config.launch.gpu_peak_tflops)

    def start(self, broken: Broken | None, step: int, resumed_from: str | None) -> None:
        """Put the time until here into the ledger: of a restart from the broken attempt's last row, else a build.

        Args:
            broken: what the attempt before lost, if this one is a restart.
            step: steps done.
            resumed_from: path of the checkpoint.
        """
        build_s = self._clock.lap()
        if broken is None:
            self.ledger.build_s += build_s
        else:
            restart_s = max(build_s, time.time() - broken.last_time)
            self.ledger.restart_s += restart_s
            self.ledger.lost_s += broken.lost_s
            row = {"resumed_from": resumed_from, "timing/restart_s": restart_s, "timing/build_s": build_s}
            row |= {"lost_steps": broken.lost_steps, "lost_s": broken.lost_s}
            row |= {"world_size": self._mesh.world_size, "world_size_before": broken.world_size}
            self.write("restart", step, row)
        # Now, so that an attempt that dies before its first commit still counts.
        self._write_ledger()

    def step(
        self, step: int, sums: Sums, loader: Loader, facts: Mapping[str, Any], *, norm: float | None, data_s: float
    ) -> float:
        """Count the time of a step, write its row if it is due, and return its seconds.

        Args:
            step: its 0-based number.
            sums: of all ranks.
            loader: its counts are shown.
            facts: more of the row.
            norm: of the gradient; None if the step was skipped.
            data_s: seconds that it waited for data.
        """
        step_s = self._clock.lap()
        self.ledger.data_s += data_s
        if norm is not None:
            self.ledger.step_s += step_s
        else:
            self.ledger.lost_s += step_s
        if step % self._every_steps == 0:
            row = train_row(sums, norm=norm, step_s=step_s, data_s=data_s, peak_tflops=self._peak_tflops)
            row |= {f"data/{name}/samples_seen": loader.samples_seen.get(name, 0) for name in self._sources}
            row |= {f"data/{name}/tokens_seen": loader.tokens_seen.get(name, 0) for name in self._sources}
            row |= {f"data/{name}": value for name, value in loader.reads.items()}
            self.write("train", step, {**facts, **row})
        return step_s

    def skipped_step(self, step: int, tally: Tally, *, loss: float) -> None:
        """Name the records of a step that was skipped (collective).

        Args:
            step: its 0-based number.
            tally: this rank's.
            loss: of the step.
        """
        slots = tally.slots_in_flight(self._mesh)
        if self._mesh.is_main:
            self.write("skipped", step, skipped_row(slots, step=step, loss=loss))

    def held_out(self, step: int, sums: Sums) -> float:
        """Count the time of a held-out loss, write it down, and return its seconds."""
        elapsed = self._clock.lap()
        self.ledger.validation_s += elapsed
        row = {"validation/held_out_loss": sums.loss, "timing/validation_s": elapsed}
        row |= {f"validation/held_out_{name}": value for name, value in sums.means.items()}
        self.write("held_out", step, row)
        self.log("held-out loss at step %d: %.6f", step, sums.loss)
        return elapsed

    def lap_other(self) -> None:
        """Count the time since the last lap as the rest."""
        self.ledger.other_s += self._clock.lap()

    def end(self, step: int, *, is_ended_as_asked: bool) -> None:
        """Close what is open; the ledger of an attempt that breaks off stays as of its last commit."""
        if is_ended_as_asked:
            self.lap_other()
            self.write("ledger", step, self.ledger.to_json())
            self._write_ledger()
            self.log("where the time of the run went\n%s", ledger_table(self.ledger))
        if self._metrics is not None:
            self._metrics.close(is_success=is_ended_as_asked)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """On rank 0: append a row; see `Metrics.write`."""
        if self._metrics is not None:
            self._metrics.write(kind, step, values)

    def log(self, message: str, *values: object) -> None:
        """On rank 0: a line of the log."""
        if self._mesh.is_main:
            logger.info(message, *values)

    def _write_ledger(self) -> None:
        if not self._mesh.is_main:
            return
        path = storage.join(self._folder, "ledger.json")
        try:
            storage.write_json(path, self.ledger.to_json())
        except OSError as error:
            # The next commit writes it again, and the rows of metrics.jsonl have it at the end: no attempt ends for it.
            logger.error("%s: %s: %s", path, type(error).__name__, error)
