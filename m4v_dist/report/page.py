"""A run folder as one self-contained HTML page; the only file that imports jinja2.

Videos are embedded as base64 mp4, plots as inline SVG; the page asks nothing of a network. Text from captions, errors
and file names is escaped by the template engine; only the SVG of `plots.py` is let through as markup.
"""

import base64
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from m4v_dist import storage
from m4v_dist.errors import DataError
from m4v_dist.report import figures, plots
from m4v_dist.report.run_folder import Row, RunRecord

TEMPLATE_FOLDER = Path(__file__).parent
VERSIONED_PACKAGES = ("torch", "deepspeed", "ray", "transformers", "webdataset", "decord", "av", "wandb")

SHORT_RUN_STEPS = 10_000
"""Below this the page warns that samples have little form. A round number of ours, far above the demo's steps."""


def render_page(record: RunRecord, *, name: str, date: str, num_parameters: int | None = None) -> str:
    """Return the page's HTML.

    Args:
        record: what the run folder holds.
        name: the run's name.
        date: when the page was made, as shown.
        num_parameters: of the model; None leaves the number out.

    Raises:
        DataError: a video that samples.json or codec.json names is missing.
    """
    return render_template("page.html", name=name, date=date, num_parameters=num_parameters, **_view(record))


def render_template(template: str, **view: Any) -> str:
    """Fill a template of this folder; text is escaped, and a name that the template wants must be there."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["db"] = lambda value: "not measured" if value is None else f"{value:.1f} dB"
    environment.filters["duration"] = _duration
    return environment.get_template(template).render(**view)


def _view(record: RunRecord) -> dict[str, Any]:
    """Everything that the template shows, ready to print."""
    metrics = record.metrics
    held_out = figures.held_out_points(metrics)
    num_steps = len(metrics.standing_train_rows())
    has_steps = num_steps > 0
    ledger = figures.ledger_parts(record.ledger)
    seen = figures.samples_seen(metrics)
    return {
        "num_steps": num_steps,
        "is_short_run": num_steps < SHORT_RUN_STEPS,
        "tiles": _tiles(record, held_out, seen),
        "samples": _with_videos(record.folder, "samples", record.samples),
        "are_samples_untrained": any(entry.get("weights") == "start" for entry in record.samples),
        "codec": _codec(record),
        "precompute": _precompute(record.precompute),
        "loss_svg": plots.line_panels(figures.loss_panels(metrics, record.kill), "loss") if has_steps else None,
        "pyramid_svg": plots.line_panels(figures.pyramid_panels(metrics), "loss") if has_steps else None,
        "held_out": held_out,
        "held_out_svg": _held_out_svg(record) if held_out else None,
        "kill": record.kill,
        "fault": record.fault_check,
        "num_attempts": len(metrics.attempts),
        "num_torn_lines": metrics.num_torn_lines,
        "seen": seen,
        "seen_svg": plots.horizontal_bars(list(seen.items()), "samples") if seen else None,
        "ledger": ledger,
        "failed_saves": (record.ledger or {}).get("failed_saves", 0),
        "damaged_checkpoints": (record.ledger or {}).get("damaged_checkpoints", 0),
        "ledger_total": sum(seconds for _, seconds in ledger),
        "ledger_svg": plots.stacked_bar([(use.role, seconds) for use, seconds in ledger], "seconds")
        if ledger
        else None,
        "spread_svg": _panel_svg(figures.spread_panel(metrics), "seconds"),
        "memory_svg": _panel_svg(figures.memory_panel(metrics), "GiB"),
        "utilization_svg": _panel_svg(figures.utilization_panel(metrics), "percent of peak"),
        "skipped": metrics.of_kind("skipped"),
        "failures": record.failures,
        "validation": record.validation,
        "commands": record.commands,
        "versions": versions(),
    }


def _held_out_svg(record: RunRecord) -> str:
    return plots.line_panels([figures.held_out_panel(record.metrics)], "held-out loss", height_in=2.6)


def _panel_svg(panel: plots.Panel | None, y_label: str) -> str | None:
    return None if panel is None else plots.line_panels([panel], y_label, height_in=2.4)


def _tiles(record: RunRecord, held_out: list[tuple[int, float]], seen: dict[str, int]) -> list[dict[str, str]]:
    """The figures that matter, each with the sentence that says what it is."""
    tiles = []
    if held_out:
        (start, first), (_, last) = held_out[0], held_out[-1]
        before = "untrained" if start == 0 else f"after {start} steps"
        change = f"{100 * (last / first - 1):+.0f} %".replace("-", "−") if first else "no change known"
        tiles.append(
            {
                "figure": f"{first:.3f} → {last:.3f}",
                "caption": f"held-out loss, {before} → trained ({change}), on clips never trained on",
            }
        )
    else:
        tiles.append({"figure": "not measured", "caption": "held-out loss (trainer.held_out_slots = 0?)"})
    if record.fault_check is not None:
        count = record.fault_check["num_redone"]
        equal = sum(not step["differing"] for step in record.fault_check["redone"])
        tiles.append(
            {"figure": f"{equal} of {count}", "caption": "steps redone after the kill with losses equal bit for bit"}
        )
    else:
        count = len(record.metrics.attempts)
        tiles.append({"figure": str(count), "caption": "attempt" + ("s" if count != 1 else "") + "; no fault check"})
    share = figures.goodput(record.ledger)
    tiles.append(
        {
            "figure": f"{100 * share:.0f} %" if share is not None else "no ledger",
            "caption": "goodput: seconds in steps that stood, over all seconds of the ledger",
        }
    )
    tiles.append(
        {
            "figure": f"{sum(seen.values()):,}",
            "caption": "samples seen: " + (", ".join(f"{v:,} {k}" for k, v in seen.items()) or "none"),
        }
    )
    mfu = figures.mean_of(record.metrics, "perf/mfu")
    if mfu is not None:
        tiles.append({"figure": f"{100 * mfu:.1f} %", "caption": "MFU: share of the GPUs' peak, mean of all steps"})
    return tiles


def _codec(record: RunRecord) -> dict[str, Any] | None:
    if record.codec is None:
        return None
    return {**record.codec, "clips": _with_videos(record.folder, "codec", record.codec["clips"])}


def _precompute(report: Row | None) -> dict[str, Any] | None:
    """The cache's report as a table: one row a source with kept, quarantined, and each reason to filter."""
    if report is None:
        return None
    reasons = sorted(report["filtered"])
    columns = ["kept", "quarantined", *reasons]
    table = [
        {"source": source, "counts": [counts.get(column, 0) for column in columns]}
        for source, counts in sorted(report["per_source"].items())
    ]
    return {**report, "columns": columns, "table": table, "num_filtered": sum(report["filtered"].values())}


def _with_videos(run_folder: str, subfolder: str, entries: list[Row]) -> list[Row]:
    """Add `video`, a data URL, to each entry that names a `file` of the subfolder."""
    return [{**entry, "video": _video_url(run_folder, subfolder, entry["file"])} for entry in entries]


def _video_url(run_folder: str, subfolder: str, file: str) -> str:
    path = storage.join(run_folder, subfolder, file.rsplit("/", 1)[-1])
    if not storage.exists(path):
        raise DataError(f"{path} is named in {subfolder}.json but is not there; run the step that writes it again.")
    return "data:video/mp4;base64," + base64.b64encode(storage.read_bytes(path)).decode("ascii")


def versions() -> dict[str, str]:
    """Python, machine, and the packages that matter, as installed where the report is made."""
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    found = {"Python": platform.python_version(), "machine": machine}
    for package in VERSIONED_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _duration(seconds: float) -> str:
    """1:05 for 65 seconds, 4.2 s below a minute."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d} min"
