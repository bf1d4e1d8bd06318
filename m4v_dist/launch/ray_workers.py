"""Start Ray, run one function on N workers, restart them after a loss, and bring the right error back.

The only library file that imports ray; it knows nothing of what the function does. Four things that Ray Train leaves
open are settled here:
- A `JobError` (wrong config, unusable data, no memory, asked to stop) would fail again in the same way, so it ends the
  run at once: the rank that meets it tells the `Verdict`, and the restarted workers return before they do anything.
- Any other error is taken for the world's and restarted, also if it is a plain bug: so restarts that bring nothing new
  are counted, and MAX_FRUITLESS_RESTARTS in a row end the run, whatever `launch.max_failures` says.
- Errors cross processes: Ray gives back its own wrapper. The Verdict keeps the first error of each attempt, and
  `run_workers` raises a JobError as itself, so that the exit code survives.
- The same name and storage path would silently resume Ray's own state; each call takes a fresh name. What is resumed
  is the function's business (the trainer looks for the newest committed checkpoint).
"""

import logging
import math
import os
import shutil
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
from m4v_dist.errors import ConfigError, JobError, OutOfMemoryJobError, PreemptedError, RetriesExhaustedError

logger = logging.getLogger(__name__)

WorkerFunction = Callable[[dict[str, Any], Callable[[], bool]], Any]
"""Runs on every worker: (its config, "was the run asked to stop?") -> answer; rank 0's is returned to the driver."""

Progress = Callable[[dict[str, Any]], Any]
"""Asked on rank 0 before each attempt, with the function's config: a value that changes when work was committed."""

MAX_FRUITLESS_RESTARTS = 3
"""Restarts in a row without progress that are made; the next one would meet the same fault again."""


def _address(settings: LaunchSettings) -> str | None:
    return settings.address or os.environ.get("RAY_ADDRESS")


def require_resources(settings: LaunchSettings, *, num_gpus: int, num_cpus: int) -> None:
    """Check that this machine can hold the workers; Ray would wait for ever for what will not come.

    More workers than CPUs are allowed: they take turns.

    Args:
        settings: resources of the workers.
        num_gpus, num_cpus: of this machine.

    Raises:
        ConfigError: no GPU for a worker, or a worker that wants more CPUs than there are.
    """
    where = "on this machine; join a cluster by launch.address"
    if settings.use_gpu and num_gpus < settings.num_workers:
        raise ConfigError(
            f"launch.use_gpu=true needs {settings.num_workers} GPUs, one a worker, but there are {num_gpus} {where}, "
            f"set launch.use_gpu=false, or launch.num_workers={max(1, num_gpus)}."
        )
    if settings.cpus_per_worker > num_cpus:
        raise ConfigError(
            f"launch.cpus_per_worker={settings.cpus_per_worker:g}, but there are {num_cpus} CPUs {where}, or set at "
            f"most launch.cpus_per_worker={num_cpus}."
        )


def start_ray(settings: LaunchSettings, *, num_cpus: int | None = None) -> str | None:
    """Join the cluster of `settings.address` or of the running Ray job; else start Ray on this machine.

    Args:
        settings: address and resources of the workers.
        num_cpus: CPUs that a local Ray declares; None takes what the workers need, at least the machine's own.

    Returns:
        The folder that was made for a local Ray's logs and sockets, for `stop_ray` to remove; None if none was made.
    """
    import ray

    if ray.is_initialized():
        logger.info("Ray is up already: %s", ray.get_runtime_context().gcs_address)
        return None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = _address(settings)
    if address is not None:
        ray.init(address=address, logging_level=logging.WARNING)
        logger.info("joined the Ray cluster at %s: %s", address, _counted(ray.cluster_resources()))
        return None
    needed = max(1, math.ceil(settings.num_workers * settings.cpus_per_worker))
    cpus = num_cpus if num_cpus is not None else max(needed, os.cpu_count() or 1)
    # A folder of its own: Ray would join another local cluster that it finds in a shared one. Short, because socket
    # paths in it are cut at 107 characters.
    given = os.environ.get("RAY_TMPDIR")
    folder = given or tempfile.mkdtemp(prefix="ray-", dir="/tmp" if os.path.isdir("/tmp") else None)
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        _temp_dir=folder,
        logging_level=logging.WARNING,
        runtime_env={"worker_process_setup_hook": _quieting_hook()},
    )
    logger.info("started Ray on this machine: %d CPUs declared, logs in %s", cpus, folder)
    return None if given else folder


def _counted(resources: Mapping[str, float]) -> str:
    """Ray's resources in words: CPUs and GPUs."""
    return f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"


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


