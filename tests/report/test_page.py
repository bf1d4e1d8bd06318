"""The page shows what the run folder holds, says what is missing, escapes captions, and asks nothing of a network."""

import base64
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from m4v_dist import storage
from m4v_dist.errors import DataError
from m4v_dist.report import figures
from m4v_dist.report.fault import prove_redone_steps_equal
from m4v_dist.report.page import render_page
from m4v_dist.report.run_folder import read_metrics, read_run
from m4v_dist.trainer.metrics import Ledger
from tests.report.conftest import TINY_MP4, make_run_folder


def _render(run: Path, num_parameters: int | None = 4_200_000) -> str:
    record = read_run(str(run), str(run / "cache"))
    return render_page(record, name="t", date="2026-01-01", num_parameters=num_parameters)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the whole run, rendered once: the plots take a second."""
    run = make_run_folder(tmp_path_factory.mktemp("page") / "run")
    check = prove_redone_steps_equal(read_metrics(str(run)), total_steps=100)
    storage.write_json(str(run / "fault_check.json"), check)
    return _render(run)


def test_page_states_the_figures_that_matter(page: str) -> None:
    assert "1.800 → 0.583" in page
    assert "8 of 8" in page
    assert "<b>60 %</b>" in page
    assert "1,200" in page and "660 stills" in page and "540 clips" in page
    assert "worker killed, 8 steps redone" in page
    assert "untrained → trained" in page


def test_page_speaks_of_this_run_s_steps_and_parameters(page: str) -> None:
    words = " ".join(page.split())
    assert "An M4V of 4,200,000 parameters, trained for 100 steps on cached latents" in words
    assert "cached latents (the cache holds 66 clips and" in words
    assert "After 100 steps expect coarse colour" in words
    assert "CPU expect" not in words and "small M4V" not in words


def test_codec_figures_stand_by_size_and_what_was_not_measured_is_said(page: str) -> None:
    words = " ".join(page.split())
    assert "Over 1 train clips at 128 × 128 px: 30.1 dB for first frames, not measured for later ones." in words
    assert "Over 3 train clips at 64 × 192 px: 28.5 dB for first frames, 22.5 dB for later ones." in words
    assert "No held-out clips." in words and "nan dB" not in words


def test_quarantined_file_stands_with_its_error(page: str) -> None:
    assert ">broken</td>" in page and "66 of 68 records kept" in page
    assert "moov &lt;atom&gt; not found" in page


def test_no_damaged_shard_is_said(page: str) -> None:
    assert "Damaged shards: none." in page and "<th>damaged shard</th>" not in page


def test_a_damaged_shard_stands_with_its_reason(run_folder: Path) -> None:
    path = str(run_folder / "cache" / "report.json")
    damage = {
        "shard": "clips-000007.tar",
        "source": "clips",
        "error": "tar breaks off: <header>",
        "num_clips_before": 41,
    }
    storage.write_json(path, {**storage.read_json(path), "damaged_shards": [damage]})
    page = _render(run_folder)
    row = next(line for line in page.splitlines() if "clips-000007.tar" in line)
    assert "<td>clips</td>" in row and ">41</td>" in row and "tar breaks off: &lt;header&gt;" in row
    assert "Damaged shards: none." not in page


def _ledger_row(page: str, name: str) -> str:
    """The words of the ledger's row of that name."""
    row = re.search(rf"<tr><td><span [^>]*></span>{name}</td>(.*?)</tr>", page, flags=re.DOTALL)
    assert row is not None, name
    return " ".join(re.sub("<[^>]*>", " ", row[1]).split())


def test_each_entry_of_the_ledger_stands_with_what_it_is_and_its_share(page: str) -> None:
    assert set(figures.USES) == {field.name for field in fields(Ledger) if field.name.endswith("_s")}
    seconds = {"step_s": 48.0, "data_s": 1.5, "checkpoint_s": 4.0, "validation_s": 3.0, "restart_s": 12.0}
    seconds |= {"lost_s": 3.5, "build_s": 6.25, "other_s": 1.75}
    for key, use in figures.USES.items():
        shown = f"{use.meaning} {seconds[key]:.1f} {100 * seconds[key] / 80:.1f} %"
        assert use.meaning and _ledger_row(page, use.name) == shown


