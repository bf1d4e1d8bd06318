"""Plots of a run as inline SVG; the only file that imports matplotlib.

Colours are not fixed here: each role (ink, muted, grid, and the series) is drawn in a placeholder colour and replaced
by a CSS variable of the page, so that one SVG serves light and dark. Text stays text, in the page's own font.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ROLES = {
    "ink": "#010101",
    "muted": "#020202",
    "grid": "#030303",
    "first": "#040404",
    "second": "#050505",
    "third": "#060606",
    "alarm": "#070707",
    "fourth": "#080808",
    "fifth": "#090909",
    "sixth": "#0a0a0a",
    "seventh": "#0b0b0b",
}
"""Placeholder colour of each role; the page's style sheet defines `--plot-<role>` for all but the seventh."""

ON_WHITE = {
    "ink": "#1d1c1a",
    "muted": "#6d6a64",
    "grid": "#dedad2",
    "first": "#2a6591",
    "second": "#b5522b",
    "third": "#4c7a4f",
    "fourth": "#7a5a96",
    "alarm": "#b3261e",
    "fifth": "#c79a2e",
    "sixth": "#3a9a97",
    "seventh": "#8a5a44",
}
"""Colour of each role in a plot that is a file of its own."""

SERIES = ("first", "second", "third", "fourth")

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One line of a plot.

    Args:
        label: text of the legend; empty draws no entry.
        points: (step, value), in order of drawing.
        role: a key of `ROLES`.
        is_raw: drawn thin and faint, behind the smoothed lines.
        has_markers: a dot at each point, for few points.
    """

    label: str
    points: tuple[Point, ...]
    role: str = "first"
    is_raw: bool = False
    has_markers: bool = False


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    Args:
        title: above the axes.
        curves: what is drawn.
        marks: (first step redone, last step before the break, text); the span is shaded and its end is a line.
    """

    title: str
    curves: tuple[Curve, ...]
    marks: tuple[tuple[float, float, str], ...] = ()


def running_mean(points: Sequence[Point], window: int) -> tuple[Point, ...]:
    """Mean of each point and up to `window - 1` before it; as many points as came in."""
    smoothed: list[Point] = []
    for position in range(len(points)):
        part = points[max(0, position - window + 1) : position + 1]
        smoothed.append((points[position][0], sum(value for _, value in part) / len(part)))
    return tuple(smoothed)


def line_panels(panels: Sequence[Panel], y_label: str, *, height_in: float = 3.1, width_in: float = 10.0) -> str:
    """Draw panels side by side, each as wide as its range of steps, with one value axis."""
    spans = [_span(panel) for panel in panels]
    with _style():
        figure, axes = _subplots(len(panels), width_in, height_in, spans)
        for position, (panel, axis) in enumerate(zip(panels, axes, strict=True)):
            _draw_panel(panel, axis)
            if position == 0:
                axis.set_ylabel(y_label)
        _draw_legend(figure, axes)
        return _to_svg(figure)


def panels_file(panels: Sequence[Panel], y_label: str, *, height_in: float = 4.2, width_in: float = 11.0) -> str:
    """Draw panels side by side as an SVG that stands alone: colours of its own on white, a legend in each panel."""
    with _style():
        figure, axes = _subplots(len(panels), width_in, height_in, [1.0] * len(panels))
        for panel, axis in zip(panels, axes, strict=True):
            _draw_panel(panel, axis)
            axis.legend(facecolor="#ffffff", edgecolor="none", framealpha=0.9)
        axes[0].set_ylabel(y_label)
        return _to_file(figure)


@dataclass(frozen=True)
class Bars:
    """One distribution.

    Args:
        title: above the axes: what was counted.
        edges: borders of the bins, one more than counts.
        counts: how many fall into each bin.
    """

    title: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]