def stop_ray(folder: str | None = None) -> None:
    """Disconnect, with the workers' last log lines shown; ends a Ray that `start_ray` started.

    Args:
        folder: what `start_ray` returned; removed. None leaves Ray's logs where they are.
    """
    import ray

    ray.shutdown()
    if folder is not None:
        # A process of Ray that ends late may still write there: what it leaves is a few logs.
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ray_session(settings: LaunchSettings) -> Iterator[None]:
    """`start_ray` for workers, and `stop_ray` on leaving unless Ray was up before; after an error Ray's logs stay.

    Raises:
        ConfigError: see `require_resources`.
    """
    import ray
    import torch

    was_up = ray.is_initialized()
    if not was_up and _address(settings) is None:
        require_resources(settings, num_gpus=torch.cuda.device_count(), num_cpus=os.cpu_count() or 1)
    folder = start_ray(settings)
    try:
        yield
    except BaseException:
        if not was_up:
            stop_ray()
            if folder is not None:
                logger.info("Ray's logs stay in %s", folder)
        raise
    if not was_up:
        stop_ray(folder)


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

    def __init__(self, max_fruitless_restarts: int = MAX_FRUITLESS_RESTARTS) -> None:
        self._max_fruitless = max_fruitless_restarts
        self._attempt = 0
        self._progress: Any = None
        self._fruitless = 0
        self._failures: list[Failure] = []
        self._should_stop = False

    def begin(self, progress: Any) -> int | None:
        """A worker group starts: its number, from 1; None if the run has ended and nothing is to be done.

        Args:
            progress: equal to the last attempt's if nothing was committed since.
        """
        is_fruitless = self._attempt > 0 and progress == self._progress
        self._fruitless = self._fruitless + 1 if is_fruitless else 0
        self._progress = progress
        self._attempt += 1
        return None if self.fatal() is not None or self.has_given_up() else self._attempt

    def has_given_up(self) -> bool:
        """Whether one restart more than allowed began where the one before it did."""
        return self._fruitless > self._max_fruitless

    def record(self, attempt: int, rank: int, where: str, summary: str, lines: str, error: JobError | None) -> None:
        """Note a failure, in the order of arrival."""
        self._failures.append(Failure(attempt, rank, where, summary, lines, error))

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
    function: WorkerFunction,
    function_config: Mapping[str, Any],
    settings: LaunchSettings,
    name: str,
    storage_path: str,
    *,
    progress: Progress,
    max_fruitless_restarts: int = MAX_FRUITLESS_RESTARTS,
) -> Any:
    """Run `function` on `settings.num_workers` ranks of one process group and return rank 0's answer.

    Ray must be up. A lost worker, or an error that is no JobError, restarts all of them, up to
    `settings.max_failures` times, and not again and again without progress.

    Args:
        function: see `WorkerFunction`; the process group (NCCL on GPU, gloo on CPU) is up when it is called.
        function_config: picklable; handed to the function.
        settings: workers, resources, restarts.
        name: shown in Ray; a fresh suffix is added.
        storage_path: where Ray keeps its own notes of the run, local or s3://.
        progress: see `Progress`.
        max_fruitless_restarts: restarts in a row without progress that are made.

    Raises:
        JobError: as a worker raised it, without a retry.
        RetriesExhaustedError: failures passed a ceiling; the message holds the root cause.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Read by Ray Train's controller; its default of 2 s is most of a small run's restart.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    logger.info("%s for %d workers", _counted(ray.cluster_resources()), settings.num_workers)
    # On the driver's own node: what it knows must not be lost with a worker's node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0)(Verdict)
    verdict = actor.options(scheduling_strategy=here).remote(max_fruitless_restarts)
    trainer = TorchTrainer(
        _run_one_rank,
        train_loop_config={
            "function": function,
            "config": dict(function_config),
            "progress": progress,
            "verdict": verdict,
        },
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
    if ray.get(verdict.has_given_up.remote()):
        raise RetriesExhaustedError(_no_progress(ray.get(verdict.failures.remote()), max_fruitless_restarts))
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
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s %(levelname)s rank {rank} %(name)s: %(message)s")
    if torch.cuda.is_available() and torch.distributed.get_backend() == "nccl":
        # The current device belongs to a thread, and this one is new.
        torch.cuda.set_device(ray.train.torch.get_device())
    # Rank 0 asks for all, so that no rank works while another returns.
    box = [ray.get(verdict.begin.remote(task["progress"](task["config"]))) if rank == 0 else None]
    torch.distributed.broadcast_object_list(box, src=0)
    attempt = box[0]
    if attempt is None:
        return None

    def should_stop() -> bool:
        return bool(ray.get(verdict.should_stop.remote()))

    try:
        return task["function"](task["config"], should_stop)
    except BaseException as error:
        # Told before it is raised: Ray ends the other ranks at once, and their broken connections would hide the cause.
        where = f"{socket.gethostname()}, process {os.getpid()}"
        summary, lines = f"{type(error).__name__}: {error}", traceback.format_exc()
        ray.get(verdict.record.remote(attempt, rank, where, summary, lines, as_job_error(error, rank)))
        if isinstance(error, PreemptedError):
            # Raised by all ranks together, so none is left waiting: no restart only to find that the run has ended.
            return None
        raise


def as_job_error(error: BaseException, rank: int) -> JobError | None:
    """The error as one that ends the run at once, or None if a restart may help.

    Args:
        error: raised by the function.
        rank: where, for the message.
    """
    import torch

    if isinstance(error, JobError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return OutOfMemoryJobError(
            f"rank {rank} ran out of memory: {error}. Lower curriculum.*.micro_batch_slots, set model.recompute=true, "
            "raise trainer.zero_stage, or take more workers."
        )
    return None


def _no_progress(failures: list[Failure], num_restarts: int) -> str:
    """Say that restarts were in vain, with the last attempt's first error."""
    cause = "none of them told an error (killed, or their nodes were lost)"
    if failures:
        last = next(failure for failure in failures if failure.attempt == failures[-1].attempt)
        logger.error("traceback of %s\n%s", last, last.lines)
        cause = str(last)
    return (
        f"{num_restarts} restarts in a row brought no new checkpoint, so one more would fail in the same way "
        f"(launch.max_failures does not count here); first error of the last attempt: {cause}. Mend it and submit the "
        "same command again; if workers are lost sooner than a checkpoint is due, lower "
        "trainer.checkpoint_every_steps."
    )


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
