"""`jobs.benchmark`: the subject comes first, the rest is every verb's command line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs import benchmark
from m4v_dist.bench.flops_tables import clip_table
from m4v_dist.config.load import load_config
from tests.integration.small_run import make_small_cache, small_values, to_toml

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "jobs" / "configs" / "demo.toml")
LARGE = str(ROOT / "jobs" / "configs" / "m4v_2b.toml")


def test_flops_prints_the_tables_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert benchmark.main(["flops", "--config", DEMO]) == 0
    out = capfd.readouterr().out
    titles = re.findall(r"^## (.+)$", out, flags=re.MULTILINE)
    assert [title.split(" (")[0] for title in titles] == [
        "The paper's figures and ours", "One forward by part", "Training", "One generated clip", "Parameters by part",
    ]  # fmt: skip
    assert "57.83 (+4.3 %)" in out and "1,972,059,200" in out
    assert out.splitlines()[-1].startswith("benchmark flops: ")
    assert not list(tmp_path.iterdir())


def test_flops_needs_no_folder_that_can_be_written(capfd: pytest.CaptureFixture[str]) -> None:
    """The run's folder may be another machine's."""
    assert benchmark.main(["flops", "--config", LARGE, "run.folder=/proc/none"]) == 0
    out = capfd.readouterr().out
    heads = next(line for line in out.splitlines() if line.startswith("| part ") and "m4v_2b" in line)
    assert heads.split(" | ")[1].strip() == "this config (ssm)"
    for line in ("| video_768p_57f ", "| video_768p_241f ", "| full_mamba_temporal ", "| unified: ssm scan "):
        assert line in out


def test_a_dry_run_prints_no_table(capfd: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["flops", "--config", DEMO, "--dry-run"]) == 0
    assert "|" not in capfd.readouterr().out


def test_a_clip_s_figures_follow_the_config() -> None:
    def clip(*overrides: str) -> str:
        return clip_table(load_config(DEMO, list(overrides))).splitlines()[2]

    assert clip() != clip("model.num_single_blocks=4")
    assert clip() != clip("sampling.later_unit_guidance=1.0")
    assert clip() == clip("sampling.later_unit_guidance=1.0", "sampling.has_linear_guidance=true")
    assert clip() != clip("sampling.first_frame='fox.png'")


@pytest.mark.parametrize("argv", [["flop", "--config", DEMO], ["--config", DEMO], [], ["--config", DEMO, "flops"]])
def test_an_unknown_or_missing_subject_is_exit_2_and_names_the_known(
    argv: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.main(argv)
    assert ended.value.code == 2
    err = capfd.readouterr().err
    assert all(subject in err for subject in benchmark.SUBJECTS)


def test_a_subject_that_does_not_come_first_is_told_so(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--config", DEMO, "flops"])
    err = capfd.readouterr().err
    assert "the subject comes first, before --config: python -m jobs.benchmark flops --config FILE" in err


def test_a_wrong_key_is_exit_2(capfd: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["flops", "--config", DEMO, "model.mixr=ssm"]) == 2
    assert "model.mixer" in capfd.readouterr().err


# ---- ablation

ROWS = ["full_attention", "full_mamba_temporal", "text_vision_temporal"]
"""Two models under three names, in both of the paper's tables."""
MODELS = ROWS[:2]


def _toml(tmp_path: Path, **benchmark_values: Any) -> str:
    values = small_values(str(tmp_path / "run"), str(tmp_path / "cache"))
    values["benchmark"] = {"num_steps": 3, "rows": ROWS, **benchmark_values}
    path = tmp_path / "run.toml"
    path.write_text(to_toml(values))
    return str(path)