def histograms_file(bars: Sequence[Bars], *, num_columns: int = 3) -> str:
    """Draw distributions in a grid as an SVG that stands alone, each with axes of its own."""
    from matplotlib.figure import Figure

    num_rows = -(-len(bars) // num_columns)
    with _style():
        figure = Figure(figsize=(13.0, 2.5 * num_rows), layout="constrained")
        axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
        for axis, shown in zip(axes, bars, strict=False):
            axis.stairs(shown.counts, shown.edges, fill=True, color=ROLES["first"], alpha=0.9)
            axis.set_title(shown.title, loc="left", color=ROLES["ink"])
        for axis in axes[len(bars) :]:
            axis.set_axis_off()
        return _to_file(figure)


def _span(panel: Panel) -> float:
    steps = [step for curve in panel.curves for step, _ in curve.points]
    return max(max(steps) - min(steps), 1.0) if steps else 1.0


def _draw_panel(panel: Panel, axis: Any) -> None:
    for curve in panel.curves:
        steps, values = [point[0] for point in curve.points], [point[1] for point in curve.points]
        axis.plot(
            steps,
            values,
            color=ROLES[curve.role],
            linewidth=0.8 if curve.is_raw else 1.9,
            alpha=0.35 if curve.is_raw else 1.0,
            marker="o" if curve.has_markers else None,
            markersize=4.5,
            label=curve.label or None,
            solid_joinstyle="round",
            zorder=1 if curve.is_raw else 2,
        )
    for first, step, text in panel.marks:
        axis.axvspan(first, step, color=ROLES["alarm"], alpha=0.12, linewidth=0, zorder=0)
        axis.axvline(step, color=ROLES["alarm"], linewidth=1.2, linestyle=(0, (4, 3)), zorder=3)
        axis.annotate(
            text,
            (step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(5, -4),
            textcoords="offset points",
            va="top",
            color=ROLES["alarm"],
            fontsize=9.5,
        )
    axis.set_title(panel.title, loc="left", color=ROLES["ink"])
    axis.set_xlabel("step")


def _draw_legend(figure: Any, axes: Sequence[Any]) -> None:
    """One legend for all panels, above them, each label once."""
    entries = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if entries:
        figure.legend(
            list(entries.values()), list(entries), loc="outside upper right", ncols=len(entries), frameon=False
        )


@dataclass(frozen=True)
class Histogram:
    """Counts of one group on axes of their own.

    Args:
        title: above the axes.
        edges: of the bins, one more than there are.
        kept, dropped: counts of each bin, stacked.
        limits: (text, value) of each threshold; drawn as a line.
    """

    title: str
    edges: tuple[float, ...]
    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    limits: tuple[tuple[str, float], ...] = ()


def histograms(
    panels: Sequence[Histogram], x_label: str, *, is_log: bool, num_columns: int = 3, height_in: float = 2.4
) -> str:
    """Draw histograms in rows of `num_columns`, each as high as its own counts; the page says what the colours are."""
    from matplotlib.figure import Figure

    num_rows = -(-len(panels) // num_columns)
    with _style():
        figure = Figure(figsize=(10.0, height_in * num_rows), layout="constrained")
        axes = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
        for panel, axis in zip(panels, axes, strict=False):
            _draw_histogram(panel, axis, is_log)
            axis.set_xlabel(x_label)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        return _to_svg(figure)


def _draw_histogram(panel: Histogram, axis: Any, is_log: bool) -> None:
    both = [kept + dropped for kept, dropped in zip(panel.kept, panel.dropped, strict=True)]
    axis.stairs(panel.kept, panel.edges, fill=True, color=ROLES["first"], alpha=0.9)
    axis.stairs(both, panel.edges, baseline=panel.kept, fill=True, color=ROLES["second"], alpha=0.9)
    if is_log:
        axis.set_xscale("log")
    axis.set_xlim(panel.edges[0], panel.edges[-1])
    axis.yaxis.get_major_locator().set_params(integer=True)
    for text, value in panel.limits:
        if panel.edges[0] <= value <= panel.edges[-1]:
            axis.axvline(value, color=ROLES["alarm"], linewidth=1.2, linestyle=(0, (4, 3)))
            axis.annotate(
                text, (value, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points",
                ha="center", color=ROLES["alarm"], fontsize=8.5,
            )  # fmt: skip
    axis.set_title(panel.title, loc="left", color=ROLES["ink"], pad=16)


def stacked_bar(parts: Sequence[tuple[str, float]], unit: str, *, width_in: float = 10.0) -> str:
    """Draw one horizontal bar of (role, value) parts, the share of those from 6 % on above them.

    It has no legend: the page's table beside it names the parts and carries their colours.
    """
    total = sum(value for _, value in parts)
    with _style():
        figure, (axis,) = _subplots(1, width_in, 1.15, [1.0])
        left = 0.0
        for role, value in parts:
            axis.barh([0], [value], left=left, height=0.62, color=ROLES[role], alpha=0.9)
            if total and value / total >= 0.06:
                axis.text(left + value / 2, 0.45, f"{100 * value / total:.0f} %", ha="center", va="bottom", fontsize=10)
            left += value
        axis.set_xlim(0, total or 1.0)
        axis.set_ylim(-0.4, 0.85)
        axis.set_yticks([])
        axis.grid(False)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel(unit)
        return _to_svg(figure)


def horizontal_bars(values: Sequence[tuple[str, float]], unit: str, *, width_in: float = 10.0) -> str:
    """Draw one bar a name, the number written at its end."""
    with _style():
        figure, (axis,) = _subplots(1, width_in, 0.55 + 0.36 * len(values), [1.0])
        rows = list(range(len(values)))
        axis.barh(rows, [value for _, value in values], height=0.56, color=ROLES["first"], alpha=0.9)
        largest = max((value for _, value in values), default=0.0)
        for row, (_, value) in zip(rows, values, strict=True):
            axis.text(value + 0.008 * (largest or 1), row, f"{value:,.0f}", va="center", fontsize=10)
        axis.set_yticks(rows, [name for name, _ in values])
        axis.tick_params(axis="y", labelcolor=ROLES["ink"], labelsize=10.5)
        axis.set_xlim(0, (largest or 1.0) * 1.08)
        axis.invert_yaxis()
        axis.grid(False, axis="y")
        axis.spines["left"].set_visible(False)
        axis.set_xlabel(unit)
        return _to_svg(figure)


def font_file() -> str:
    """The TrueType file of a font with Latin, Greek and Cyrillic letters, which comes with matplotlib."""
    import matplotlib

    return f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"


def _style() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "m4v",  # equal input gives equal bytes
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "font.size": 10,
            "text.color": ROLES["ink"],
            "axes.edgecolor": ROLES["muted"],
            "axes.labelcolor": ROLES["muted"],
            "axes.titlesize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": ROLES["grid"],
            "grid.linewidth": 0.7,
            "xtick.color": ROLES["muted"],
            "ytick.color": ROLES["muted"],
            "legend.fontsize": 9.5,
        }
    )


def _subplots(count: int, width_in: float, height_in: float, ratios: Sequence[float]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    # Figure() and not pyplot: pyplot keeps every figure in a module global until it is closed.
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    # A short stage must stay readable beside a long one.
    bounded = [max(ratio, 0.25 * max(ratios)) for ratio in ratios]
    axes = figure.subplots(1, count, squeeze=False, sharey=True, width_ratios=bounded)
    return figure, list(axes[0])


def _to_file(figure: Any) -> str:
    """An SVG with colours of its own, on white."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", facecolor="#ffffff", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    for role, placeholder in ROLES.items():
        svg = svg.replace(placeholder, ON_WHITE[role])
    return svg


def _to_svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    for role, placeholder in ROLES.items():
        svg = svg.replace(placeholder, f"var(--plot-{role})")
    svg = svg.replace("'DejaVu Sans'", "var(--sans)")
    # The size comes from viewBox and the page, so that a plot shrinks with its column.
    for attribute in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?) {attribute}="[^"]*"', r"\1", svg, count=1)
    return svg
