"""Start Ray, run one function on N workers, restart them after a loss, and bring the right error back.

The only library file that imports ray; it knows nothing of what the function does. Three things that Ray Train leaves
open are settled here:
- A `JobError` (wrong config, unusable data, asked to stop) would fail again in the same way, so it ends the run at
  once: the rank that meets it tells the `Verdict`, and the restarted workers return before they do anything.
- Errors cross processes: Ray gives back its own wrapper. The Verdict keeps the first error of each attempt, and
  `run_workers` raises a JobError as itself, so that the exit code survives.
- The same name and storage path would silently resume Ray's own state; each call takes a fresh name. What is resumed
  is the function's business (the trainer looks for the newest committed checkpoint).
"""

import logging
import os
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from m4v_dist.config.schema import LaunchSettings
from m4v_dist.errors import JobError, PreemptedError, RetriesExhaustedError

logger = logging.getLogger(__name__)

WorkerFunction = Callable[[dict[str, Any], Callable[[], bool]], Any]
"""Runs on every worker: (its config, "was the run asked to stop?") -> answer; rank 0's is returned to the driver."""


def start_ray(settings: LaunchSettings, *, num_cpus: int | None = None) -> None:
    """Join the cluster of `settings.address` or of the running Ray job; else start Ray on this machine.

    Args:
        settings: address and resources of the workers.
        num_cpus: CPUs that a local Ray declares; None takes what the workers need, at least the machine's own.
    """
    import ray

    if ray.is_initialized():
        logger.info("Ray is up already: %s", ray.get_runtime_context().gcs_address)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = settings.address or os.environ.get("RAY_ADDRESS")
    if address is not None:
        ray.init(address=address, logging_level=logging.WARNING)
        logger.info("joined the Ray cluster at %s", address)
        return
    needed = max(1, round(settings.num_workers * settings.cpus_per_worker + 0.5))
    cpus = num_cpus if num_cpus is not None else max(needed, os.cpu_count() or 1)
    # A folder of its own: Ray would join another local cluster that it finds in a shared one. Short, because socket
    # paths in it are cut at 107 characters.
    folder = os.environ.get("RAY_TMPDIR") or tempfile.mkdtemp(
        prefix="ray-", dir="/tmp" if os.path.isdir("/tmp") else None
    )
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        _temp_dir=folder,
        logging_level=logging.WARNING,
        runtime_env={"worker_process_setup_hook": _quieting_hook()},
    )
    logger.info("started Ray on this machine: %d CPUs declared, logs in %s", cpus, folder)


def _quieting_hook() -> Callable[[], None]:
    """What runs first in each process of a local Ray: it silences one message that would come every second.

    Ray Train's placement group cleaner asks the dashboard whether the controller lives; a local Ray has no dashboard.
    """

    def quiet() -> None:
        # Inside, so that Ray ships this function by value: the process that runs it cannot import our modules yet.
        import logging

        cleaner = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
        logging.getLogger(cleaner).setLevel(logging.ERROR)

    return quiet


def stop_ray() -> None:
    """Disconnect, with the workers' last log lines shown; ends a Ray that `start_ray` started."""
    import ray

    ray.shutdown()


@contextmanager
def ray_session(settings: LaunchSettings) -> Iterator[None]:
    """`start_ray`, and `stop_ray` on leaving unless Ray was up before."""
    import ray

    was_up = ray.is_initialized()
    start_ray(settings)
    try:
        yield
    finally:
        if not was_up:
            stop_ray()


@dataclass(frozen=True)
class Failure:
    """What one rank reported before it died.

    Args:
        attempt: worker group, from 1.
        rank: the rank.
        where: host and process.
        summary: error type and message.
        lines: the traceback's text.
        error: the error itself if it must end the run as it is, else None.
    """

    attempt: int
    rank: int
    where: str
    summary: str
    lines: str
    error: JobError | None

    def __str__(self) -> str:
        return f"attempt {self.attempt}, rank {self.rank} ({self.where}): {self.summary}"


class Verdict:
    """A Ray actor beside the workers: collects their errors, and carries the wish to stop to them."""

    def __init__(self) -> None:
        self._attempt = 0
        self._failures: list[Failure] = []
        self._should_stop = False

    def begin(self, rank: int) -> bool:
        """A rank starts; False if the run has ended and nothing is to be done."""
        if rank == 0:
            self._attempt += 1
        return self.fatal() is None

    def record(self, rank: int, where: str, summary: str, lines: str, error: JobError | None) -> None:
        """Note a failure, in the order of arrival."""
        self._failures.append(Failure(max(1, self._attempt), rank, where, summary, lines, error))

    def fatal(self) -> JobError | None:
        """The first error that must end the run."""
        return next((failure.error for failure in self._failures if failure.error is not None), None)

    def failures(self) -> list[Failure]:
        """All that was noted."""
        return self._failures

    def stop(self) -> None:
        """Ask the function to save and end."""
        self._should_stop = True

    def should_stop(self) -> bool:
        """Whether the driver asked to stop."""
        return self._should_stop