def test_each_entry_of_the_ledger_has_a_colour_of_its_own_that_the_page_defines(page: str) -> None:
    roles = [use.role for use in figures.USES.values()]
    assert len(set(roles)) == len(roles)
    bar = next(svg for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL) if "seconds" in svg)
    for role in roles:
        assert f"background: var(--plot-{role})" in page and f"fill: var(--plot-{role})" in bar
        assert f"--plot-{role}: " in page


def test_saves_that_failed_and_checkpoints_that_were_damaged_are_said_and_only_they(run_folder: Path) -> None:
    assert "could not be saved" not in _render(run_folder)
    path = str(run_folder / "ledger.json")
    storage.write_json(path, {**storage.read_json(path), "failed_saves": 2, "damaged_checkpoints": 1})
    shown = " ".join(_render(run_folder).split())
    assert "2 checkpoints could not be saved, and 1 committed ones were found damaged" in shown


def test_an_entry_that_has_no_word_keeps_its_key(run_folder: Path) -> None:
    path = str(run_folder / "ledger.json")
    storage.write_json(path, {**storage.read_json(path), "warmup_s": 20.0})
    assert _ledger_row(_render(run_folder), "warmup_s") == "20.0 20.0 %"


def test_captions_are_escaped(page: str) -> None:
    assert "A &lt;b&gt;bold&lt;/b&gt; fox &amp; friends" in page and "<b>bold</b>" not in page


def test_videos_are_embedded(page: str) -> None:
    assert page.count(f"data:video/mp4;base64,{base64.b64encode(TINY_MP4).decode()}") == 3


