"""The loop: next batch, objective, backward, guard, step, EMA, log, save.

It is given model, objective and loader, and imports none of them. One step is: this rank's micro-batches through the
objective, one reduction of gradients, one sum over ranks of all numbers (loss, loss per pyramid stage, tokens, and
whether rank 0 was asked to stop), then, only if that loss is finite, the optimizer. So every rank decides the same from
the same bits. What was seen of the data is the loader's to count, and part of its state.

A resume, a restart after a lost worker and the boundary of a curriculum stage are one path: build model and engine,
load the newest committed checkpoint, go on at its step.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from m4v_dist import storage
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import PreemptedError
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.attempt import begin_attempt
from m4v_dist.trainer.curriculum import CurriculumStage, curriculum_stage_at
from m4v_dist.trainer.deepspeed_engine import ZeroEngine
from m4v_dist.trainer.ema import Ema
from m4v_dist.trainer.failure_report import report_failure
from m4v_dist.trainer.gpu_peak import gpu_peak_tflops
from m4v_dist.trainer.guards import Clock, SkippedSteps
from m4v_dist.trainer.measured import StepMeter
from m4v_dist.trainer.metrics import Broken, Ledger, Metrics, ledger_table
from m4v_dist.trainer.optimizer import learning_rate
from m4v_dist.trainer.profiling import ProfileWindow
from m4v_dist.trainer.rank_watch import RankWatch
from m4v_dist.trainer.replicas import ReplicasDifferError, require_equal_replicas
from m4v_dist.trainer.run_state import checkpoint_tensors, load_tensors
from m4v_dist.trainer.seams import BatchFlops, Loader, Objective, StepBatch
from m4v_dist.trainer.slots_in_flight import skipped_row
from m4v_dist.trainer.tally import Tally, train_row
from m4v_dist.trainer.validation_videos import publish_videos

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What `run` did.

    Args:
        step: optimizer steps done in all.
        held_out_loss: at the end; None when it is switched off, or when this attempt had no step to do.
        checkpoint: path of the last one.
    """

    step: int
    held_out_loss: float | None
    checkpoint: str


