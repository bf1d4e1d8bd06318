"""Run one function on N workers of Ray Train, restart them after a loss, and bring the right error back.

Knows nothing of what the function does. Five things that Ray Train leaves open are settled here:
- What ends a run and what restarts it, see `Verdict`: the rank that meets an error tells it, and the restarted workers
  of a run that has ended return before they do anything.
- Errors cross processes: Ray gives back its own wrapper. The Verdict keeps the first error of each attempt, and
  `run_workers` raises a JobError as itself, so that the exit code survives.
- SIGTERM and SIGINT to the driver, a time limit and a node that goes become requests to the workers (`Supervisor`,
  `ControllerWatch`); the driver lives until they have saved.
- An elastic run (launch.min_workers) goes on with fewer ranks when a node is lost, and saves before it grows back. A
  node that is lost without notice counts as a failure against `launch.max_failures`, as for Ray; one that was
  announced, a resize, and a start that found too little room do not.
- The same name and storage path would silently resume Ray's own state; each call takes a fresh name. What is resumed
  is the function's business (the trainer looks for the newest committed checkpoint).
"""

import logging
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from m4v_dist.config.training_settings import LaunchSettings
from m4v_dist.errors import JobError, PreemptedError, RetriesExhaustedError, RunInUseError
from m4v_dist.launch.ray_session import describe_resources
from m4v_dist.launch.supervisor import Supervisor, process_started, time_limit
from m4v_dist.launch.verdict import MAX_FRUITLESS_RESTARTS, Failure, Verdict, as_job_error, no_progress
from m4v_dist.stop_request import StopRequest

logger = logging.getLogger(__name__)

WorkerFunction = Callable[[dict[str, Any], Callable[[], Sequence[StopRequest]]], Any]
"""Runs on every worker: (its config, "what requests to stop stand?") -> answer; rank 0's is returned to the driver."""

Progress = Callable[[dict[str, Any]], Any]
"""A value that changes when work was committed and names it, None while there is none: asked with the function's
config on rank 0 before each attempt, and by the driver for its last words."""


FailureReport = Callable[[dict[str, Any], list[int]], str | None]
"""Asked by the driver when workers failed for good: (the function's config, ranks whose processes died without an
error) -> what to add to the error."""


def run_workers(
    function: WorkerFunction,
    function_config: Mapping[str, Any],
    settings: LaunchSettings,
    name: str,
    storage_path: str,
    *,
    progress: Progress,
    failure_report: FailureReport = lambda _config, _silent: None,
    max_fruitless_restarts: int = MAX_FRUITLESS_RESTARTS,
) -> Any:
    """Run `function` on `settings.num_workers` ranks of one process group (or fewer, see `launch.min_workers`) and
    return rank 0's answer.

    Ray must be up. A lost worker, or an error that is no JobError, restarts all of them, up to
    `settings.max_failures` times, and not again and again without progress.

    Args:
        function: see `WorkerFunction`; the process group (NCCL on GPU, gloo on CPU) is up when it is called.
        function_config: picklable; handed to the function.
        settings: workers, resources, restarts.
        name: shown in Ray; a fresh suffix is added.
        storage_path: where Ray keeps its own notes of the run, local or s3://.
        progress: see `Progress`.
        failure_report: see `FailureReport`.
        max_fruitless_restarts: restarts in a row without progress that are made.

    Raises:
        JobError: as a worker raised it, without a retry.
        ConfigError: a time limit that is over already.
        PreemptedError: asked to stop; the message says whether it was saved, or what stands.
        RetriesExhaustedError: failures passed a ceiling; the message holds the root cause.
    """
    import ray
    import ray.train
    from ray.train import TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from m4v_dist.launch.controller_watch import ControllerWatch

    limit = time_limit(settings, process_started(), time.time())
    for variable, value in _controller_environment(settings).items():
        os.environ.setdefault(variable, value)
    most = settings.num_workers
    least = "" if settings.min_workers is None else f"{settings.min_workers} to "
    logger.info("%s for %s%d workers", describe_resources(ray.cluster_resources()), least, most)
    # Ray Train v2 stands behind the names that its stubs give v1's classes.
    v2: Any = ray.train
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
        scaling_config=v2.ScalingConfig(
            # A pair is elastic, also where both are the same.
            num_workers=most if settings.min_workers is None else (settings.min_workers, most),
            elastic_resize_monitor_interval_s=settings.resize_check_s,
            use_gpu=settings.use_gpu,
            resources_per_worker={"CPU": settings.cpus_per_worker} | ({"GPU": 1} if settings.use_gpu else {}),
        ),
        run_config=v2.RunConfig(
            name=f"{name}-{time.time_ns()}",
            storage_path=storage_path if "://" in storage_path else os.path.abspath(storage_path),
            # Announced losses are the world's: they have no ceiling but that of restarts without progress.
            failure_config=v2.FailureConfig(max_failures=settings.max_failures, max_preemption_failures=-1),
            callbacks=[ControllerWatch(verdict)],
            worker_runtime_env={"env_vars": _environment(settings)},
        ),
    )

    def what_stands() -> str:
        newest = progress(dict(function_config))
        return "nothing was saved yet" if newest is None else f"{newest} stands"

    supervisor = Supervisor(
        settings,
        ask=lambda request: ray.get(verdict.ask.remote(request)),
        is_waiting=lambda: bool(ray.get(verdict.is_waiting.remote())),
        what_stands=what_stands,
        limit=limit,
    )
    try:
        result = supervisor.run(trainer.fit)
    except TrainingFailedError as error:
        fatal, failures = ray.get(verdict.fatal.remote()), ray.get(verdict.failures.remote())
        told = None
        if _is_ours(fatal):
            told = failure_report(dict(function_config), _silent_ranks(error, failures))
        if fatal is not None:
            raise fatal from error
        raise RetriesExhaustedError(_with_report(_root_cause(error, failures, settings), told)) from error
    fatal = ray.get(verdict.fatal.remote())
    if fatal is not None:
        if _is_ours(fatal) and not isinstance(fatal, PreemptedError):
            failure_report(dict(function_config), [])
        raise fatal
    if ray.get(verdict.has_given_up.remote()):
        cause = no_progress(ray.get(verdict.failures.remote()), max_fruitless_restarts)
        raise RetriesExhaustedError(_with_report(cause, failure_report(dict(function_config), [])))
    return result.return_value


