"""Training timed as it is run, by the trainer's own rows: one short run for each case, and a table of all.

A case is a curriculum stage of the config at a ZeRO stage on a number of workers. Its data are random latents of the
stage's shapes; it starts from fresh weights, and ends without a save unless the save is what is timed. Steps differ in
their tokens, so throughput is all tokens of the timed steps over all their seconds, waiting for data included.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m4v_dist import storage
from m4v_dist.bench.markdown import table
from m4v_dist.config.load import parse_config
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError

SAVE_EVERY_S = 600.0
"""Of the stall's share of a run's time: a save every ten minutes."""


@dataclass(frozen=True)
class Case:
    """What is timed.

    Args:
        curriculum_stage: its name.
        zero_stage: 1, 2 or 3.
        num_workers: ranks.
    """

    curriculum_stage: str
    zero_stage: int
    num_workers: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.curriculum_stage}_zero{self.zero_stage}_workers{self.num_workers}"


@dataclass(frozen=True)
class TrainingTimes:
    """What came out of a case.

    Args:
        case: what was timed.
        tokens_a_second: of one GPU.
        step_s: seconds of a step, median.
        mfu, hfu: share of the GPU's peak; None where the peak is not known.
        reserved_gib: the most that torch reserved on a rank's GPU; None on a CPU.
        allocated_gib: the most that tensors took of it on rank 0; None on a CPU.
        planned_gib: what the plan says of the peak.
        saved_gib, stall_s, write_s: size of the checkpoint, seconds that training stood still for it, seconds until it
            was committed; None where nothing was saved.
        slowed_s: by how much the steps beside the writing took longer than their tokens take alone.
    """

    case: Case
    tokens_a_second: float
    step_s: float
    mfu: float | None
    hfu: float | None
    reserved_gib: float | None
    allocated_gib: float | None
    planned_gib: float
    saved_gib: float | None = None
    stall_s: float | None = None
    write_s: float | None = None
    slowed_s: float | None = None


def training_cases(config: RunConfig) -> tuple[Case, ...]:
    """All cases that `benchmark` asks for: stages, then workers, then ZeRO stages.

    Raises:
        ConfigError: a curriculum stage that the config does not have, or slots that do not part evenly.
    """
    asked, known = config.benchmark, [stage.name for stage in config.curriculum]
    unknown = [name for name in asked.curriculum_stages if name not in known]
    if unknown:
        raise ConfigError(
            f"benchmark.curriculum_stages names {', '.join(unknown)}, but the curriculum has {', '.join(known)}."
        )
    if config.trainer.global_batch_slots % config.launch.num_workers:
        raise ConfigError(
            f"trainer.global_batch_slots={config.trainer.global_batch_slots} must be a multiple of launch.num_workers="
            f"{config.launch.num_workers}: every number of workers is timed with the same slots a worker."
        )
    return tuple(
        Case(stage, zero_stage, num_workers)
        for stage in asked.curriculum_stages or known
        for num_workers in asked.worker_counts or (config.launch.num_workers,)
        for zero_stage in asked.zero_stages
    )


def times_folder(config: RunConfig) -> str:
    """Where everything of this benchmark is written."""
    return storage.join(config.run.folder, "benchmark", "training")


def case_config(config: RunConfig, case: Case) -> RunConfig:
    """The config of one case's run: one curriculum stage, no validation, no restart."""
    values = config.model_dump(mode="json")
    folder = storage.join(times_folder(config), case.name)
    values["run"] |= {"folder": folder}
    values["precompute"] |= {"cache": storage.join(times_folder(config), "cache")}
    values["warm_start"] = {}
    stage = next(stage for stage in values["curriculum"] if stage["name"] == case.curriculum_stage)
    # Longer than it will be: it is ended from outside.
    values["curriculum"] = [stage | {"num_steps": 100 * _num_steps(config), "warmup_steps": 1}]
    slots = values["trainer"]["global_batch_slots"] // values["launch"]["num_workers"] * case.num_workers
    values["trainer"] |= {
        "zero_stage": case.zero_stage,
        "global_batch_slots": slots,
        "validate_every_steps": 0,
        "sample_every_steps": 0,
        "held_out_slots": 0,
        "checkpoint_folder": None,
        "checkpoint_every_steps": (config.benchmark.num_warm_up_steps if config.benchmark.is_saving else 10**9),
        "keep_last": 1,
        "keep_every_steps": 0,
        "replica_check_every_steps": 0,
    }
    values["launch"] |= {"num_workers": case.num_workers, "min_workers": None, "max_failures": 0}
    values["logging"] |= {"wandb": "disabled", "every_steps": 1}
    return parse_config(values, where=f"benchmark case {case.name}")


def _num_steps(config: RunConfig) -> int:
    return config.benchmark.num_warm_up_steps + config.benchmark.num_steps