class Trainer:
    """One attempt at a run; constructing it does nothing to the world.

    Args:
        config: the run.
        mesh: rank facts.
        build_model: builds the model with fresh weights, the same on every rank.
        fill_start: fills a model that no checkpoint will fill, of a run at its start, in place; a resume never asks.
        objective: called with the engine's model and a micro-batch.
        loader: this rank's.
        should_stop: asked on rank 0 in each step; True saves after that step and ends with PreemptedError.
        batch_flops: counts a micro-batch, for MFU; without it there is none.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        *,
        build_model: Callable[[], nn.Module],
        objective: Objective,
        loader: Loader,
        fill_start: Callable[[nn.Module], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
        batch_flops: BatchFlops = lambda _batch, _freeze: (0.0, 0.0),
    ) -> None:
        self.config, self.mesh, self.objective, self.loader = config, mesh, objective, loader
        self.build_model, self.fill_start, self.should_stop = build_model, fill_start, should_stop
        self.meter = StepMeter(mesh.device, batch_flops)
        self.peak_tflops = gpu_peak_tflops(mesh.device, config.launch.gpu_peak_tflops)
        self.folder = config.run.folder
        self.profile = ProfileWindow(config.trainer.profile, self.folder, mesh)
        self.checkpoints = storage.join(self.folder, "checkpoints")
        self.sources = tuple(source.name for source in config.train_sources)
        self.step = 0
        self.skipped = SkippedSteps(config.trainer.max_skipped_steps)
        self.ledger = Ledger()
        self.clock = Clock()
        self.saved: str | None = None
        self.held_out_loss: float | None = None
        self.metrics: Metrics | None = None
        self.wants_stop = False
        self.watch: RankWatch
        self.engine: ZeroEngine
        self.ema: Ema

    def run(self) -> TrainResult:
        """Train to the end of the curriculum, from wherever the run folder stands (collective).

        Raises:
            PreemptedError: asked to stop; the state is saved.
            NonFiniteError: too many steps in a row were not finite.
            DataError: the newest checkpoint does not fit this model.
        """
        self.clock.lap()
        self.saved, self.ledger, self.metrics, broken = begin_attempt(self.config, self.mesh)
        self.step = 0 if self.saved is None else checkpoint.step_of(self.saved)
        is_ended_as_asked = False
        if self.mesh.is_main:
            # Before any rank of this attempt leaves a file.
            report_failure(self.folder)
        attempt = int(self.mesh.from_main(self.metrics.attempt if self.metrics is not None else None))
        self.watch = RankWatch(self.config.trainer, self.mesh, self.folder, attempt)
        try:
            with self.watch:
                self._train(broken)
            is_ended_as_asked = True
        except PreemptedError:
            is_ended_as_asked = True
            raise
        finally:
            self._end_attempt(is_ended_as_asked=is_ended_as_asked)
        assert self.saved is not None, "the curriculum has at least one step, and its end is saved"
        return TrainResult(self.step, self.held_out_loss, self.saved)

    def _train(self, broken: Broken | None) -> None:
        """Do all curriculum stages that are left.

        Args:
            broken: what the attempt before lost, if this one is a restart.
        """
        while (curriculum_stage := curriculum_stage_at(self.config.curriculum, self.step)) is not None:
            self._enter(curriculum_stage)
            self._count_start(broken)
            broken = None
            if self.step == 0:
                self._validate()
            self._train_stage(curriculum_stage)
            self.loader.close()
            self.engine.close()
            self._lap_other()

    # ---- curriculum stages

    def _count_start(self, broken: Broken | None) -> None:
        """Put the time until here into the ledger: of a restart from the broken attempt's last row, else a build."""
        build_s = self.clock.lap()
        if broken is None:
            self.ledger.build_s += build_s
        else:
            restart_s = max(build_s, time.time() - broken.last_time)
            self.ledger.restart_s += restart_s
            self.ledger.lost_s += broken.lost_s
            lost = {"lost_steps": broken.lost_steps, "lost_s": broken.lost_s}
            row = {"resumed_from": self.saved, "timing/restart_s": restart_s, "timing/build_s": build_s, **lost}
            self._write("restart", self.step, row)
        # Now, so that an attempt that dies before its first commit still counts.
        self._write_ledger()

    def _enter(self, curriculum_stage: CurriculumStage) -> None:
        """Build the engine of a curriculum stage and fill it from the newest checkpoint, if there is one."""
        settings, config = curriculum_stage.settings, self.config
        self.watch.begin("building and loading", self.step)
        model = self.build_model()
        if self.saved is None:
            self.fill_start(model)
        self.engine = ZeroEngine(
            model,
            config.trainer,
            freeze=settings.freeze,
            micro_batch_slots=settings.micro_batch_slots,
            mesh=self.mesh,
        )
        self.ema = Ema(self.engine.slices(), config.trainer.ema_decay)
        if self.saved is not None:
            self._load(self.saved)
        self.loader.enter(curriculum_stage.index, self.step)
        stage = {"curriculum_stage": settings.name, "start": curriculum_stage.start, "stop": curriculum_stage.stop}
        self._write("stage", self.step, {**stage, "freeze": list(settings.freeze)})
        span = f"steps {self.step} to {curriculum_stage.stop}"
        self._log("stage %s: %s, from %s", settings.name, span, self.saved or "the start")

    def _train_stage(self, curriculum_stage: CurriculumStage) -> None:
        every = self.config.trainer
        batches = self.loader.steps()
        while self.step < curriculum_stage.stop:
            self._train_step(curriculum_stage, batches)
            if every.replica_check_every_steps and self.step % every.replica_check_every_steps == 0:
                # Before a save: weights that differ are not kept.
                self._check_replicas()
            if self.step == self.config.total_steps:
                # Before the last commit: a kill between the two would leave a finished run without its figure.
                self.held_out_loss = self._validate()
            if self.step % every.checkpoint_every_steps == 0 or self.step == curriculum_stage.stop or self.wants_stop:
                self._save(curriculum_stage)
            if self.wants_stop and self.step < self.config.total_steps:
                raise PreemptedError(f"asked to stop at step {self.step}; saved: {self.saved}. Submit again to go on.")
            if (
                every.validate_every_steps
                and self.step % every.validate_every_steps == 0
                and self.step < curriculum_stage.stop
            ):
                self._validate()

    def _train_step(self, curriculum_stage: CurriculumStage, batches: Iterator[StepBatch]) -> None:
        self._lap_other()
        batch = next(batches)
        self.watch.begin_step(batch)
        assert batch.step == self.step, f"the loader yields step {batch.step}, the trainer is at {self.step}"
        data_s = self.clock.lap()
        self.profile.begin_step(self.step)
        rate = learning_rate(curriculum_stage.settings, self.step - curriculum_stage.start)
        tally = Tally()
        self.meter.begin()
        with self.engine.accumulate():
            for micro_batch in batch.micro_batches:
                with self.profile.span("forward"):
                    output = self.objective(self.engine.model, micro_batch)
                with self.profile.span("backward"):
                    self.engine.backward(output.loss)
                tally.add(output, micro_batch)
                self.watch.at("its next micro-batch, or adding up gradients")
            self.meter.end()
        wants_stop = self.mesh.is_main and self.should_stop()
        self.watch.at("adding up over ranks")
        measured = self.meter.measured(batch, curriculum_stage.settings.freeze, data_s=data_s)
        sums = tally.summed(
            self.mesh, bad_records=self.loader.num_bad_records, wants_stop=wants_stop, measured=measured
        )
        self.wants_stop = sums.wants_stop
        # Agreed by all ranks before the optimizer moves: the sum is the same bits on each, NaN included.
        with self.profile.span("optimizer"):
            norm = self.engine.step(rate) if math.isfinite(sums.loss) else None
        if not math.isfinite(sums.loss):
            self.engine.discard()
        if norm is not None:
            self.ema.update(self.engine.slices())
        self.watch.end_step()
        step_s = self.clock.lap()
        self.ledger.data_s += data_s
        if norm is not None:
            self.ledger.step_s += step_s
        else:
            self.ledger.lost_s += step_s
        self.skipped.record(step=self.step, is_applied=norm is not None, loss=sums.loss)
        if self.step % self.config.logging.every_steps == 0:
            row = train_row(sums, norm=norm, step_s=step_s, data_s=data_s, peak_tflops=self.peak_tflops)
            row |= {f"data/{name}/samples_seen": self.loader.samples_seen.get(name, 0) for name in self.sources}
            row |= {f"data/{name}/tokens_seen": self.loader.tokens_seen.get(name, 0) for name in self.sources}
            row |= {"train/lr": rate, "train/skipped_steps": self.skipped.total}
            self._write("train", self.step, {"curriculum_stage": curriculum_stage.settings.name, **row})
        if norm is None:
            slots = tally.slots_in_flight(self.mesh)
            if self.mesh.is_main:
                self._write("skipped", self.step, skipped_row(slots, step=self.step, loss=sums.loss))
        self.profile.end_step(self.step)
        # After the rows, which say what was not finite.
        self.skipped.require_finite(step=self.step, loss=sums.loss)
        self.step += 1

    def _check_replicas(self) -> None:
        try:
            require_equal_replicas(self.engine.replicas(), self.mesh, step=self.step)
        except ReplicasDifferError as error:
            self._write("replicas_differ", self.step, {"error": str(error)})
            raise

    @torch.no_grad()
    def _validate(self) -> float | None:
        """Loss of the fixed held-out slots with their fixed draws; None when it is switched off (collective)."""
        if not self.config.trainer.held_out_slots:
            return None
        self._lap_other()
        self.watch.begin("the held-out loss", self.step)
        self.engine.train(False)
        tally = Tally()
        for micro_batch in self.loader.held_out():
            output = self.objective(self.engine.model, micro_batch)
            tally.add(output, micro_batch)
        self.engine.train(True)
        sums = tally.summed(self.mesh)
        elapsed = self.clock.lap()
        self.ledger.validation_s += elapsed
        row = {"validation/held_out_loss": sums.loss, "timing/validation_s": elapsed}
        row |= {f"validation/held_out_{name}": value for name, value in sums.means.items()}
        self._write("held_out", self.step, row)
        self._log("held-out loss at step %d: %.6f", self.step, sums.loss)
        return sums.loss

    # ---- state

    def _save(self, curriculum_stage: CurriculumStage) -> None:
        self._lap_other()
        self.watch.begin("saving", self.step)
        state = {
            "curriculum_stage": {
                "index": curriculum_stage.index,
                "name": curriculum_stage.settings.name,
                "start": curriculum_stage.start,
            },
            "loader": self.loader.state_dict(),
            "optimizer_steps": self.engine.optimizer_steps(),
            "ema_updates": self.ema.num_updates,
            "skipped_steps": self.skipped.total,
            "shapes": self.engine.shapes,
        }
        self.saved = checkpoint.save(
            self.checkpoints,
            self.step,
            tensors=checkpoint_tensors(self.engine, self.ema, to_load=False),
            state=state,
            config=self.config,
            mesh=self.mesh,
        )
        if self.mesh.is_main:
            every = self.config.trainer
            checkpoint.prune(self.checkpoints, keep_last=every.keep_last, keep_every_steps=every.keep_every_steps)
        elapsed = self.clock.lap()
        self.ledger.checkpoint_s += elapsed
        name = checkpoint.folder_name(self.step)
        self._write("checkpoint", self.step, {"checkpoint": name, "timing/checkpoint_stall_s": elapsed})
        if self.metrics is not None and self.config.trainer.sample_every_steps:
            publish_videos(self.folder, self.metrics)
        self._write_ledger()

    def _load(self, path: str) -> None:
        state = checkpoint.read_state(path)
        load_tensors(path, self.engine, self.ema)
        self.engine.set_optimizer_steps(state["optimizer_steps"])
        self.ema.num_updates = state["ema_updates"]
        self.loader.load_state_dict(state["loader"])
        self.skipped.total = state["skipped_steps"]
        # Last, after all that could have drawn from it.
        checkpoint.restore_random_state(path, self.mesh)

    def _end_attempt(self, *, is_ended_as_asked: bool) -> None:
        """Close what is open; the ledger of an attempt that breaks off stays as of its last commit."""
        if is_ended_as_asked:
            self._lap_other()
            self._write("ledger", self.step, self.ledger.to_json())
            self._write_ledger()
            self._log("where the time of the run went\n%s", ledger_table(self.ledger))
        self.profile.close(self.step)
        if self.metrics is not None:
            self.metrics.close(is_success=is_ended_as_asked)

    def _lap_other(self) -> None:
        self.ledger.other_s += self.clock.lap()

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(kind, step, values)

    def _write_ledger(self) -> None:
        if self.mesh.is_main:
            storage.write_json(storage.join(self.folder, "ledger.json"), self.ledger.to_json())

    def _log(self, message: str, *values: object) -> None:
        if self.mesh.is_main:
            logger.info(message, *values)
