"""The page shows what the run folder holds, says what is missing, escapes captions, and asks nothing of a network."""

import base64
import re
from pathlib import Path

import pytest

from m4v_dist import storage
from m4v_dist.errors import DataError
from m4v_dist.report.fault import prove_redone_steps_equal
from m4v_dist.report.page import render_page
from m4v_dist.report.run_folder import read_metrics, read_run
from tests.report.conftest import TINY_MP4


def _render(run: Path) -> str:
    return render_page(read_run(str(run), str(run / "cache")), name="t", date="2026-01-01")


def test_page_states_the_figures_that_matter(run_folder: Path) -> None:
    check = prove_redone_steps_equal(read_metrics(str(run_folder)), total_steps=100)
    storage.write_json(str(run_folder / "fault_check.json"), check)
    page = _render(run_folder)
    assert "1.800 → 0.583" in page
    assert "8 of 8" in page
    assert "<b>67 %</b>" in page and "lost work" in page
    assert "1,200" in page and "660 stills" in page and "540 clips" in page
    assert "worker killed, 8 steps redone" in page
    assert "untrained → trained" in page


def test_quarantined_file_stands_with_its_error(run_folder: Path) -> None:
    page = _render(run_folder)
    assert ">broken</td>" in page and "66 of 68 records kept" in page
    assert "moov &lt;atom&gt; not found" in page


def test_captions_are_escaped(run_folder: Path) -> None:
    page = _render(run_folder)
    assert "A &lt;b&gt;bold&lt;/b&gt; fox &amp; friends" in page and "<b>bold</b>" not in page


def test_videos_are_embedded(run_folder: Path) -> None:
    page = _render(run_folder)
    assert page.count(f"data:video/mp4;base64,{base64.b64encode(TINY_MP4).decode()}") == 3


def test_page_asks_nothing_of_a_network(run_folder: Path) -> None:
    page = _render(run_folder)
    addresses = set(re.findall(r"https?://[^\"' )]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, addresses
    sources = set(re.findall(r"(?:src|href)=\"([^\"]{0,12})", page))
    assert all(source.startswith(("data:", "#")) for source in sources), sources


def test_plots_carry_no_fixed_colour(run_folder: Path) -> None:
    """A colour that is not a variable of the page would not follow light and dark."""
    for svg in re.findall(r"<svg.*?</svg>", _render(run_folder), flags=re.DOTALL):
        assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{3,6}", svg)


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("samples/samples.json", "No samples in this run folder"),
        ("codec/codec.json", "No codec check"),
        ("cache/report.json", "The cache has no report.json"),
        ("ledger.json", "No ledger.json"),
        ("kill.json", "No fault check in this run folder: 2 attempts"),
    ],
)
def test_a_missing_part_is_stated(run_folder: Path, missing: str, sentence: str) -> None:
    (run_folder / missing).unlink()
    assert sentence in _render(run_folder)


def test_a_named_video_that_is_missing_is_an_error(run_folder: Path) -> None:
    (run_folder / "samples" / "01.mp4").unlink()
    with pytest.raises(DataError, match="01.mp4"):
        _render(run_folder)


def test_a_run_without_metrics_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train first"):
        read_run(str(tmp_path), str(tmp_path))


def test_equal_runs_give_equal_plots(run_folder: Path) -> None:
    assert _render(run_folder) == _render(run_folder)


def test_a_first_held_out_loss_after_training_is_not_called_untrained(run_folder: Path) -> None:
    path = run_folder / "metrics.jsonl"
    path.write_text(
        "".join(line for line in path.read_text().splitlines(True) if '"step": 0, "kind": "held' not in line)
    )
    page = _render(run_folder)
    assert "after 20 steps → trained" in page and "untrained" not in page
