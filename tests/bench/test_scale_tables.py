"""Traffic on many ranks: sums made by hand, measured bandwidths in place of assumed ones, and the printed tables."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import benchmark
from m4v_dist.bench.scale_tables import (
    Fabric,
    ModelSize,
    checkpoint_table,
    compute_seconds,
    full_sequence,
    index_bytes,
    scale_report,
    sequence_table,
    step_table,
)
from m4v_dist.bench.traffic import Collective
from m4v_dist.config.load import load_config
from m4v_dist.config.model_settings import KernelSettings
from m4v_dist.config.schema import RunConfig
from m4v_dist.model.build import build_on_meta
from m4v_dist.trainer.checkpoint_index import merge_index

LARGE = "jobs/configs/m4v_2b.toml"
PARAMETERS = 2_222_073_728


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.chdir(request.config.rootpath)


def _size(config: RunConfig) -> ModelSize:
    on_meta = build_on_meta(config.model, KernelSettings())
    return ModelSize({name: parameter.numel() for name, parameter in on_meta.named_parameters()})


def _cells(text: str, row: str) -> list[str]:
    line = next(line for line in text.splitlines() if re.match(rf"\| {re.escape(row)} +\|", line))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_step_on_1024_ranks_is_worked_out_by_hand() -> None:
    config = load_config(LARGE, [])
    size = _size(config)
    assert size.total == PARAMETERS
    shown, once = step_table(config, size, Fabric()), 4 * PARAMETERS * 1023 / 1024 / 1e9
    two, three = _cells(shown, "1,024, ZeRO 2"), _cells(shown, "1,024, ZeRO 3")
    assert two[1:6] == [f"{2 * once:.1f}", "0.0", f"{once:.1f}", "0.0", f"{3 * once:.1f}"]
    # two micro-batches, each with a forward and a backward that gather all weights
    assert three[1:6] == ["0.0", f"{once:.1f}", f"{4 * once:.1f}", "0.0", f"{5 * once:.1f}"]
    seconds = 5 * once / (0.7 * 200)
    assert three[6] == f"{seconds:.3f}"
    assert three[7] == f"{100 * seconds / (seconds + compute_seconds(config)):.0f} %"
    # inside one node NVLink alone counts
    inside = _cells(shown, "8, ZeRO 2")
    assert inside[5:7] == ["0.0", f"{3 * 4 * PARAMETERS * 7 / 8 / 1e9 / (0.7 * 300):.3f}"]
    hpz = _cells(shown, "1,024, ZeRO 3, hpZ")
    assert hpz[3:6] == [f"{once:.1f}", f"{3 * 4 * PARAMETERS * 7 / 8 / 1e9:.1f}", f"{2 * once:.1f}"]


def test_the_seconds_of_computing_are_those_of_the_plan() -> None:
    """GPU-hours of the last stage in the plan's table, 782, over its steps and workers."""
    assert compute_seconds(load_config(LARGE, [])) == pytest.approx(782 * 3600 / 20_000 / 64, rel=0.06)


def test_measured_bandwidths_take_the_place_of_assumed_ones() -> None:
    inside, across = Collective("all-gather", 8_000_000_000, 8), Collective("all-gather", 16_000_000_000, 16)
    assumed = Fabric()
    measured = replace(assumed, nvlink_gb_s=140.0, network_gb_s=50.0, efficiency=1.0)
    assert measured.seconds(inside) == pytest.approx(7 / 140)
    assert measured.seconds(across) == pytest.approx(15 / 50)
    assert (assumed.node_bytes(inside), assumed.node_bytes(across)) == (0, 15e9)


def test_a_checkpoint_is_16_bytes_a_parameter_over_the_ranks() -> None:
    cells = _cells(checkpoint_table(_size(load_config(LARGE, [])), Fabric()), "64")
    whole = 16 * PARAMETERS / 1e9
    assert cells[1:4] == [f"{whole / 64:.3f}", f"{whole:.1f}", f"{whole / 64 / 20:.3f}"]
    assert cells[5] == f"{whole / 20:.1f}"


def test_the_index_is_as_large_as_a_real_one() -> None:
    """Of even shares to a few bytes of numbers; else at the most."""
    size, num_ranks = ModelSize({f"blocks.{number}.weight": 10_000 + number for number in range(50)}), 16
    sizes = {
        f"{kind}/{n}": c for kind in ("weights", "ema", "exp_avg", "exp_avg_sq") for n, c in size.parameters.items()
    }
    even, flat = [{} for _ in range(num_ranks)], [{} for _ in range(num_ranks)]
    for rank in range(num_ranks):
        at = 96
        for key, count in sizes.items():
            share = -(-count // num_ranks)
            start = min(rank * share, count)
            length = min(share, count - start)
            even[rank][key] = [(start, length, at)]
            at += 4 * length
    # as ZeRO 1 and 2: one flat buffer for each kind, cut evenly
    share = -(-size.total // num_ranks)
    ats = [96] * num_ranks
    for kind in ("weights", "ema", "exp_avg", "exp_avg_sq"):
        begin = 0
        for name, count in size.parameters.items():
            for rank in range(begin // share, (begin + count - 1) // share + 1):
                start, stop = max(begin, rank * share), min(begin + count, (rank + 1) * share)
                flat[rank].setdefault(f"{kind}/{name}", []).append((start - begin, stop - start, ats[rank]))
                ats[rank] += 4 * (stop - start)
            begin += count
    real = [
        len(json.dumps(merge_index([{"num_elements": sizes, "parts": parts} for parts in held])))
        for held in (even, flat)
    ]
    assert index_bytes(size, num_ranks, is_even=True) == pytest.approx(real[0], rel=0.02)
    assert real[1] <= index_bytes(size, num_ranks, is_even=False) <= 1.5 * real[1]


def test_the_full_sequence_at_768p_has_119040_tokens_and_heads_decide_who_shares_it() -> None:
    config = load_config(LARGE, [])
    assert full_sequence(config).num_video == 119_040
    shown = sequence_table(config, Fabric())
    # 30 heads
    assert _cells(shown, "4")[1:] == _cells(shown, "8")[1:] == ["-"] * 6
    # 8 double blocks; q, k, v and the answer in bfloat16, half of each half to the other rank
    attention = 8 * 2 * 4 * 1920 * (119_040 + 128) / 2 / 2 / 1e9
    assert _cells(shown, "2")[1] == f"{attention:.3f}"


def test_the_tables_that_the_readme_shows_are_as_printed() -> None:
    config = load_config(LARGE, [])
    shown = Path("jobs/README.md").read_text(encoding="utf-8")
    report = scale_report(config, _size(config))
    rows = [row for row in report.splitlines() if row.startswith("|") and "ZeRO 1 " not in row]
    missing = [row for row in rows if not row.startswith("| 256, ZeRO") and row not in shown]
    assert not missing, "jobs/README.md shows other traffic; put in:\n" + "\n".join(missing)
    assert report.count("nmeasured") == 2


def test_the_subject_prints_its_tables_and_says_that_nothing_was_measured(capfd: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["scale", "--config", "jobs/configs/demo.toml"]) == 0
    out = capfd.readouterr().out
    assert "| 1,024, ZeRO 3, hpZ |" in out
    assert out.splitlines()[-1] == "benchmark scale: figures by arithmetic on assumed bandwidths, none measured"
    assert benchmark.main(["scale", "--config", "jobs/configs/demo.toml", "--dry-run"]) == 0
    assert capfd.readouterr().out.splitlines()[-1].endswith("writes nothing")
