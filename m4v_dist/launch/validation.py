"""Sample from new checkpoints beside training: in a Ray actor of its own, one at a time, and training never waits.

Knows nothing of models: it runs the function that it is given. Watches metrics.jsonl for commits, as the progress bar
does. A sampling that fails, or is not done in time, is logged and counted and leaves `failure.json`; it never ends the
run, and the next commit is sampled as if nothing had happened.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from m4v_dist import storage
from m4v_dist.config.training_settings import LaunchSettings
from m4v_dist.launch.metrics_tail import MetricsTail
from m4v_dist.launch.supervisor import process_started, run_deadline

logger = logging.getLogger(__name__)

POLL_S = 1.0

SampleFunction = Callable[[dict[str, Any]], Any]
"""Runs in the actor with its config and `step`, the newest commit: samples from it and writes the videos."""


class _SamplingActor:
    """A process for one sampling: what it holds of memory is given back with it."""

    def run(self, function: SampleFunction, config: dict[str, Any]) -> Any:
        return function(config)


class ValidationSampling:
    """Samples while its block runs. Leaving it well waits for the last one, within its time and the run's.

    Args:
        function: see `SampleFunction`.
        function_config: picklable; handed to the function.
        run_folder: local or mounted; failures are noted in its `validation`.
        every_steps: a commit is sampled when another multiple of this is passed; 0 samples none.
        settings: what the actor may take.
    """

    def __init__(
        self,
        function: SampleFunction,
        function_config: Mapping[str, Any],
        run_folder: str,
        *,
        every_steps: int,
        settings: LaunchSettings,
    ) -> None:
        self._function, self._config = function, dict(function_config)
        self._folder, self._settings = storage.join(run_folder, "validation"), settings
        self._tail = MetricsTail(run_folder, from_end=True)
        self._every_steps = every_steps
        there = [name for name in storage.list_folder(self._folder) if name.startswith("step_")]
        self._newest = self._sampled = max((int(name.removeprefix("step_")) for name in there), default=0)
        self._running: tuple[Any, Any, int, float] | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="validation", daemon=True)
        self.num_done = 0
        self.num_failed = 0

    def __enter__(self) -> "ValidationSampling":
        if self._every_steps:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._every_steps:
            return
        self._is_over.set()
        self._thread.join()
        if error is not None:
            self._end()
            return
        self._look()
        deadline = run_deadline(self._settings, process_started())
        while self._running is not None:
            if deadline is not None and time.time() > deadline - self._settings.stop_margin_s:
                self._note_failure(self._running[2], "not done before the run's time limit")
                self._end()
                break
            time.sleep(POLL_S / 4)
            self._look()
        logger.info("validation: %d checkpoints sampled, %d failed; %s", self.num_done, self.num_failed, self._folder)

    def _follow(self) -> None:
        while not self._is_over.wait(POLL_S):
            self._look()

    def _look(self) -> None:
        """Take up new commits, what has ended, and what is due."""
        try:
            rows = self._tail.new_rows()
        except OSError as error:
            # A mounted folder may come back, and what was not read is read then.
            logger.warning("validation: new checkpoints cannot be looked for: %s", error)
            rows = []
        steps = [row["step"] for row in rows if row["kind"] == "checkpoint"]
        # A restart commits steps again, which need no second video.
        self._newest = max([self._newest, *steps])
        if self._running is not None:
            self._look_at_running()
        if self._running is None and self._newest // self._every_steps > self._sampled // self._every_steps:
            self._start(self._newest)

    def _start(self, step: int) -> None:
        import ray

        self._sampled = step
        threads = str(max(1, int(self._settings.sampler_cpus)))
        variables = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
        actor_class: Any = ray.remote(num_cpus=self._settings.sampler_cpus, num_gpus=self._settings.sampler_gpus)(
            _SamplingActor
        )
        actor = actor_class.options(runtime_env={"env_vars": variables}).remote()
        done = actor.run.remote(self._function, {**self._config, "step": step})
        self._running = (actor, done, step, time.monotonic())

    def _look_at_running(self) -> None:
        import ray
        from ray.exceptions import RayError

        assert self._running is not None
        _, done, step, since = self._running
        if ray.wait([done], timeout=0)[0]:
            try:
                ray.get(done)
            # What the function raised comes as Ray's own error too.
            except RayError as error:
                self._note_failure(step, str(error).strip())
            else:
                self.num_done += 1
                logger.info("validation: sampled after step %d in %.0f s", step, time.monotonic() - since)
            self._end()
        elif time.monotonic() - since > self._settings.sampler_timeout_s:
            self._note_failure(
                step,
                f"not done after launch.sampler_timeout_s={self._settings.sampler_timeout_s:g}; is there room for "
                f"launch.sampler_cpus={self._settings.sampler_cpus:g} and launch.sampler_gpus="
                f"{self._settings.sampler_gpus:g} beside the workers?",
            )
            self._end()

    def _note_failure(self, step: int, error: str) -> None:
        self.num_failed += 1
        logger.warning("validation after step %d failed (failure %d): %s", step, self.num_failed, error)
        path = storage.join(self._folder, f"step_{step:08d}", "failure.json")
        try:
            storage.write_json(path, {"step": step, "error": error, "time": time.time()})
        except OSError as cause:
            # Counted and logged all the same; a full disk ends no training that went well.
            logger.warning("%s cannot be written: %s", path, cause)

    def _end(self) -> None:
        import ray

        if self._running is not None:
            ray.kill(self._running[0])
            self._running = None
