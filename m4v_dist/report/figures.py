"""From rows to what is shown: held-out figures, goodput, samples seen, and the panels of the loss plots. Pure numbers.

A figure that the rows do not hold is None; nothing is guessed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from m4v_dist.report.plots import Curve, Panel, running_mean
from m4v_dist.report.run_folder import Metrics, Row

HELD_OUT = "validation/held_out_loss"
SMOOTHING_STEPS = 20
"""Window of the running mean in the loss plot: a step has few slots, so the raw loss jumps."""


@dataclass(frozen=True)
class Use:
    """What one entry of the ledger is called on the page.

    Args:
        name: a word or two.
        meaning: what its seconds were spent on; empty for an entry that we have no word for.
        role: its colour, a key of `plots.ROLES`.
    """

    name: str
    meaning: str
    role: str


USES = {
    "step_s": Use("steps", "forward, backward and optimizer of steps that stood", "first"),
    "data_s": Use("waiting for data", "the loop waits for the loader", "third"),
    "validation_s": Use("held-out loss", "measuring it", "second"),
    "checkpoint_s": Use("checkpoints", "the loop stands still for a save", "fourth"),
    "build_s": Use(
        "building",
        "the model and optimizer, and loading a checkpoint, at the start and at each curriculum stage",
        "fifth",
    ),
    "restart_s": Use(
        "restart",
        "after an attempt broke off: noticing it, new workers, building and loading until the next step",
        "muted",
    ),
    "lost_s": Use("lost work", "after the last checkpoint of an attempt that broke off; and skipped steps", "alarm"),
    "other_s": Use("the rest", "writing metrics, asking whether to stop, closing down", "sixth"),
}
"""The ledger's entries (their exact bounds: `Ledger` of trainer/metrics.py), in the order shown."""


def held_out_points(metrics: Metrics) -> list[tuple[int, float]]:
    """(step, held-out loss) by step; of a step measured twice the last."""
    return sorted({row["step"]: row[HELD_OUT] for row in metrics.of_kind("held_out")}.items())


def samples_seen(metrics: Metrics) -> dict[str, int]:
    """Samples per source at the end of the run, redone steps counted once."""
    rows = metrics.standing_train_rows()
    if not rows:
        return {}
    prefix, suffix = "data/", "/samples_seen"
    counts: dict[str, int] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(prefix) and name.endswith(suffix):
                counts[name[len(prefix) : -len(suffix)]] = int(value)
    return dict(sorted(counts.items()))


def goodput(ledger: Row | None) -> float | None:
    """Seconds in steps that stood, over all seconds of the ledger; None without a ledger."""
    total = sum(seconds for _, seconds in ledger_parts(ledger))
    return float(ledger["step_s"]) / total if ledger is not None and total > 0 else None


def ledger_parts(ledger: Row | None) -> list[tuple[Use, float]]:
    """(use, seconds) of the ledger, steps that stood first; an entry that we have no word for keeps its key."""
    if ledger is None:
        return []
    keys = [*USES, *sorted(key for key in ledger if key.endswith("_s") and key not in USES)]
    return [(USES.get(key, Use(key, "", "ink")), float(ledger[key])) for key in keys if key in ledger]


def curriculum_stages(metrics: Metrics) -> list[str]:
    """Names of the curriculum stages in the order trained."""
    names: list[str] = []
    for row in metrics.of_kind("train"):
        if row["curriculum_stage"] not in names:
            names.append(row["curriculum_stage"])
    return names


def restart_marks(metrics: Metrics, kill: Row | None) -> list[tuple[float, float, str]]:
    """(first step redone, last step done, text) where each attempt but the last broke off.

    The kill that the demo made is named as such.
    """
    marks: list[tuple[float, float, str]] = []
    attempts = metrics.attempts
    for attempt, following in zip(attempts, attempts[1:], strict=False):
        done, redone = metrics.train_by_step(attempt), metrics.train_by_step(following)
        if not done:
            continue
        last = max(done)
        first = min((step for step in redone if step <= last), default=last)
        was_killed = kill is not None and kill["attempt"] == attempt
        text = "worker killed" if was_killed else f"attempt {attempt} ended"
        marks.append((first, last, f"{text}, {last - first + 1} steps redone" if first in redone else text))
    return marks


