"""The loop: next batch, objective, backward, guard, step, EMA, log, save.

It is given model, objective and loader, and imports none of them. One step is: this rank's micro-batches through the
objective, one reduction of gradients, one sum over ranks of all numbers (loss, loss per pyramid stage, tokens, and
rank 0's order to save or end), then, only if that loss is finite, the optimizer. So every rank decides the same from
the same bits. What was seen of the data is the loader's to count, and part of its state.

A resume, a restart after a lost worker and the boundary of a curriculum stage are one path: build model and engine,
load the newest committed checkpoint, go on at its step. One that is damaged is passed over aloud for the one before it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import DamagedCheckpointError, PreemptedError
from m4v_dist.lease import Holder, LeaseKeeper
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.stop_request import StopRequest
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.attempt import Attempt, begin_attempt
from m4v_dist.trainer.curriculum import CurriculumStage, curriculum_stage_at, trained_in_some_stage
from m4v_dist.trainer.deepspeed_engine import ZeroEngine, partition
from m4v_dist.trainer.ema import Ema
from m4v_dist.trainer.guards import Clock, SkippedSteps, require_same_slots
from m4v_dist.trainer.measured import StepMeter
from m4v_dist.trainer.metrics import Broken
from m4v_dist.trainer.optimizer import learning_rate
from m4v_dist.trainer.profiling import ProfileWindow
from m4v_dist.trainer.ranges import Ranges
from m4v_dist.trainer.rank_watch import RankWatch
from m4v_dist.trainer.record import Record
from m4v_dist.trainer.replicas import ReplicasDifferError, require_equal_replicas
from m4v_dist.trainer.run_state import checkpoint_bytes, checkpoint_tensors, counts_to_json, load_run
from m4v_dist.trainer.saving import Saving
from m4v_dist.trainer.seams import BatchFlops, BuildModel, Loader, Objective, Place, StepBatch
from m4v_dist.trainer.stopping import Order, Stopping
from m4v_dist.trainer.tally import Tally


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
        build_model: builds the model with fresh weights, part by part.
        fill_start: fills, part by part and in place, a model that no checkpoint will fill; a resume never asks.
        objective: called with the engine's model and a micro-batch.
        loader: this rank's.
        stop_requests: asked on rank 0 in each step; see `Stopping` for what each leads to.
        holder: the driver that this attempt belongs to and that keeps the run's lease; None: this process, for itself.
        batch_flops: counts a micro-batch, for MFU; without it there is none.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        *,
        build_model: BuildModel,
        objective: Objective,
        loader: Loader,
        fill_start: Place = lambda _name, _part: None,
        stop_requests: Callable[[], Sequence[StopRequest]] = lambda: (),
        holder: Holder | None = None,
        batch_flops: BatchFlops = lambda _batch, _freeze: (0.0, 0.0),
    ) -> None:
        self.config, self.mesh, self.objective, self.loader = config, mesh, objective, loader
        self.build_model, self.fill_start, self.stop_requests = build_model, fill_start, stop_requests
        self.meter = StepMeter(mesh.device, batch_flops, sequence_size=mesh.sequence.size)
        self.holder = holder
        self.profile = ProfileWindow(config.trainer.profile, config.run.folder, mesh)
        self.step = 0
        self.skipped = SkippedSteps(config.trainer.max_skipped_steps)
        self.clock = Clock()
        self.held_out_loss: float | None = None
        self.stopping = Stopping(margin_s=config.launch.stop_margin_s)
        self.order = Order.GO_ON
        self.validation_s = 0.0
        self.record: Record
        self.saving: Saving
        self.watch: RankWatch
        self.engine: ZeroEngine
        self.ema: Ema

    def run(self) -> TrainResult:
        """Train to the end of the curriculum, from wherever the run folder stands (collective).

        Raises:
            PreemptedError: asked to stop; the state is saved, if there was time for it.
            NonFiniteError: too many steps in a row were not finite.
            SaveFailedError: too many saves in a row failed.
            RunInUseError: another driver holds the run, or took it over.
            DataError: the newest checkpoint does not fit this model, or all are damaged.
        """
        self.clock.lap()
        holder = self.holder or Holder.of_this_process()
        with self._kept_lease(holder):
            return self._run(begin_attempt(self.config, self.mesh, holder))

    def _kept_lease(self, holder: Holder) -> AbstractContextManager[object]:
        """Rank 0 keeps its own lease where no driver does."""
        if self.holder is not None or not self.mesh.is_main:
            return nullcontext()
        return LeaseKeeper(self.config.checkpoint_folder, holder, self.config.trainer.lease_timeout_s)

    def _run(self, attempt: Attempt) -> TrainResult:
        self.record = Record(self.config, self.mesh, attempt, self.clock)
        self.saving = Saving(
            self.config,
            self.mesh,
            attempt,
            self.clock,
            note_duration=self.stopping.saved,
            ask_order=lambda: self.stopping.order(self.stop_requests()),
        )
        self.step = 0 if attempt.saved is None else checkpoint.step_of(attempt.saved)
        is_ended_as_asked = False
        self.watch = RankWatch(self.config.trainer, self.mesh, self.config.run.folder, attempt.number)
        try:
            with self.watch:
                if attempt.damage is not None:
                    self.step = self.saving.fall_back(DamagedCheckpointError(attempt.damage))
                self._train(attempt.broken)
            is_ended_as_asked = True
        except PreemptedError:
            # Ended without a save it is one that broke off: its steps since the last commit count as lost.
            is_ended_as_asked = self.order is not Order.END
            raise
        finally:
            self._end_attempt(is_ended_as_asked=is_ended_as_asked)
        assert self.saving.saved is not None, "the curriculum has at least one step, and its end is saved"
        return TrainResult(self.step, self.held_out_loss, self.saving.saved)

    def _train(self, broken: Broken | None) -> None:
        """Do all curriculum stages that are left.

        Args:
            broken: what the attempt before lost, if this one is a restart.
        """
        while (curriculum_stage := curriculum_stage_at(self.config.curriculum, self.step)) is not None:
            try:
                self._enter(curriculum_stage)
            except DamagedCheckpointError as error:
                self.engine.close()
                # Perhaps in an earlier curriculum stage.
                self.step = self.saving.fall_back(error)
                continue
            self.record.start(broken, self.step, self.saving.saved)
            broken = None
            if self.step == 0:
                self._validate()
            self._train_stage(curriculum_stage)
            self.loader.close()
            self.engine.close()
            if self.step < self.config.total_steps:
                # As the engine's: a device may hold the states of one stage and not of two.
                del self.ema
            self.record.lap_other()
        if broken is not None:
            # It was killed between its last commit and its end: nothing is left to do, and its loss still counts.
            self.record.start(broken, self.step, self.saving.saved)

    # ---- curriculum stages

    def _enter(self, curriculum_stage: CurriculumStage) -> None:
        """Build the engine of a curriculum stage and fill it from the newest checkpoint, if there is one."""
        settings, config = curriculum_stage.settings, self.config
        self.watch.begin("building and loading", self.step)

        def place(name: str, part: nn.Module) -> None:
            if self.saving.saved is None:
                self.fill_start(name, part)
            partition(part, config.trainer, self.mesh)

        self.engine = ZeroEngine(
            self.build_model(place),
            config.trainer,
            freeze=settings.freeze,
            micro_batch_slots=settings.micro_batch_slots,
            mesh=self.mesh,
        )
        self.ema = Ema(self.engine.slices(), config.trainer.ema_decay, trained_in_some_stage(config.curriculum))
        self.stopping.expect_save(checkpoint_bytes(self.engine.shapes))
        if self.saving.saved is not None:
            load_run(self.saving.saved, self.engine, self.ema, self.loader, self.skipped)
        self.saving.reserve(checkpoint_tensors(self.engine, self.ema, to_load=False))
        self.loader.enter(curriculum_stage.index, self.step)
        stage = {"curriculum_stage": settings.name, "start": curriculum_stage.start, "stop": curriculum_stage.stop}
        facts = {"freeze": list(settings.freeze), "world_size": self.mesh.world_size}
        self.record.write("stage", self.step, {**stage, **facts})
        span = f"steps {self.step} to {curriculum_stage.stop}"
        self.record.log("stage %s: %s, from %s", settings.name, span, self.saving.saved or "the start")

    def _train_stage(self, curriculum_stage: CurriculumStage) -> None:
        every = self.config.trainer
        batches = self.loader.steps()
        while self.step < curriculum_stage.stop:
            self._train_step(curriculum_stage, batches)
            if every.replica_check_every_steps and self.step % every.replica_check_every_steps == 0:
                # Before a save: weights that differ are not kept.
                self._check_replicas()
            is_stopping = self.order in (Order.SAVE_AND_END, Order.END)
            is_at_boundary = self.step == curriculum_stage.stop and not is_stopping
            if self.step == self.config.total_steps or (is_at_boundary and self._is_validation_due(self.step)):
                # While this engine is there; and before the last commit: a kill between the two would leave a finished
                # run without its figure.
                self.held_out_loss = self._validate()
            if self.order is Order.END:
                raise self._unsaved()
            # The next engine is built from it, or this attempt ends with it.
            must_stand = self.step == curriculum_stage.stop or self.order is Order.SAVE_AND_END
            if must_stand or self.order.saves or self.step % every.checkpoint_every_steps == 0:
                self._save(curriculum_stage, must_stand=must_stand)
            if self.order is Order.SAVE:
                # Workers end as soon as it is committed: steps done meanwhile would be lost. It may fail, as any may.
                self.saving.settle(self.step)
            if self.order is Order.SAVE_AND_END and self.step < self.config.total_steps:
                raise PreemptedError(self._goodbye(f"saved: {self.saving.saved}"))
            if self.step < curriculum_stage.stop and self._is_validation_due(self.step):
                self._validate()

    def _is_validation_due(self, step: int) -> bool:
        every = self.config.trainer.validate_every_steps
        return step == self.config.total_steps or (every > 0 and step % every == 0)

    def _unsaved(self) -> PreemptedError:
        return PreemptedError(self._goodbye(f"not saved; {self.saving.give_up() or 'nothing'} stands"))

    def _goodbye(self, what_stands: str) -> str:
        reason = self.mesh.from_main(self.stopping.reason)
        return f"asked to stop at step {self.step} ({reason}); {what_stands}. Submit again to go on."

    def _train_step(self, curriculum_stage: CurriculumStage, batches: Iterator[StepBatch]) -> None:
        self.record.lap_other()
        batch = next(batches)
        self.watch.begin_step(batch)
        assert batch.step == self.step, f"the loader yields step {batch.step}, the trainer is at {self.step}"
        data_s = self.clock.lap()
        require_same_slots(self.mesh, batch.micro_batches)
        self.profile.begin_step(self.step)
        rate = learning_rate(curriculum_stage.settings, self.step - curriculum_stage.start)
        fresh_scale = curriculum_stage.settings.fresh_learning_rate_scale
        tally = Tally()
        self.meter.begin()
        with self.engine.accumulate(len(batch.micro_batches)):
            for micro_batch in batch.micro_batches:
                with self.profile.span("forward"):
                    output = self.objective(self.engine.model, micro_batch)
                with self.profile.span("backward"):
                    self.engine.backward(output.loss)
                tally.add(output, micro_batch)
                self.watch.at("its next micro-batch, or adding up gradients")
            self.meter.end()
        order = Order.GO_ON
        if self.mesh.is_main:
            upcoming_s = self.validation_s if self._is_validation_due(self.step + 1) else 0.0
            order = self.stopping.order(
                self.stop_requests(), upcoming_s=upcoming_s, saving_since=self.saving.saving_since
            )
        self.watch.at("adding up over ranks")
        sums = tally.summed(
            self.mesh,
            bad_records=self.loader.num_bad_records,
            order=order,
            has_failed_save=self.saving.has_failed,
            measured=self.meter.measured(batch, curriculum_stage.settings.freeze, data_s=data_s),
        )
        self.order = Order(sums.order)
        # Agreed by all ranks before the optimizer moves: the sum is the same bits on each, NaN included.
        with self.profile.span("optimizer"):
            norm = self.engine.step(rate, fresh_scale=fresh_scale) if math.isfinite(sums.loss) else None
        if not math.isfinite(sums.loss):
            self.engine.discard()
        if norm is not None:
            self.ema.update(self.engine.slices())
        self.watch.end_step()
        self.skipped.record(step=self.step, is_applied=norm is not None, loss=sums.loss)
        facts = {
            "curriculum_stage": curriculum_stage.settings.name,
            "train/lr": rate,
            "train/lr_fresh": rate * fresh_scale,
            "train/skipped_steps": self.skipped.total,
        }
        step_s = self.record.step(self.step, sums, self.loader, facts, norm=norm, data_s=data_s)
        self.stopping.stepped(data_s + step_s)
        if norm is None:
            self.record.skipped_step(self.step, tally, loss=sums.loss)
        self.profile.end_step(self.step)
        # After the rows, which say what was not finite.
        self.skipped.require_finite(step=self.step, loss=sums.loss)
        self.step += 1
        self.saving.note_commit()
        if sums.has_failed_save:
            self.record.lap_other()
            self.watch.begin("clearing up after a save that failed", self.step)
            self.saving.settle(self.step)

    def _check_replicas(self) -> None:
        try:
            require_equal_replicas(self.engine.replicas(), self.mesh, step=self.step)
        except ReplicasDifferError as error:
            self.record.write("replicas_differ", self.step, {"error": str(error)})
            raise

    @torch.no_grad()
    def _validate(self) -> float | None:
        """Loss of the fixed held-out slots with their fixed draws; None when it is switched off (collective)."""
        if not self.config.trainer.held_out_slots:
            return None
        self.record.lap_other()
        self.watch.begin("the held-out loss", self.step)
        self.engine.train(False)
        tally = Tally()
        micro_batches = self.loader.held_out()
        require_same_slots(self.mesh, micro_batches)
        for micro_batch in micro_batches:
            output = self.objective(self.engine.model, micro_batch)
            tally.add(output, micro_batch)
        self.engine.train(True)
        sums = tally.summed(self.mesh)
        self.validation_s = self.record.held_out(self.step, sums)
        return sums.loss

    # ---- state

    def _save(self, curriculum_stage: CurriculumStage, *, must_stand: bool) -> None:
        self.record.lap_other()
        self.watch.begin("waiting for the save before it", self.step)

        def tensors() -> dict[str, Ranges]:
            # At each try: one that failed and begins anew has not stalled.
            self.watch.begin("saving", self.step)
            return checkpoint_tensors(self.engine, self.ema, to_load=False)

        self.order = self.saving.save(
            self.step,
            tensors,
            lambda: counts_to_json(curriculum_stage, self.engine, self.ema, self.loader, self.skipped),
            must_stand=must_stand,
            order=self.order,
        )
        if self.order is Order.END:
            # Asked to stop between two tries, with no time for another.
            raise self._unsaved()

    def _end_attempt(self, *, is_ended_as_asked: bool) -> None:
        """Close what is open."""
        if not is_ended_as_asked:
            self.saving.close()
        self.record.end(self.step, is_ended_as_asked=is_ended_as_asked)
        # Last: a trace that cannot be written must not make an attempt that ended well look broken.
        self.profile.close(self.step)
