"""What a curation kept, and why it dropped the rest, as one HTML page beside the clip lists."""

from typing import Any

from m4v_dist import storage
from m4v_dist.report import plots
from m4v_dist.report.page import render_template


def write_curation_page(cache: str) -> str:
    """Draw the distributions that `<cache>/curation/scores.json` holds; returns the page's path.

    Args:
        cache: folder of a cache, local or s3://, whose clip lists are written.
    """
    found = storage.read_json(storage.join(cache, "curation", "scores.json"))
    path = storage.join(cache, "curation", "report.html")
    storage.write_bytes(path, render_curation(found, cache).encode())
    return path


def render_curation(found: dict[str, Any], cache: str) -> str:
    """The page's HTML.

    Args:
        found: what scores.json holds: `counts` by source, and `scores`, one entry a score.
        cache: where, as shown.
    """
    counts: dict[str, dict[str, int]] = found["counts"]
    reasons = sorted({reason for of_source in counts.values() for reason in of_source} - {"kept", "quarantined"})
    columns = ["kept", *reasons, "quarantined"]
    rows = [(source, [of_source.get(column, 0) for column in columns]) for source, of_source in counts.items()]
    scores = [{"name": score["name"], "svg": _draw(score)} for score in found["scores"] if score["sources"]]
    return render_template("curation.html", cache=cache, columns=columns, rows=rows, scores=scores)


def _draw(score: dict[str, Any]) -> str:
    panels = [
        plots.Histogram(
            title=source,
            edges=tuple(score["edges"]),
            kept=tuple(of_source["kept"]),
            dropped=tuple(of_source["dropped"]),
            limits=tuple((f"{name.split('_')[0]} {value:g}", value) for name, value in of_source["limits"].items()),
        )
        for source, of_source in score["sources"].items()
    ]
    return plots.histograms(panels, score["unit"], is_log=score["is_log"])