def _controller_environment(settings: LaunchSettings) -> dict[str, str]:
    """Variables that Ray Train's controller reads; what the user has set wins."""
    # The default of 2 s is most of a small run's restart.
    variables = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    if settings.min_workers is not None:
        # After a lost node Ray may ask for as many workers as before, by a view of the cluster that is up to 20 s old;
        # by default it then waits a minute for the room before it takes what there is.
        variables["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"
    return variables


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

    def stop_requests() -> Sequence[StopRequest]:
        requests: Sequence[StopRequest] = ray.get(verdict.stop_requests.remote())
        return requests

    try:
        answer = task["function"](task["config"], stop_requests)
        if rank == 0:
            ray.get(verdict.note_done.remote())
        return answer
    except BaseException as error:
        # Told before it is raised: Ray ends the other ranks at once, and their broken connections would hide the cause.
        where = f"{socket.gethostname()}, process {os.getpid()}"
        summary, lines = f"{type(error).__name__}: {error}", traceback.format_exc()
        ray.get(verdict.record.remote(attempt, rank, where, summary, lines, as_job_error(error, rank)))
        if isinstance(error, PreemptedError):
            # Raised by all ranks together, so none is left waiting: no restart only to find that the run has ended.
            return None
        raise


def _root_cause(error: Exception, failures: list[Failure], settings: LaunchSettings) -> str:
    """Say what went wrong first in the last attempt: a process that died without a word, else the first error told."""
    last = [failure for failure in failures if failure.attempt == failures[-1].attempt]
    silent = _silent_ranks(error, failures)
    if silent:
        reason = _unwrapped(getattr(error, "worker_failures", {})[silent[0]])
        # One line: the job's last line is its message.
        said = str(reason).splitlines()[0]
        cause = f"rank {silent[0]} died without an error (killed, or its node was lost): {said}"
    elif last:
        logger.error("traceback of %s\n%s", last[0], last[0].lines)
        cause = str(last[0])
    else:
        cause = f"{type(error).__name__}: {error}"
    return (
        f"workers failed more often than launch.max_failures={settings.max_failures} allows; root cause of the last "
        f"attempt: {cause}. What was committed is kept: submit the same command again to go on."
    )


def _silent_ranks(error: Exception, failures: list[Failure]) -> list[int]:
    """Ranks of the last attempt whose processes died and that told no error."""
    from ray.exceptions import RayActorError

    told = {failure.rank for failure in failures if failure.attempt == failures[-1].attempt} if failures else set()
    by_rank: dict[int, Exception] = getattr(error, "worker_failures", {})
    return [r for r, reason in by_rank.items() if isinstance(_unwrapped(reason), RayActorError) and r not in told]


def _unwrapped(reason: Exception) -> Exception:
    """What Ray's poll of a worker met: it wraps it in an error of its own."""
    found: Exception = getattr(reason, "health_check_failure", reason)
    return found


def _is_ours(fatal: JobError | None) -> bool:
    """Whether the newest attempt is this driver's: another driver's is alive, and not to be reported as dead."""
    return not isinstance(fatal, RunInUseError)


def _with_report(cause: str, told: str | None) -> str:
    return cause if told is None else f"{cause} {told}"