def _ablation(*argv: str) -> None:
    """As a user gives it: a process of its own, since a process has one process group."""
    command = [sys.executable, "-m", "jobs.benchmark", "ablation", *argv]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=240)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of the rows above, once for all tests that look at the outcome."""
    folder = tmp_path_factory.mktemp("ablation")
    make_small_cache(str(folder / "cache"))
    _ablation("--config", _toml(folder, num_seeds=2))
    return folder / "run" / "benchmark" / "ablation"


def _runs(folder: Path) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads((folder / "ablation.json").read_text())["runs"]
    return runs


@pytest.mark.slow
def test_each_distinct_model_trains_once_a_seed(trained: Path) -> None:
    assert [(run["row"], run["seed"]) for run in _runs(trained)] == [(row, seed) for seed in (7, 8) for row in MODELS]
    for run in _runs(trained):
        assert [step for step, _ in run["train"]] == [0, 1, 2]
        assert [step for step, _ in run["held_out"]] == [0, 1, 2, 3]


@pytest.mark.slow
def test_rows_of_a_seed_begin_at_one_loss_on_the_same_slots_and_then_part(trained: Path) -> None:
    """All predict zero at the start, so a difference there would be one of data or noise."""
    for seed in (7, 8):
        mine = [run for run in _runs(trained) if run["seed"] == seed]
        assert len({run["held_out"][0][1] for run in mine}) == len({run["train"][0][1] for run in mine}) == 1
        assert len({run["held_out"][-1][1] for run in mine}) == len(mine)
    first = {run["seed"]: run["train"][0][1] for run in _runs(trained)}
    assert first[7] != first[8]


@pytest.mark.slow
def test_the_page_has_both_tables_and_ranks_only_what_does_not_overlap(trained: Path) -> None:
    page = (trained / "ablation.md").read_text()
    assert "## Architectures" in page and "## Components" in page and "## Hybrids" not in page
    assert "text_vision_temporal (= full_mamba_temporal)" in page
    assert "seeds 7, 8" in page and "do not overlap" in page and "One seed" not in page
    assert "no claim of speed" in page
    for run in _runs(trained):
        assert f"{run['num_parameters']:,}" in page


@pytest.mark.slow
def test_the_plot_stands_alone_and_the_weights_are_not_kept(trained: Path) -> None:
    plot = (trained / "ablation.svg").read_text()
    assert "var(--" not in plot and "#2a6591" in plot
    assert all(f">{row}<" in plot for row in ROWS)
    assert not list(trained.rglob("*.safetensors")) and not list(trained.rglob("COMMITTED"))
    assert len(list(trained.glob("*/metrics.jsonl"))) == 4


@pytest.mark.slow
def test_a_second_benchmark_begins_again_and_repeats_bit_for_bit(trained: Path) -> None:
    kept = ("row", "seed", "held_out", "train")
    before = {key: _runs(trained)[1][key] for key in kept}
    toml = str(trained.parents[2] / "run.toml")
    _ablation("--config", toml, "benchmark.num_seeds=1", f"benchmark.rows=['{MODELS[1]}']")
    assert [{key: run[key] for key in kept} for run in _runs(trained)] == [before]
    assert "One seed" in (trained / "ablation.md").read_text()


def test_a_dry_run_of_the_ablation_names_the_runs_and_writes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_small_cache(str(tmp_path / "cache"))
    assert benchmark.main(["ablation", "--config", _toml(tmp_path), "--dry-run"]) == 0
    assert "would train 2 runs of 3 steps: full_attention, full_mamba_temporal" in capfd.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_becomes_of_an_earlier_ablation(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_small_cache(str(tmp_path / "cache"))
    folder = tmp_path / "run" / "benchmark" / "ablation"
    for name in ("full_attention_seed7", "text_seed7"):
        (folder / name).mkdir(parents=True)
    (folder / "ablation.md").write_text("earlier")
    assert benchmark.main(["ablation", "--config", _toml(tmp_path), "--dry-run"]) == 0
    assert (
        capfd.readouterr()
        .out.splitlines()[-1]
        .endswith(
            "run/benchmark/ablation, replacing ablation.md, full_attention_seed7 of an earlier benchmark, keeping "
            "text_seed7, which the new page does not show"
        )
    )
    assert (folder / "ablation.md").read_text() == "earlier" and (folder / "full_attention_seed7").is_dir()


def test_no_cache_is_exit_3_and_names_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["ablation", "--config", _toml(tmp_path)]) == 3
    assert str(tmp_path / "cache") in capfd.readouterr().err
    assert not (tmp_path / "run" / "benchmark").exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("benchmark.rows=['full_mambo']", "full_mamba"),
        ("benchmark.rows=[]", "benchmark.rows"),
        ("benchmark.num_steps=0", "benchmark.num_steps"),
        ("trainer.held_out_slots=0", "trainer.held_out_slots=0"),
        ("run.folder='s3://bucket/run'", "local or mounted"),
        ("model.num_single_blocks=1", "at least 2"),
    ],
)
def test_what_cannot_be_benchmarked_is_exit_2(
    tmp_path: Path, override: str, named: str, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = ["ablation", "--config", _toml(tmp_path, rows=[*ROWS, "interleaved"]), "--dry-run", override]
    assert benchmark.main(argv) == 2
    assert named in capfd.readouterr().err


def test_attention_is_timed_beside_its_twins_and_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["attention", "--config", DEMO, "run.folder=/proc/none"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert "median of 7 calls" in lines[0] and "float32" in lines[0]
    assert "row at unit" in lines[-4] and lines[-4].count(" / ") == 3
    assert lines[-1].startswith("benchmark attention: measured on CPU")


def test_the_scan_is_timed_beside_attention_and_what_cannot_run_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["kernels", "--config", DEMO, "run.folder=/proc/none", "benchmark.tokens=[64]"]
    assert benchmark.main(argv) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[2].count("|") == 5 and "scan (plain torch)" in lines[2] and "SDPA" in lines[2]
    assert lines[4].startswith("| 64 ") and lines[4].count(" / ") == 2
    assert "triton runs on a GPU only" in lines[6]
    assert lines[-1].startswith("benchmark kernels: measured on CPU")


def test_attention_on_a_gpu_that_is_not_there_is_exit_2(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert benchmark.main(["attention", "--config", DEMO, "launch.use_gpu=true", "--dry-run"]) == 2
    assert "sees no CUDA device" in capfd.readouterr().err


# ---- training


def test_training_is_planned_before_any_worker_starts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["training", "--config", _toml(tmp_path), "--dry-run", "benchmark.worker_counts=[1, 2]"]
    assert benchmark.main(argv) == 0
    assert "would time 12 runs of 3 and 3 steps" in capfd.readouterr().out
    assert benchmark.main([*argv, 'benchmark.curriculum_stages=["vidoe"]']) == 2
    assert not (tmp_path / "run" / "benchmark").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_training_is_timed_on_workers_and_leaves_no_weights(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "jobs.benchmark", "training", "--config", _toml(tmp_path, is_saving=True),
        'benchmark.curriculum_stages=["image"]', "benchmark.zero_stages=[2]", "benchmark.num_warm_up_steps=1",
        "benchmark.num_steps=2", "launch.num_workers=1", "trainer.global_batch_slots=3",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    folder = tmp_path / "run" / "benchmark" / "training"
    (run,) = json.loads((folder / "training.json").read_text())["runs"]
    assert run["case"] == {"curriculum_stage": "image", "zero_stage": 2, "num_workers": 1}
    assert run["tokens_a_second"] > 0 and run["step_s"] > 0 and run["saved_gib"] > 0 and run["stall_s"] > 0
    assert (folder / "training.md").read_text() in done.stdout
    rows = [json.loads(line) for line in next(folder.glob("*/metrics.jsonl")).read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert 3 <= len(steps) < 300
    assert not list(folder.glob("*/checkpoints"))


# ---- sequence


def test_ranks_that_cannot_cut_the_sequence_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["sequence", "--config", _toml(tmp_path), "--dry-run"]
    assert benchmark.main([*argv, "benchmark.worker_counts=[1, 2]"]) == 0
    assert "a sequence of 48 tokens on 1, 2 ranks" in capfd.readouterr().out
    assert benchmark.main([*argv, "benchmark.worker_counts=[1, 3]"]) == 2
    assert "benchmark.worker_counts has 3: a sequence of 3 frames and 2 heads" in capfd.readouterr().err


def test_a_large_sequence_is_the_whole_clip_at_full_size(capfd: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["sequence", "--config", LARGE, "--dry-run", "run.folder=/tmp/none"]) == 0
    assert "a sequence of 119,040 tokens on 1 ranks" in capfd.readouterr().out