def run_workers(
    function: WorkerFunction, function_config: Mapping[str, Any], settings: LaunchSettings, name: str, storage_path: str
) -> Any:
    """Run `function` on `settings.num_workers` ranks of one process group and return rank 0's answer.

    Ray must be up. A lost worker, or an error that is no JobError, restarts all of them, up to
    `settings.max_failures` times.

    Args:
        function: see `WorkerFunction`; the process group (NCCL on GPU, gloo on CPU) is up when it is called.
        function_config: picklable; handed to the function.
        settings: workers, resources, restarts.
        name: shown in Ray; a fresh suffix is added.
        storage_path: where Ray keeps its own notes of the run, local or s3://.

    Raises:
        JobError: as a worker raised it, without a retry.
        RetriesExhaustedError: failures passed the ceiling; the message holds the root cause.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    # Read by Ray Train's controller; its default of 2 s is most of a small run's restart.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    verdict: Any = ray.remote(num_cpus=0)(Verdict).remote()  # type: ignore[attr-defined]
    trainer = TorchTrainer(
        _run_one_rank,
        train_loop_config={"function": function, "config": dict(function_config), "verdict": verdict},
        torch_config=TorchConfig(backend="nccl" if settings.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=settings.use_gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker} | ({"GPU": 1} if settings.use_gpu else {}),
        ),
        # Ray Train v2 stands behind the name that its stubs give v1's class.
        run_config=RunConfig(  # type: ignore[call-arg]
            name=f"{name}-{time.time_ns()}",
            storage_path=storage_path if "://" in storage_path else os.path.abspath(storage_path),
            failure_config=FailureConfig(max_failures=settings.max_failures),
            worker_runtime_env={"env_vars": _environment(settings)},
        ),
    )
    try:
        with _sigterm_asks_to_stop(lambda: ray.get(verdict.stop.remote())):
            result = trainer.fit()
    except TrainingFailedError as error:
        fatal = ray.get(verdict.fatal.remote())
        if fatal is not None:
            raise fatal from error
        raise RetriesExhaustedError(_root_cause(error, ray.get(verdict.failures.remote()), settings)) from error
    fatal = ray.get(verdict.fatal.remote())
    if fatal is not None:
        raise fatal
    return result.return_value  # type: ignore[attr-defined]


def _environment(settings: LaunchSettings) -> dict[str, str]:
    """Variables of a worker's process; they must be there before torch is imported."""
    threads = str(max(1, int(settings.cpus_per_worker)))
    variables = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    return variables if settings.use_gpu else {**variables, "DS_ACCELERATOR": "cpu"}


def _run_one_rank(task: dict[str, Any]) -> Any:
    """What Ray Train calls on each worker, in a thread of its own."""
    import ray
    import ray.train
    import torch

    verdict, rank = task["verdict"], ray.train.get_context().get_world_rank()
    if not ray.get(verdict.begin.remote(rank)):
        return None
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s %(levelname)s rank {rank} %(name)s: %(message)s")
    if torch.cuda.is_available() and torch.distributed.get_backend() == "nccl":
        # The current device belongs to a thread, and this one is new.
        torch.cuda.set_device(ray.train.torch.get_device())

    def should_stop() -> bool:
        return bool(ray.get(verdict.should_stop.remote()))

    try:
        return task["function"](task["config"], should_stop)
    except BaseException as error:
        # Told before it is raised: Ray ends the other ranks at once, and their broken connections would hide the cause.
        where = f"{socket.gethostname()}, process {os.getpid()}"
        summary, lines = f"{type(error).__name__}: {error}", traceback.format_exc()
        job_error = error if isinstance(error, JobError) else None
        ray.get(verdict.record.remote(rank, where, summary, lines, job_error))
        if isinstance(error, PreemptedError):
            # Raised by all ranks together, so none is left waiting: no restart only to find that the run has ended.
            return None
        raise


def _root_cause(error: Exception, failures: list[Failure], settings: LaunchSettings) -> str:
    """Say what went wrong first in the last attempt: a process that died without a word, else the first error told."""
    from ray.exceptions import RayActorError

    told = {failure.rank for failure in failures if failure.attempt == failures[-1].attempt} if failures else set()
    last = [failure for failure in failures if failure.attempt == failures[-1].attempt]
    by_rank: dict[int, Exception] = getattr(error, "worker_failures", {})
    silent = [rank for rank, reason in by_rank.items() if isinstance(reason, RayActorError) and rank not in told]
    if silent:
        cause = f"rank {silent[0]} died without an error (killed, or its node was lost): {by_rank[silent[0]]}"
    elif last:
        logger.error("traceback of %s\n%s", last[0], last[0].lines)
        cause = str(last[0])
    else:
        cause = f"{type(error).__name__}: {error}"
    return (
        f"workers failed more often than launch.max_failures={settings.max_failures} allows; root cause of the last "
        f"attempt: {cause}. What was committed is kept: submit the same command again to go on."
    )


@contextmanager
def _sigterm_asks_to_stop(stop: Callable[[], None]) -> Iterator[None]:
    """While inside, SIGTERM calls `stop` in a thread of its own instead of ending the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _: object) -> None:
        logger.warning("signal %d: asking the workers to save and end.", number)
        # Ray's calls are not made for signal handlers.
        threading.Thread(target=stop, daemon=True).start()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
