"""The loop: next batch, objective, backward, guard, step, EMA, log, save.

It is given model, objective and loader, and imports none of them. One step is: this rank's micro-batches through the
objective, one reduction of gradients, one sum over ranks of all numbers (loss, loss per pyramid stage, tokens, and
rank 0's order to save or end), then, only if that loss is finite, the optimizer. So every rank decides the same from
the same bits. What was seen of the data is the loader's to count, and part of its state.

A resume, a restart after a lost worker and the boundary of a curriculum stage are one path: build model and engine,
load the newest committed checkpoint, go on at its step.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from m4v_dist import storage
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import PreemptedError
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.stop_request import StopRequest
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.attempt import begin_attempt
from m4v_dist.trainer.curriculum import CurriculumStage, curriculum_stage_at
from m4v_dist.trainer.deepspeed_engine import ZeroEngine
from m4v_dist.trainer.ema import Ema
from m4v_dist.trainer.guards import Clock, SkippedSteps
from m4v_dist.trainer.metrics import Broken, Ledger, Metrics
from m4v_dist.trainer.optimizer import learning_rate
from m4v_dist.trainer.run_state import checkpoint_bytes, checkpoint_tensors, load_tensors
from m4v_dist.trainer.seams import Loader, Objective, StepBatch
from m4v_dist.trainer.stopping import Order, Stopping
from m4v_dist.trainer.tally import Tally, train_row

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
        stop_requests: asked on rank 0 in each step; see `Stopping` for what each leads to.
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
        stop_requests: Callable[[], Sequence[StopRequest]] = lambda: (),
    ) -> None:
        self.config, self.mesh, self.objective, self.loader = config, mesh, objective, loader
        self.build_model, self.fill_start, self.stop_requests = build_model, fill_start, stop_requests
        self.folder = config.run.folder
        self.checkpoints = storage.join(self.folder, "checkpoints")
        self.sources = tuple(source.name for source in config.train_sources)
        self.step = 0
        self.skipped = SkippedSteps(config.trainer.max_skipped_steps)
        self.ledger = Ledger()
        self.clock = Clock()
        self.saved: str | None = None
        self.held_out_loss: float | None = None
        self.metrics: Metrics | None = None
        self.stopping = Stopping(margin_s=config.launch.stop_margin_s)
        self.order = Order.GO_ON
        self.validation_s = 0.0
        self.engine: ZeroEngine
        self.ema: Ema

    def run(self) -> TrainResult:
        """Train to the end of the curriculum, from wherever the run folder stands (collective).

        Raises:
            PreemptedError: asked to stop; the state is saved, if there was time for it.
            NonFiniteError: too many steps in a row were not finite.
            DataError: the newest checkpoint does not fit this model.
        """
        self.clock.lap()
        self.saved, self.ledger, self.metrics, broken = begin_attempt(self.config, self.mesh)
        self.step = 0 if self.saved is None else checkpoint.step_of(self.saved)
        is_ended_as_asked = False
        try:
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
            row = {"resumed_from": self.saved, "timing/restart_s": restart_s, "timing/build_s": build_s}
            row |= {"lost_steps": broken.lost_steps, "lost_s": broken.lost_s}
            row |= {"world_size": self.mesh.world_size, "world_size_before": broken.world_size}
            self._write("restart", self.step, row)
        # Now, so that an attempt that dies before its first commit still counts.
        self._write_ledger()

    def _enter(self, curriculum_stage: CurriculumStage) -> None:
        """Build the engine of a curriculum stage and fill it from the newest checkpoint, if there is one."""
        settings, config = curriculum_stage.settings, self.config
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
        self.stopping.expect_save(checkpoint_bytes(self.engine.shapes))
        if self.saved is not None:
            self._load(self.saved)
        self.loader.enter(curriculum_stage.index, self.step)
        stage = {"curriculum_stage": settings.name, "start": curriculum_stage.start, "stop": curriculum_stage.stop}
        facts = {"freeze": list(settings.freeze), "world_size": self.mesh.world_size}
        self._write("stage", self.step, {**stage, **facts})
        span = f"steps {self.step} to {curriculum_stage.stop}"
        self._log("stage %s: %s, from %s", settings.name, span, self.saved or "the start")

    def _train_stage(self, curriculum_stage: CurriculumStage) -> None:
        every = self.config.trainer
        batches = self.loader.steps()
        while self.step < curriculum_stage.stop:
            self._train_step(curriculum_stage, batches)
            if self.step == self.config.total_steps:
                # Before the last commit: a kill between the two would leave a finished run without its figure.
                self.held_out_loss = self._validate()
            if self.order is Order.END:
                raise PreemptedError(self._goodbye(f"not saved; {self.saved or 'nothing'} stands"))
            is_due = self.step % every.checkpoint_every_steps == 0 or self.step == curriculum_stage.stop
            if is_due or self.order.saves:
                self._save(curriculum_stage)
            if self.order is Order.SAVE_AND_END and self.step < self.config.total_steps:
                raise PreemptedError(self._goodbye(f"saved: {self.saved}"))
            if self._is_validation_due(curriculum_stage, self.step):
                self._validate()

    def _is_validation_due(self, curriculum_stage: CurriculumStage, step: int) -> bool:
        every = self.config.trainer.validate_every_steps
        return every > 0 and step % every == 0 and step < curriculum_stage.stop

    def _goodbye(self, what_stands: str) -> str:
        reason = self.mesh.from_main(self.stopping.reason)
        return f"asked to stop at step {self.step} ({reason}); {what_stands}. Submit again to go on."

    def _train_step(self, curriculum_stage: CurriculumStage, batches: Iterator[StepBatch]) -> None:
        self._lap_other()
        batch = next(batches)
        assert batch.step == self.step, f"the loader yields step {batch.step}, the trainer is at {self.step}"
        data_s = self.clock.lap()
        rate = learning_rate(curriculum_stage.settings, self.step - curriculum_stage.start)
        tally = Tally()
        with self.engine.accumulate():
            for micro_batch in batch.micro_batches:
                output = self.objective(self.engine.model, micro_batch)
                self.engine.backward(output.loss)
                tally.add(output.loss, output.metrics, micro_batch)
        order = Order.GO_ON
        if self.mesh.is_main:
            upcoming_s = self.validation_s if self._is_validation_due(curriculum_stage, self.step + 1) else 0.0
            order = self.stopping.order(self.stop_requests(), upcoming_s=upcoming_s)
        sums = tally.summed(self.mesh, bad_records=self.loader.num_bad_records, order=order)
        self.order = Order(sums.order)
        # Agreed by all ranks before the optimizer moves: the sum is the same bits on each, NaN included.
        norm = self.engine.step(rate) if math.isfinite(sums.loss) else None
        if not math.isfinite(sums.loss):
            self.engine.discard()
        if norm is not None:
            self.ema.update(self.engine.slices())
        step_s = self.clock.lap()
        self.stopping.stepped(data_s + step_s)
        self.ledger.data_s += data_s
        if norm is not None:
            self.ledger.step_s += step_s
        else:
            self.ledger.lost_s += step_s
        self.skipped.record(step=self.step, is_applied=norm is not None, loss=sums.loss)
        if self.step % self.config.logging.every_steps == 0:
            row = train_row(sums, norm=norm, step_s=step_s, data_s=data_s, world_size=self.mesh.world_size)
            row |= {f"data/{name}/samples_seen": self.loader.samples_seen.get(name, 0) for name in self.sources}
            row |= {f"data/{name}/tokens_seen": self.loader.tokens_seen.get(name, 0) for name in self.sources}
            row |= {"train/lr": rate, "train/skipped_steps": self.skipped.total}
            self._write("train", self.step, {"curriculum_stage": curriculum_stage.settings.name, **row})
        # After the row, which says what was not finite.
        self.skipped.require_finite(step=self.step, loss=sums.loss)
        self.step += 1

    @torch.no_grad()
    def _validate(self) -> float | None:
        """Loss of the fixed held-out slots with their fixed draws; None when it is switched off (collective)."""
        if not self.config.trainer.held_out_slots:
            return None
        self._lap_other()
        self.engine.train(False)
        tally = Tally()
        for micro_batch in self.loader.held_out():
            output = self.objective(self.engine.model, micro_batch)
            tally.add(output.loss, output.metrics, micro_batch)
        self.engine.train(True)
        sums = tally.summed(self.mesh)
        elapsed = self.validation_s = self.clock.lap()
        self.ledger.validation_s += elapsed
        row = {"validation/held_out_loss": sums.loss, "timing/validation_s": elapsed}
        row |= {f"validation/held_out_{name}": value for name, value in sums.means.items()}
        self._write("held_out", self.step, row)
        self._log("held-out loss at step %d: %.6f", self.step, sums.loss)
        return sums.loss

    # ---- state

    def _save(self, curriculum_stage: CurriculumStage) -> None:
        self._lap_other()
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
        self.stopping.saved(elapsed)
        self.ledger.checkpoint_s += elapsed
        name = checkpoint.folder_name(self.step)
        self._write("checkpoint", self.step, {"checkpoint": name, "timing/checkpoint_stall_s": elapsed})
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
            self._log("ledger: %s", ", ".join(f"{name} {value:.2f}" for name, value in self.ledger.to_json().items()))
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
