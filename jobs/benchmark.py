"""`python -m jobs.benchmark SUBJECT --config FILE`: figures about the model of a run; the subject comes first.

flops: FLOPs by part, of a forward, a training row, an optimizer step and a generated clip, the paper's figures beside
ours, and parameters by part. Pure arithmetic: it runs no model and writes nothing.

attention: joint attention timed on the columns of the config's last curriculum stage, beside its slow twins; on a GPU
with `launch.use_gpu=true`. Writes nothing.

kernels: the scan timed at `benchmark.tokens` beside attention and mamba-ssm, each eagerly and as a replayed graph; on a
GPU with `launch.use_gpu=true`. Writes nothing.

scale: what 8 to 1,024 ranks send to one another in a step under each ZeRO stage, and to storage, of the config's last
curriculum stage; sequence ranks too. Pure arithmetic on bandwidths of A100 machines, unmeasured.

ablation: the rows of `benchmark.rows` train one after the other in this process, without Ray, on the cache's data and
the config's last curriculum stage; tables, curves and every number go to `<run>/benchmark/ablation/`.

training: the trainer timed as it is run, on Ray workers: each curriculum stage at each ZeRO stage for some steps, on
random latents; tokens a second, MFU, memory beside the plan's, and what a save costs. Into `<run>/benchmark/training/`.

sequence: one whole clip as one sequence, forward and backward, on `benchmark.worker_counts` ranks that cut it: seconds
and memory of activations. Into `<run>/benchmark/sequence/`.
"""

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
import torch.distributed as dist

from jobs import cli
from jobs.benchmark_on_workers import sequence, training
from jobs.train import check_data, train_on_rank, with_absolute_paths
from m4v_dist import storage
from m4v_dist.bench.ablation import (
    AblationRun,
    ablation_folder,
    ablation_page,
    ablation_panels,
    earlier_results,
    rows_to_train,
    run_config,
    run_of_rows,
)
from m4v_dist.bench.attention_times import attention_report, cases
from m4v_dist.bench.flops_tables import flops_report
from m4v_dist.bench.hardware import describe, where_measured
from m4v_dist.bench.scale_tables import ModelSize, scale_report
from m4v_dist.bench.scan_times import scan_forms, scan_report
from m4v_dist.config.load import config_to_json
from m4v_dist.config.model_settings import KernelSettings
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError
from m4v_dist.model.build import build_on_meta
from m4v_dist.report.plots import Curve, Panel, panels_file
from m4v_dist.trainer.metrics import read_rows

logger = logging.getLogger(__name__)

SUBJECTS = ("flops", "attention", "kernels", "scale", "ablation", "training", "sequence")


def flops(config: RunConfig, dry_run: bool) -> str:
    """Print the tables."""
    if dry_run:
        return "would print the FLOPs and parameter tables of this config; writes nothing"
    sys.stdout.write(flops_report(config) + "\n\n")
    return "figures by arithmetic, none measured"


def attention(config: RunConfig, dry_run: bool) -> str:
    """Time joint attention and print the table.

    Raises:
        ConfigError: a GPU is asked for and not there.
    """
    device = _device(use_gpu=config.launch.use_gpu)
    if dry_run:
        names = ", ".join(case.name for case in cases(config))
        return f"would time joint attention on {describe(device)}: {names}; writes nothing"
    torch.set_num_threads(config.trainer.num_threads)
    sys.stdout.write(attention_report(config, device) + "\n\n")
    return f"measured on {describe(device)}"


def kernels(config: RunConfig, dry_run: bool) -> str:
    """Time the scan beside its peers and print the table.

    Raises:
        ConfigError: a GPU is asked for and not there.
    """
    device = _device(use_gpu=config.launch.use_gpu)
    if dry_run:
        forms, left_out = scan_forms(config, device)
        names = ", ".join(form.name for form in forms)
        return f"would time {names} on {describe(device)}; left out: {'; '.join(left_out) or 'none'}; writes nothing"
    torch.set_num_threads(config.trainer.num_threads)
    sys.stdout.write(scan_report(config, device) + "\n\n")
    return f"measured on {describe(device)}"


def scale(config: RunConfig, dry_run: bool) -> str:
    """Print the tables."""
    if dry_run:
        return "would print what ranks send to one another and to storage; writes nothing"
    on_meta = build_on_meta(config.model, KernelSettings())
    size = ModelSize({name: parameter.numel() for name, parameter in on_meta.named_parameters()})
    sys.stdout.write(scale_report(config, size) + "\n\n")
    return "figures by arithmetic on assumed bandwidths, none measured"


