"""Rows of the ablations trained side by side on a small budget: their configs, and what is said of the outcome.

All rows of a seed see the same slots, noise and held-out slots, and weights of equal name start equal: a run differs
from another in its mixers alone. The budget is far below anything that the paper's scores could be compared with, so
the page says how far the figures carry and ranks nothing that one seed cannot.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m4v_dist import storage
from m4v_dist.bench.flops_tables import ARCHITECTURES, step_flops
from m4v_dist.bench.markdown import amount, table
from m4v_dist.config.load import parse_config
from m4v_dist.config.presets import ABLATIONS
from m4v_dist.config.schema import RunConfig

COMPONENTS = ("no_components", "text", "vision", "text_vision", "text_vision_temporal")
HYBRIDS = ("post_half", "pre_half", "interleaved")
TABLES: Mapping[str, tuple[str, ...]] = {
    "Architectures": ARCHITECTURES,
    "Components: text sandwich, vision (registers and zigzag), temporal branch": COMPONENTS,
    "Hybrids": HYBRIDS,
}
NUM_HELD_OUT_POINTS = 6
"""Held-out losses after the start, evenly over a run."""


@dataclass(frozen=True)
class AblationRun:
    """One run of one row.

    Args:
        row: name that it trained under.
        seed: of data order, noise and weights.
        num_parameters: of the model.
        step_flops: of one optimizer step, by arithmetic.
        step_s: seconds of one optimizer step, forward to optimizer, mean over the run.
        held_out: (steps done, held-out loss), the start first.
        train: (step, training loss).
    """

    row: str
    seed: int
    num_parameters: int
    step_flops: float
    step_s: float
    held_out: tuple[tuple[int, float], ...]
    train: tuple[tuple[int, float], ...]


def trained_as(row: str) -> str:
    """The first row with the same switches: "text_vision" is "full_mamba"."""
    return next(name for name, switches in ABLATIONS.items() if switches == ABLATIONS[row])


def rows_to_train(rows: Sequence[str]) -> tuple[str, ...]:
    """Each distinct model once, in order."""
    return tuple(dict.fromkeys(trained_as(row) for row in rows))


def ablation_folder(config: RunConfig) -> str:
    """Where everything of an ablation is written."""
    return storage.join(config.run.folder, "benchmark", "ablation")


def earlier_results(config: RunConfig, planned: Sequence[str]) -> str:
    """What becomes of what an earlier benchmark left; empty where there is nothing.

    Args:
        config: of the benchmark.
        planned: names of the run folders that are to be made.
    """
    there = storage.list_folder(ablation_folder(config))
    replaced = [name for name in there if name in planned or name.startswith("ablation.")]
    kept = [name for name in there if name not in replaced]
    words = [f"replacing {', '.join(replaced)} of an earlier benchmark"] if replaced else []
    words += [f"keeping {', '.join(kept)}, which the new page does not show"] if kept else []
    return ", ".join(words)


def run_config(config: RunConfig, row: str, seed: int) -> RunConfig:
    """The config of one run: the row's model from its start weights, on the last curriculum stage, one rank.

    Raises:
        ConfigError: a row that does not fit this config's model.
    """
    num_steps = config.benchmark.num_steps
    values = config.model_dump(mode="json")
    values["run"] |= {"folder": storage.join(ablation_folder(config), f"{row}_seed{seed}"), "seed": seed}
    values["model"] |= {**ABLATIONS[row], "ablation": row}
    # Each row from its own seed: a warm start gives more to some rows than to others.
    values["warm_start"] = {}
    last = values["curriculum"][-1]
    values["curriculum"] = [last | {"num_steps": num_steps, "warmup_steps": min(last["warmup_steps"], num_steps)}]
    values["trainer"] |= {
        "validate_every_steps": max(1, num_steps // NUM_HELD_OUT_POINTS),
        "checkpoint_every_steps": num_steps,
        "checkpoint_folder": None,
        "keep_last": 1,
    }
    values["launch"] |= {"num_workers": 1, "sequence_parallel": 1}
    values["logging"] |= {"wandb": "disabled", "every_steps": 1}
    return parse_config(values, where=f"benchmark row {row!r}")


def run_of_rows(config: RunConfig, row: str, num_parameters: int, metrics: Sequence[Mapping[str, Any]]) -> AblationRun:
    """Gather a finished run's `metrics.jsonl`.

    Args:
        config: of the run, by `run_config`.
        row: that it trained.
        num_parameters: of its model.
        metrics: all rows of its file.
    """
    train = [row_ for row_ in metrics if row_["kind"] == "train"]
    held_out = [row_ for row_ in metrics if row_["kind"] == "held_out"]
    stage = config.curriculum[-1]
    flops = sum(step_flops(config, stage, bucket) for bucket in stage.buckets) / len(stage.buckets)
    return AblationRun(
        row=row,
        seed=config.run.seed,
        num_parameters=num_parameters,
        step_flops=flops,
        step_s=sum(row_["timing/step_s"] for row_ in train) / len(train),
        held_out=tuple((row_["step"], row_["validation/held_out_loss"]) for row_ in held_out),
        train=tuple((row_["step"], row_["train/loss"]) for row_ in train),
    )


def ablation_page(config: RunConfig, runs: Sequence[AblationRun], where: str) -> str:
    """Tables and what they show, as markdown.

    Args:
        config: of the benchmark.
        runs: all finished ones.
        where: hardware and versions, in words.
    """
    settings, stage = config.benchmark, config.curriculum[-1]
    seeds = sorted({run.seed for run in runs})
    held_out, slots = config.trainer.held_out_slots, config.trainer.global_batch_slots
    parts = [
        f"# Ablations on {config.run.name}",
        f"{settings.num_steps} optimizer steps of {slots} slots each, curriculum stage {stage.name!r}, from start "
        f"weights; {_seeds(seeds)}. Held-out loss over the same {held_out} slots in every run. {where}.",
        "![held-out loss over steps](ablation.svg)",
    ]
    for title, rows in TABLES.items():
        shown = _finished(rows, config, runs)
        if shown:
            parts += [f"## {title}", _table(shown, runs)]
    parts += ["## What this shows", _claims(runs, seeds)]
    return "\n\n".join(parts) + "\n"


def _finished(rows: Sequence[str], config: RunConfig, runs: Sequence[AblationRun]) -> list[str]:
    """Of `rows`, in their order, those that were asked for and have a run."""
    trained = {run.row for run in runs}
    return [row for row in rows if row in config.benchmark.rows and trained_as(row) in trained]


def _table(rows: Sequence[str], runs: Sequence[AblationRun]) -> str:
    lines = []
    for row in rows:
        found = [run for run in runs if run.row == trained_as(row)]
        first = found[0]
        seconds = sum(run.step_s for run in found) / len(found)
        name = row if row == first.row else f"{row} (= {first.row})"
        cells = [_spread([run.held_out[-1][1] for run in found]), f"{first.num_parameters:,}"]
        lines.append([name, *cells, amount(first.step_flops), f"{seconds:.2f}"])
    return table(["row", "held-out loss at the end", "parameters", "FLOPs a step", "seconds a step"], lines)


def _spread(values: Sequence[float]) -> str:
    mean = f"{sum(values) / len(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4f} to {max(values):.4f})"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}: mean (lowest to highest)"


def _claims(runs: Sequence[AblationRun], seeds: Sequence[int]) -> str:
    starts = [run.held_out[0][1] for run in runs]
    learnt = sum(run.held_out[-1][1] < run.held_out[0][1] for run in runs)
    lines = [
        f"- {learnt} of {len(runs)} runs end with a lower held-out loss than they began with (start "
        f"{min(starts):.4f} to {max(starts):.4f}: every model begins by predicting zero).",
    ]
    if len(seeds) == 1:
        lines.append(
            "- One seed: how much a figure moves with the seed is not known, so no row is claimed to be better than "
            "another. `benchmark.num_seeds=3` shows the spread."
        )
    else:
        lines.append(_separated(runs, seeds))
    lines.append(
        "- A few steps of a small model on a few clips say nothing about the paper's rows, which trained 20k steps at "
        "2B parameters. FLOPs are by arithmetic, each text at its longest; seconds are of plain torch kernels here and "
        "no claim of speed."
    )
    return "\n".join(lines)


def _separated(runs: Sequence[AblationRun], seeds: Sequence[int]) -> str:
    """Pairs of rows of which one ends lower with its worst seed than the other with its best."""
    ends: dict[str, list[float]] = {}
    for run in runs:
        ends.setdefault(run.row, []).append(run.held_out[-1][1])
    pairs = [
        f"{low} below {high}"
        for low, below in ends.items()
        for high, above in ends.items()
        if len(below) == len(above) == len(seeds) and max(below) < min(above)
    ]
    told = "; ".join(pairs) if pairs else "none"
    # Of two equal rows, all n of one fall below all n of the other in 2 of C(2n, n) orders.
    chance = 100 * 2 / math.comb(2 * len(seeds), len(seeds))
    return (
        f"- Rows whose ranges over {len(seeds)} seeds do not overlap: {told}. All others are not told apart. Two equal "
        f"rows come out so by chance in {chance:.0f} % of cases."
    )


_ROLES = {
    "full_attention": "first",
    "parallel": "second",
    "full_mamba": "third",
    "full_mamba_temporal": "fourth",
    "no_components": "fifth",
    "text": "sixth",
    "vision": "seventh",
    "post_half": "first",
    "pre_half": "second",
    "interleaved": "fifth",
}
"""Colour of each row in the plot, a role of `report/plots.py`; hybrids have a panel of their own."""


def ablation_panels(config: RunConfig, runs: Sequence[AblationRun]) -> list[tuple[str, list[tuple[str, str, Any]]]]:
    """Curves of the plot: for each table its title and (label, role, points), the mean over seeds of held-out loss."""
    panels = []
    for title, rows in TABLES.items():
        curves = []
        for row in _finished(rows, config, runs):
            found = [run.held_out for run in runs if run.row == trained_as(row)]
            points = [(at[0][0], sum(loss for _, loss in at) / len(at)) for at in zip(*found, strict=True)]
            curves.append((row, _ROLES[trained_as(row)], tuple(points)))
        if curves:
            panels.append((title.split(":")[0], curves))
    return panels