def test_page_asks_nothing_of_a_network(page: str) -> None:
    addresses = set(re.findall(r"https?://[^\"' )]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, addresses
    sources = set(re.findall(r"(?:src|href)=\"([^\"]{0,12})", page))
    assert all(source.startswith(("data:", "#")) for source in sources), sources


def test_plots_carry_no_fixed_colour(page: str) -> None:
    """A colour that is not a variable of the page would not follow light and dark."""
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{3,6}", svg)


def test_equal_runs_give_equal_plots(page: str, run_folder: Path) -> None:
    def plots(text: str) -> list[str]:
        return re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)

    assert plots(page) == plots(_render(run_folder)) and len(plots(page)) == 7


def test_each_missing_part_is_stated(run_folder: Path) -> None:
    """A run on which nothing was done but training, killed by nobody, and measured only later."""
    for missing in ("samples/samples.json", "codec/codec.json", "cache/report.json", "ledger.json", "kill.json"):
        (run_folder / missing).unlink()
    path = run_folder / "metrics.jsonl"
    path.write_text(
        "".join(line for line in path.read_text().splitlines(True) if '"step": 0, "kind": "held' not in line)
    )
    page = _render(run_folder, num_parameters=None)
    assert "No samples in this run folder" in page
    assert "No codec check" in page
    assert "The cache has no report.json" in page
    assert "No ledger.json" in page
    assert "No fault check in this run folder: 2 attempts" in page and "The killed worker" not in page
    # A first held-out loss after training is not called untrained.
    assert "after 20 steps → trained" in page and "untrained" not in page
    words = " ".join(page.split())
    assert "An M4V, trained for 100 steps" in words and "worker was killed" not in words


def test_videos_that_began_with_a_given_picture_are_not_called_made_from_the_prompt_alone(
    page: str, run_folder: Path
) -> None:
    assert "Made from the prompt alone" in page
    path = str(run_folder / "samples" / "samples.json")
    entries = storage.read_json(path)
    storage.write_json(path, [entry | {"first_frame": None} for entry in entries])
    assert "Made from the prompt alone" in _render(run_folder)
    storage.write_json(path, [entry | {"first_frame": "a.png"} for entry in entries])
    assert "Made from the prompt and a given first frame" in _render(run_folder)


def test_suffix_and_negative_prompt_stand_beside_the_prompt(page: str, run_folder: Path) -> None:
    assert "negative prompt" not in page
    path = str(run_folder / "samples" / "samples.json")
    texts = {"prompt_suffix": ", Ultra HD", "negative_prompt": "grey & blurred"}
    storage.write_json(path, [entry | texts for entry in storage.read_json(path)])
    words = " ".join(_render(run_folder).split())
    assert "<strong>A white paper plane</strong>, Ultra HD<br> negative prompt: grey &amp; blurred<br>" in words


def test_videos_of_start_weights_are_not_called_those_of_the_trained_model(page: str, run_folder: Path) -> None:
    assert "The averaged weights then made" in page and "averaged (EMA) weights" in page
    path = str(run_folder / "samples" / "samples.json")
    entries = storage.read_json(path)
    start = {"weights": "start", "checkpoint": None, "start_weights": "/run/warm_start/weights.safetensors"}
    storage.write_json(path, [entry | start for entry in entries])
    other = " ".join(_render(run_folder).split())
    assert "The start weights, before any training, made the videos below" in other
    assert "from the start weights, before any training." in other and "start weights · seed 0" in other
    assert "averaged" not in other and "None" not in other and "expect coarse colour" not in other


def test_spread_and_memory_are_drawn_and_no_mfu_is_made_up(page: str) -> None:
    drawn = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    (spread,) = [svg for svg in drawn if "slowest rank" in svg]
    assert "fastest rank" in spread and "longest wait for data" in spread
    (memory,) = [svg for svg in drawn if "host, resident" in svg]
    assert "GPU, reserved" not in memory
    assert "No MFU: the run had no GPU whose peak is known." in page and "share of the GPUs" not in page


def test_mfu_and_gpu_memory_stand_where_a_run_has_them(run_folder: Path) -> None:
    path = run_folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    gpu = {"perf/mfu": 0.375, "perf/hfu": 0.5, "memory/max_reserved_gib": 61.0}
    path.write_text("".join(json.dumps(row | (gpu if row["kind"] == "train" else {})) + "\n" for row in rows))
    page = _render(run_folder)
    assert "<b>37.5 %</b>" in page and "MFU: what the model needs" in page and "GPU, reserved at most" in page
    assert "No MFU" not in page


def test_what_went_wrong_stands_with_its_rank_step_and_records(page: str, run_folder: Path) -> None:
    assert "No attempt left a failure report." in page and "No step was skipped." in page
    failure = {
        "attempt": 1, "cause": "rank 1 failed: <KeyError>", "first_rank": 1, "host": "node-7", "pid": 4242, "gpu": None,
        "step": 67, "records": ["clips/fox", "clips/plane"],
    }  # fmt: skip
    storage.write_json(str(run_folder / "attempts" / "attempt_0001_failure.json"), failure)
    storage.write_json(str(run_folder / "attempts" / "attempt_0001.json"), {"attempt": 1})
    storage.write_json(str(run_folder / "validation" / "step_00000060" / "samples.json"), [{}, {}])
    storage.write_json(str(run_folder / "validation" / "step_00000080" / "failure.json"), {"step": 80})
    slots = [{"record": "stills/blank"}]
    skipped = {"attempt": 1, "step": 5, "kind": "skipped", "num_non_finite_slots": 1, "slots": slots}
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(skipped) + "\n")
    words = " ".join(_render(run_folder).split())
    assert "rank 1 failed: &lt;KeyError&gt;" in words and "rank 1, node-7, process 4242</td>" in words
    assert "clips/fox, clips/plane" in words and "stills/blank" in words
    assert "step 60 (2 videos), step 80 (failed); in the run folder" in words
    assert "No attempt left" not in words and "No step was skipped" not in words


def test_a_named_video_that_is_missing_is_an_error(run_folder: Path) -> None:
    (run_folder / "samples" / "01.mp4").unlink()
    with pytest.raises(DataError, match="01.mp4"):
        _render(run_folder)


def test_a_run_without_metrics_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train first"):
        read_run(str(tmp_path), str(tmp_path))
