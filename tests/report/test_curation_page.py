"""The page of a curation: each score, source and threshold is on it, and nothing in it is markup of the data's."""

import re
from pathlib import Path

import pytest

from m4v_dist import storage
from m4v_dist.report.curation_page import render_curation, write_curation_page
from m4v_dist.report.plots import ROLES, Histogram, histograms

FOUND = {
    "counts": {
        "clips": {"kept": 1200, "static": 7, "quarantined": 2},
        "stills": {"kept": 5, "quarantined": 0, "duplicate": 3},
    },
    "scores": [
        {
            "name": "motion", "unit": "short sides a second", "is_log": True, "edges": [0.01, 0.1, 1.0, 10.0],
            "sources": {
                "clips": {"kept": [0, 3, 2], "dropped": [4, 0, 1], "limits": {"min_motion": 0.02, "max_motion": 2.0}}
            },
        },
        {
            "name": "brightness", "unit": "mean luma", "is_log": False, "edges": [0.0, 0.5, 1.0],
            "sources": {
                name: {"kept": [1, 2], "dropped": [0, 0], "limits": {"min_brightness": 0.04}}
                for name in ("clips", "stills", "a", "b")
            },
        },
        {"name": "seconds", "unit": "s", "is_log": True, "edges": [1.0, 10.0], "sources": {}},
    ],
}  # fmt: skip


def test_the_page_has_a_table_of_reasons_and_a_plot_for_each_score(tmp_path: Path) -> None:
    storage.write_json(f"{tmp_path}/curation/scores.json", FOUND)
    page = Path(write_curation_page(str(tmp_path))).read_text()
    assert page.count("<svg") == 2 and "<h2>motion</h2>" in page and "<h2>seconds</h2>" not in page
    row = re.search(r"<tr><td>clips</td>(.*?)</tr>", page)
    assert row is not None and re.findall(r"<td>(.*?)</td>", row[1]) == ["1,200", "0", "7", "2"]
    assert "min 0.02" in page and "max 2" in page and "min 0.04" in page
    assert not any(placeholder in page for placeholder in ROLES.values())


def test_a_cache_with_markup_in_its_name_does_not_get_it_into_the_page() -> None:
    assert "<b>x" not in render_curation(FOUND, "<b>x")


@pytest.mark.parametrize("num_panels", [1, 3, 4])
def test_equal_counts_give_equal_plots_whatever_their_number(num_panels: int) -> None:
    panels = [Histogram(f"source{n}", (0.0, 1.0, 2.0), (n, 1), (0, 2), (("max 1", 1.0),)) for n in range(num_panels)]
    svg = histograms(panels, "share", is_log=False)
    assert svg == histograms(panels, "share", is_log=False)
    assert all(f"source{n}" in svg for n in range(num_panels)) and svg.count("max 1") == num_panels