def ablation(config: RunConfig, dry_run: bool) -> str:
    """Train each row with each seed, and write what came out after every run.

    Raises:
        ConfigError: a remote run folder, no held-out slots, or rows that this config cannot build.
        DataError: no cache, of another codec, or too small.
        NonFiniteError: a row diverged; what finished before it stays written.
    """
    config = with_absolute_paths(config)
    if storage.is_remote(config.run.folder):
        raise ConfigError(f"run.folder={config.run.folder}: an ablation writes to local or mounted folders.")
    if not config.trainer.held_out_slots:
        raise ConfigError("trainer.held_out_slots=0, but an ablation compares held-out losses; set it above 0.")
    rows = rows_to_train(config.benchmark.rows)
    seeds = range(config.run.seed, config.run.seed + config.benchmark.num_seeds)
    planned = [(row, run_config(config, row, seed)) for seed in seeds for row in rows]
    for _, made in planned[: len(rows)]:
        check_data(made)
    what = f"{len(planned)} runs of {config.benchmark.num_steps} steps: {', '.join(rows)}"
    earlier = earlier_results(config, [os.path.basename(made.run.folder) for _, made in planned])
    plan = f"{what}, in {ablation_folder(config)}{earlier and f', {earlier}'}"
    if dry_run:
        return f"dry run: would train {plan}"
    logger.info("training %s", plan)
    done: list[AblationRun] = []
    with _process_group_of_one(use_gpu=config.launch.use_gpu):
        for row, made in planned:
            done.append(_train_row(made, row))
            _write(config, done)
            last = done[-1]
            logger.info(
                "%s, seed %d: held-out loss %.4f, %.2f s a step", row, last.seed, last.held_out[-1][1], last.step_s
            )
    return f"{what}; {ablation_folder(config)}/ablation.md"


def _train_row(config: RunConfig, row: str) -> AblationRun:
    # From the start, whatever an earlier benchmark left: the trainer would go on from it.
    shutil.rmtree(config.run.folder, ignore_errors=True)
    train_on_rank({"config": config_to_json(config)}, tuple)
    # The curves are the product; the weights of a few steps are not.
    storage.remove(config.checkpoint_folder)
    metrics, _ = read_rows(config.run.folder)
    num_parameters = sum(p.numel() for p in build_on_meta(config.model, config.kernels).parameters())
    return run_of_rows(config, row, num_parameters, metrics)


def _write(config: RunConfig, runs: Sequence[AblationRun]) -> None:
    """The page, the plot and the numbers of all runs that have finished."""
    folder = ablation_folder(config)
    where = where_measured(config)
    storage.write_json(
        storage.join(folder, "ablation.json"),
        {"where": where, "config": config.model_dump(mode="json"), "runs": [asdict(run) for run in runs]},
    )
    panels = [
        Panel(title, tuple(Curve(label, points, role, has_markers=True) for label, role, points in curves))
        for title, curves in ablation_panels(config, runs)
    ]
    storage.write_bytes(storage.join(folder, "ablation.svg"), panels_file(panels, "held-out loss").encode())
    storage.write_bytes(storage.join(folder, "ablation.md"), ablation_page(config, runs, where).encode())


def _device(*, use_gpu: bool) -> torch.device:
    if use_gpu and not torch.cuda.is_available():
        raise ConfigError("launch.use_gpu=true, but torch sees no CUDA device; set launch.use_gpu=false.")
    return torch.device("cuda" if use_gpu else "cpu")


@contextmanager
def _process_group_of_one(*, use_gpu: bool) -> Iterator[None]:
    """A process group with this process alone, as trainer and engine need one; no network."""
    _device(use_gpu=use_gpu)
    # deepspeed asks for its rank, and picks its device when it is imported: not before here.
    wanted = {"LOCAL_RANK": "0"} if use_gpu else {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    dist.init_process_group("nccl" if use_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def parse_subject(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Split the command line into the subject and what every verb takes.

    Raises:
        SystemExit: `--help`, or no such subject (exit code 2).
    """
    parser = argparse.ArgumentParser(
        prog="python -m jobs.benchmark",
        description="Figures about the model of a run.",
        epilog="After the subject: --config FILE [--dry-run] [section.key=value ...]",
    )
    parser.add_argument("subject", choices=SUBJECTS, help="comes first")
    late = next((word for word in argv[1:] if word in SUBJECTS), None)
    if late is not None and argv[0] not in SUBJECTS:
        parser.error(
            f"the subject comes first, before {argv[0]}: python -m jobs.benchmark {late} --config FILE (subjects: "
            f"{', '.join(SUBJECTS)})"
        )
    # Only the first word is the subject: an option before it is the user's slip, and the message names the subjects.
    return parser.parse_args(argv[:1]).subject, list(argv[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run; return the exit code."""
    subject, rest = parse_subject(sys.argv[1:] if argv is None else argv)
    match subject:
        case "flops":
            return cli.main("benchmark flops", flops, "Print FLOPs and parameters.", rest, writes=False)
        case "attention":
            return cli.main("benchmark attention", attention, "Time joint attention.", rest, writes=False)
        case "kernels":
            return cli.main("benchmark kernels", kernels, "Time the scan beside its peers.", rest, writes=False)
        case "scale":
            return cli.main("benchmark scale", scale, "Print traffic on many ranks.", rest, writes=False)
        case "ablation":
            return cli.main("benchmark ablation", ablation, "Train the rows of the ablations side by side.", rest)
        case "training":
            return cli.main("benchmark training", training, "Time training on Ray workers.", rest)
        case "sequence":
            return cli.main("benchmark sequence", sequence, "Time one sequence on ranks that cut it.", rest)
    raise AssertionError(subject)


if __name__ == "__main__":
    sys.exit(main())
