"""The subjects of `jobs.benchmark` that take Ray workers: training runs that end themselves, and one long sequence."""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from data_pipeline.assumed_cache import write_assumed_cache
from jobs import plan
from jobs.train import newest_checkpoint, report_rank_failure, train_on_rank, with_absolute_paths
from m4v_dist import storage
from m4v_dist.bench.hardware import where_measured
from m4v_dist.bench.sequence_times import (
    SequenceTimes,
    num_sequence_tokens,
    sequence_counts,
    sequence_page,
    time_sequence,
)
from m4v_dist.bench.training_plan import memory
from m4v_dist.bench.training_times import (
    TrainingTimes,
    case_config,
    times_folder,
    times_of_rows,
    times_page,
    training_cases,
)
from m4v_dist.config.load import config_from_json, config_to_json
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, PreemptedError
from m4v_dist.launch.ray_session import ray_session
from m4v_dist.launch.ray_workers import run_workers
from m4v_dist.model.build import build_model
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.stop_request import StopRequest
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.metrics import read_rows

logger = logging.getLogger(__name__)

ENOUGH = "enough was timed"


def training(config: RunConfig, dry_run: bool) -> str:
    """Time the trainer on each case, and write the page after every one.

    Raises:
        ConfigError: a remote run folder, no such curriculum stage, or more workers than there is room for.
        JobError: as a case's run ended; what finished before it stays written.
    """
    config = with_absolute_paths(config)
    if storage.is_remote(config.run.folder):
        raise ConfigError(f"run.folder={config.run.folder}: a benchmark writes to local or mounted folders.")
    cases, asked, folder = training_cases(config), config.benchmark, times_folder(config)
    runs = [case_config(config, case) for case in cases]
    what = f"{len(cases)} runs of {asked.num_warm_up_steps} and {asked.num_steps} steps, in {folder}"
    most = max(runs, key=lambda run: run.launch.num_workers)
    planned = plan.cache_to_come(most)
    for run in runs:
        plan.planned_stages(run, planned)
    if dry_run:
        return f"dry run: would time {what}"
    for name in storage.list_folder(folder):
        storage.remove(storage.join(folder, name))
    write_assumed_cache(
        planned,
        latent_channels=config.model.latent_channels,
        text_width=config.model.text_width,
        pooled_width=config.model.pooled_width,
    )
    results: list[TrainingTimes] = []
    with ray_session(most.launch):
        for case, run in zip(cases, runs, strict=True):
            logger.info("timing %s", case.name)
            allocated_gib = run_case(
                run,
                num_steps=asked.num_warm_up_steps + asked.num_steps,
                num_steps_after_save=asked.num_steps if asked.is_saving else None,
            )
            storage.remove(run.checkpoint_folder)
            (stage,) = plan.planned_stages(run, planned)
            needed = memory(run, stage, stage.longest(), plan.states_of)
            rows, _ = read_rows(run.run.folder)
            results.append(
                times_of_rows(config, case, rows, allocated_gib=allocated_gib, planned_gib=needed.peak / 2**30)
            )
            where = where_measured(config)
            page = times_page(config, results, where)
            storage.write_bytes(storage.join(folder, "training.md"), page.encode())
            storage.write_json(
                storage.join(folder, "training.json"),
                {"where": where, "config": config.model_dump(mode="json"), "runs": [asdict(r) for r in results]},
            )
    sys.stdout.write(page + "\n")
    return f"{what}; {folder}/training.md"


def sequence(config: RunConfig, dry_run: bool) -> str:
    """Time one sequence on each number of ranks.

    Raises:
        ConfigError: a remote run folder, or a number of ranks that cannot cut it.
    """
    config = with_absolute_paths(config)
    if storage.is_remote(config.run.folder):
        raise ConfigError(f"run.folder={config.run.folder}: a benchmark writes to local or mounted folders.")
    folder = storage.join(config.run.folder, "benchmark", "sequence")
    counts = sorted(sequence_counts(config))
    what = f"a sequence of {num_sequence_tokens(config):,} tokens on {', '.join(map(str, counts))} ranks, in {folder}"
    if dry_run:
        return f"dry run: would time {what}"
    # All frames are noisy, so that attention reads in both directions.
    model = config.model.model_copy(update={"has_temporal_mask": False})
    results: list[SequenceTimes] = []

    def on_ranks(count: int) -> RunConfig:
        asked = {"num_workers": count, "sequence_parallel": count, "min_workers": None, "max_failures": 0}
        launch = config.launch.model_copy(update=asked)
        return config.model_copy(update={"launch": launch, "model": model})

    with ray_session(on_ranks(counts[-1]).launch):
        for count in counts:
            results.append(run_sequence(on_ranks(count)))
            page = sequence_page(config, results, where_measured(config))
            storage.write_bytes(storage.join(folder, "sequence.md"), page.encode())
    sys.stdout.write(page + "\n")
    return f"{what}/sequence.md"


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


def run_sequence(config: RunConfig) -> SequenceTimes:
    """Time one sequence on `launch.num_workers` ranks that cut it; Ray must be up."""
    notes = storage.join(config.run.folder, "benchmark", "sequence", "ray")
    task = {"config": config_to_json(config)}
    times: SequenceTimes = run_workers(
        time_sequence_on_rank, task, config.launch, config.run.name, notes, progress=lambda _: None
    )
    return times


def time_sequence_on_rank(task: dict[str, Any], _stop_requests: Callable[[], Sequence[StopRequest]]) -> SequenceTimes:
    """What one worker does: build the model and time the sequence."""
    config = config_from_json(task["config"])
    torch.set_num_threads(config.trainer.num_threads)
    mesh = Mesh.of_process_group(use_gpu=config.launch.use_gpu, sequence_size=config.launch.sequence_parallel)

    def place(_name: str, part: nn.Module) -> None:
        part.to(mesh.device)

    model = build_model(
        config.model, config.kernels, seed=config.run.seed, sequence=mesh.sequence,
        place=place,
    )  # fmt: skip
    return time_sequence(model, config, mesh)