def times_of_rows(
    config: RunConfig, case: Case, rows: Sequence[Mapping[str, Any]], *, allocated_gib: float | None, planned_gib: float
) -> TrainingTimes:
    """Gather a run's `metrics.jsonl`.

    Args:
        config: of the benchmark.
        case: that was run.
        rows: all rows.
        allocated_gib, planned_gib: see `TrainingTimes`.
    """
    steps = [row for row in rows if row["kind"] == "train"]
    timed = steps[config.benchmark.num_warm_up_steps :]
    save = next((row for row in rows if row["kind"] == "checkpoint"), None)
    beside: list[Mapping[str, Any]] = []
    if save is not None:
        # Its row is written by the step that finds it committed: the steps before ran beside the writing.
        beside = [row for row in timed if row["time"] <= save["time"]]
        timed = timed[len(beside) :]

    def weighted(name: str) -> float | None:
        """Mean over the time of the steps: what a rate was over all of them."""
        if any(name not in row for row in timed):
            return None
        return sum(row[name] * _seconds(row) for row in timed) / sum(map(_seconds, timed))

    tokens_a_second = weighted("perf/tokens_per_sec_per_gpu")
    assert tokens_a_second is not None, "every row has it"
    alone = sum(row["perf/tokens_per_sec_per_gpu"] * _seconds(row) for row in beside) / tokens_a_second
    return TrainingTimes(
        case=case,
        tokens_a_second=tokens_a_second,
        step_s=statistics.median(map(_seconds, timed)),
        mfu=weighted("perf/mfu"),
        hfu=weighted("perf/hfu"),
        reserved_gib=timed[-1].get("memory/max_reserved_gib"),
        allocated_gib=allocated_gib,
        planned_gib=planned_gib,
        saved_gib=None if save is None else save["checkpoint/size_bytes"] / 2**30,
        stall_s=None if save is None else save["timing/checkpoint_stall_s"],
        write_s=None if save is None else save["timing/checkpoint_write_s"],
        slowed_s=None if save is None else sum(map(_seconds, beside)) - alone,
    )


def _seconds(row: Mapping[str, Any]) -> float:
    return float(row["timing/step_s"] + row["timing/data_s"])


def times_page(config: RunConfig, results: Sequence[TrainingTimes], where: str) -> str:
    """The tables, as markdown.

    Args:
        config: of the benchmark.
        results: of the cases that have run.
        where: hardware and versions.
    """
    heads = [
        "stage", "ZeRO", "workers", "tokens/s a GPU", "of linear", "step, s", "MFU", "HFU",
        "GiB allocated", "GiB reserved", "GiB planned",
    ]  # fmt: skip
    rows = [
        [
            times.case.curriculum_stage,
            str(times.case.zero_stage),
            str(times.case.num_workers),
            f"{times.tokens_a_second:,.0f}",
            _share(_of_linear(times, results)),
            f"{times.step_s:.2f}",
            _share(times.mfu),
            _share(times.hfu),
            *("-" if gib is None else f"{gib:.2f}" for gib in (times.allocated_gib, times.reserved_gib)),
            f"{times.planned_gib:.2f}",
        ]
        for times in results
    ]
    asked = config.benchmark
    note = (
        f"{where}; {config.model.preset}, scan {config.kernels.backend}, recompute "
        f"{config.model.recompute}; {config.trainer.global_batch_slots // config.launch.num_workers} slots a worker; "
        f"{asked.num_steps} steps after {asked.num_warm_up_steps}, random latents; step: the median. Of linear: tokens "
        "a second and GPU over those of the fewest workers."
    )
    parts = [table(heads, rows), note]
    saved = [times for times in results if times.stall_s is not None]
    if saved:
        heads = ["stage", "ZeRO", "workers", "GiB saved", "stall, s", "until committed, s", "steps slowed by, s",
                 f"stall at a save every {SAVE_EVERY_S / 60:.0f} min"]  # fmt: skip
        parts.append(table(heads, [_save_row(times) for times in saved]))
    return "\n\n".join(parts) + "\n"


def _save_row(times: TrainingTimes) -> list[str]:
    assert times.stall_s is not None and times.saved_gib is not None
    return [
        times.case.curriculum_stage,
        str(times.case.zero_stage),
        str(times.case.num_workers),
        f"{times.saved_gib:.2f}",
        f"{times.stall_s:.2f}",
        f"{times.write_s:.1f}",
        f"{times.slowed_s:.1f}",
        f"{100 * times.stall_s / SAVE_EVERY_S:.2f} %",
    ]


def _of_linear(times: TrainingTimes, results: Sequence[TrainingTimes]) -> float | None:
    """Over the fewest workers of the same stages; None for those themselves."""
    alike = [
        other
        for other in results
        if (other.case.curriculum_stage, other.case.zero_stage) == (times.case.curriculum_stage, times.case.zero_stage)
    ]
    fewest = min(alike, key=lambda other: other.case.num_workers)
    return None if fewest is times else times.tokens_a_second / fewest.tokens_a_second


def _share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
