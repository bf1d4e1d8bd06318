"""One case of `jobs.benchmark training`: a run on Ray workers that ends itself when enough was timed."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from jobs.train import newest_checkpoint, report_rank_failure, train_on_rank
from m4v_dist import storage
from m4v_dist.config.load import config_from_json, config_to_json
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import PreemptedError
from m4v_dist.launch.ray_workers import run_workers
from m4v_dist.stop_request import StopRequest
from m4v_dist.trainer import checkpoint

ENOUGH = "enough was timed"


def run_case(config: RunConfig, *, num_steps: int, num_steps_after_save: int | None) -> float | None:
    """Train a case; Ray must be up. Return the most GiB that tensors took of rank 0's GPU; None on a CPU.

    Args:
        config: of the case.
        num_steps: after which it ends.
        num_steps_after_save: not before so many steps have followed its first commit; None: it does not save.
    """
    task = {
        "config": config_to_json(config),
        "num_steps": num_steps,
        "num_steps_after_save": num_steps_after_save,
    }
    notes = storage.join(config.run.folder, "attempts", "ray")
    peak: float | None = run_workers(
        time_on_rank,
        task,
        config.launch,
        config.run.name,
        notes,
        progress=newest_checkpoint,
        failure_report=report_rank_failure,
    )
    return peak


def time_on_rank(task: dict[str, Any], stop_requests: Callable[[], Sequence[StopRequest]]) -> float | None:
    """What one worker does: train as ever until enough was timed, then end without a save."""
    config = config_from_json(task["config"])
    num_asked, num_wanted = 0, int(task["num_steps"])
    step_of_commit: int | None = None if task["num_steps_after_save"] is not None else 0
    enough = StopRequest(ENOUGH, deadline=time.time(), saves=False)

    def requests() -> Sequence[StopRequest]:
        # Asked once a step.
        nonlocal num_asked, num_wanted, step_of_commit
        num_asked += 1
        if step_of_commit is None and checkpoint.newest_committed(config.checkpoint_folder) is not None:
            step_of_commit = num_asked
            num_wanted = max(num_wanted, num_asked + task["num_steps_after_save"])
        is_enough = step_of_commit is not None and num_asked >= num_wanted
        return [*stop_requests(), *([enough] if is_enough else [])]

    try:
        train_on_rank(task, requests)
    except PreemptedError as error:
        if ENOUGH not in str(error):
            raise
    return torch.cuda.max_memory_allocated() / 2**30 if config.launch.use_gpu else None