def loss_panels(metrics: Metrics, kill: Row | None) -> list[Panel]:
    """One panel a curriculum stage: raw loss, its running mean, the redone steps, and the kill."""
    standing = metrics.standing_train_rows()
    marks = restart_marks(metrics, kill)
    panels = []
    for name in curriculum_stages(metrics):
        points = [(row["step"], row["train/loss"]) for row in standing if row["curriculum_stage"] == name]
        curves = [
            Curve("", tuple(points), "first", is_raw=True),
            Curve(f"train loss, mean of {SMOOTHING_STEPS} steps", running_mean(points, SMOOTHING_STEPS), "first"),
        ]
        steps = {step for step, _ in points}
        inside = tuple(mark for mark in marks if mark[1] in steps)
        panels.append(Panel(f"{name} ({len(points)} steps)", tuple(curves), inside))
    return panels


def pyramid_panels(metrics: Metrics) -> list[Panel]:
    """One panel a curriculum stage: running mean of the loss of each pyramid stage."""
    prefix = "train/loss_pyramid_stage_"
    standing = metrics.standing_train_rows()
    panels = []
    for name in curriculum_stages(metrics):
        rows = [row for row in standing if row["curriculum_stage"] == name]
        stages = sorted({key for row in rows for key in row if key.startswith(prefix)})
        curves = [
            Curve(
                f"pyramid stage {key.removeprefix(prefix)}",
                # A step whose slots all belong to other pyramid stages has no value, and no point.
                running_mean([(row["step"], row[key]) for row in rows if row.get(key) is not None], SMOOTHING_STEPS),
                role,
            )
            for key, role in zip(stages, ("third", "second", "first"), strict=False)
        ]
        panels.append(Panel(name, tuple(curves)))
    return panels


def held_out_panel(metrics: Metrics) -> Panel:
    """The held-out loss over the run."""
    points: Sequence[tuple[float, float]] = held_out_points(metrics)
    return Panel("", (Curve("", tuple(points), "second", has_markers=True),))


def spread_panel(metrics: Metrics) -> Panel | None:
    """Seconds of own work of the slowest and the fastest rank, and the longest wait for data; None if not logged."""
    names = {
        "timing/step_s_max": ("slowest rank", "second"),
        "timing/step_s_min": ("fastest rank", "first"),
        "timing/data_s_max": ("longest wait for data", "third"),
    }
    return _panel(metrics, "forward and backward, mean of 20 steps", names)


def memory_panel(metrics: Metrics) -> Panel | None:
    """Memory of the fullest rank: the host's, and the GPU's where there is one; None if not logged."""
    names = {
        "memory/host_rss_gib": ("host, resident", "third"),
        "memory/max_reserved_gib": ("GPU, reserved at most", "second"),
    }
    return _panel(metrics, "", names)


def utilization_panel(metrics: Metrics) -> Panel | None:
    """Share of the GPUs' peak, in percent; None without a GPU whose peak is known."""
    names = {"perf/mfu": ("MFU: what the model needs", "first"), "perf/hfu": ("HFU: with recompute", "fourth")}
    return _panel(metrics, "mean of 20 steps", names, scale=100.0)


def mean_of(metrics: Metrics, name: str) -> float | None:
    """Mean of a metric over the steps that stand; None if no row has it."""
    values = [row[name] for row in metrics.standing_train_rows() if row.get(name) is not None]
    return sum(values) / len(values) if values else None


def _panel(metrics: Metrics, title: str, names: Mapping[str, tuple[str, str]], *, scale: float = 1.0) -> Panel | None:
    rows = metrics.standing_train_rows()
    curves = []
    for name, (label, role) in names.items():
        points = [(row["step"], scale * row[name]) for row in rows if row.get(name) is not None]
        if points:
            curves.append(Curve(label, running_mean(points, SMOOTHING_STEPS), role))
    return Panel(title, tuple(curves)) if curves else None
