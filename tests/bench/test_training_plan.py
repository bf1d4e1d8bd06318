"""The plan of a run: sums made by hand, what fits, and the refusal with its ways out."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from data_pipeline.mixture import spread_slots
from jobs.plan import cache_to_come, planned_stages, states_of
from m4v_dist.bench.flops_tables import config_columns, step_flops
from m4v_dist.bench.training_plan import (
    GIB,
    PlannedStage,
    fit_table,
    memory,
    memory_table,
    plan_report,
    require_memory,
    work_table,
)
from m4v_dist.blocks.layout import ColumnShape
from m4v_dist.config.gpus import GPUS
from m4v_dist.config.load import load_config
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError
from m4v_dist.model.activations import activation_bytes
from m4v_dist.model.flops import training_flops

LARGE, DEMO = "jobs/configs/m4v_2b.toml", "jobs/configs/demo.toml"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.chdir(request.config.rootpath)


@cache
def _plan(path: str) -> tuple[RunConfig, list[PlannedStage]]:
    config = load_config(path, [])
    return config, planned_stages(config, cache_to_come(config))


def _column(config: RunConfig, unit: int, stage: int, num_text: int) -> ColumnShape:
    return config_columns(config, 128, 128, num_text)(unit, stage)


def _by_hand(config: RunConfig, steps: Sequence[Sequence[ColumnShape]], num_workers: int = 2) -> PlannedStage:
    settings = config.curriculum[1].model_copy(update={"micro_batch_slots": 1})
    return PlannedStage(settings, 0, steps, spread_slots, num_workers)


def _cells(table: str, row: str) -> list[str]:
    line = next(line for line in table.splitlines() if re.match(rf"\| {re.escape(row)} +\|", line))
    return [cell.strip() for cell in line.strip("|").split("|")]


# ---- figures of a stage


def test_tokens_imbalance_longest_and_flops_are_sums_over_the_slots() -> None:
    config = load_config(DEMO, [])
    long, short = _column(config, 3, 2, 10), _column(config, 1, 0, 10)
    # the noisy latent and the one before it in full, the first one at half: 8 x 8 and 4 x 4 tokens; 2 x 2 alone
    assert (long.num_video, short.num_video) == (64 + 64 + 16, 4)
    stage = _by_hand(config, [[long, short, short, short]])
    assert stage.tokens() == (long.num_video + 3 * 4, 40)
    assert stage.num_micro_batches() == 2 and stage.fitting_sizes() == [2, 1]
    full = long.num_video + 10 + 14
    assert stage.imbalance() == pytest.approx(full / ((full + 28) / 2))
    assert list(stage.longest()) == [long] and list(stage.longest(2)) == [long, short]
    flops = training_flops(config.model, long).total() + 3 * training_flops(config.model, short).total()
    assert stage.flops(config.model) == flops


def test_equal_slots_are_balanced_and_means_are_over_the_steps() -> None:
    config = load_config(DEMO, [])
    long, short = _column(config, 3, 2, 10), _column(config, 1, 0, 10)
    stage = _by_hand(config, [[long] * 4, [short] * 4])
    assert stage.imbalance() == 1
    assert stage.tokens() == (2 * (long.num_video + 4), 40)


def test_planned_flops_of_a_stage_are_near_the_mean_over_all_turns() -> None:
    """Two ways to one figure: planned slots, and the closed form over units; 16 steps draw the sources by weight."""
    config, stages = _plan(LARGE)
    for stage in stages:
        if stage.settings.freeze:
            continue
        expected = step_flops(config, stage.settings, stage.settings.buckets[0])
        assert stage.flops(config.model) == pytest.approx(expected, rel=0.06), stage.name


def test_ranks_of_the_papers_curriculum_are_balanced() -> None:
    _, stages = _plan(LARGE)
    assert all(1 <= stage.imbalance() < 1.2 for stage in stages)


# ---- tables


def test_the_work_table_has_every_stage_and_gpu_hours_by_the_stated_mfu() -> None:
    config, stages = _plan(LARGE)
    table = work_table(config, stages)
    for stage in stages:
        cells = _cells(table, stage.name)
        assert cells[2] == f"256 = 64 x {stage.num_micro_batches()} x {stage.settings.micro_batch_slots}"
        plain = config.model.model_copy(update={"recompute": "none"})
        hours = stage.flops(plain) * stage.settings.num_steps / (312e12 * 0.3 * 3600)
        assert cells[-1] == f"{hours:,.0f}"
        assert stage.flops(plain) < stage.flops(config.model)
    assert "unmeasured" in table and "30 % (launch.assumed_mfu)" in table


def test_without_a_gpu_there_are_no_hours_no_verdict_and_no_a100s() -> None:
    config, stages = _plan(DEMO)
    report = plan_report(config, stages, states_of)
    assert "GPU-hours need launch.gpu" in report and "fits" not in report and "A100" not in report
    assert _cells(work_table(config, stages), "video")[-1] == "-"


def test_the_memory_of_a_stage_is_states_and_the_longest_micro_batch() -> None:
    config, stages = _plan(LARGE)
    last = stages[-1]
    needed = memory(config, last, last.longest(), states_of)
    activations = activation_bytes(config.model, config.kernels, last.longest(), is_mixed=True).peak
    states = states_of(config.model, (), config.trainer, 64)
    assert (needed.states, needed.activations) == (states.held, activations)
    assert needed.peak == states.peak(activations)
    assert _cells(memory_table(config, stages, states_of), last.name)[-2:] == [f"{needed.peak / GIB:.2f}", "fits"]
    # frozen blocks have no gradients
    first, second = (memory(config, stage, stage.longest(), states_of) for stage in stages[:2])
    assert second.states - first.states > 0.95 * 4 * 1_062_146_048


def test_the_fit_table_names_the_largest_micro_batch_that_fits_each_a100() -> None:
    """Looked at for one cell: a larger one does not fit, or there is none."""
    config, stages = _plan(LARGE)
    stage = stages[-1]
    cells = _cells(fit_table(config, [stage], states_of), "m4v_2b, ZeRO 2")[-1].split(" / ")
    for gpu, size in zip((GPUS["a100_40gb"], GPUS["a100_80gb"]), map(int, cells), strict=True):
        assert config.trainer.zero_stage == 2
        peaks = {n: memory(config, stage, stage.longest(n), states_of).peak for n in (4, 2, 1)}
        assert peaks[size] <= gpu.usable_bytes
        assert all(peak > gpu.usable_bytes for n, peak in peaks.items() if n > size)
    assert cells == ["2", "4"]


def test_the_fit_table_shows_where_nothing_fits() -> None:
    config = load_config(LARGE, ["model.recompute=none"])
    stage = replace(_plan(LARGE)[1][-1], num_ranks=256)
    assert stage.fitting_sizes() == [1]
    assert _cells(fit_table(config, [stage], states_of), "m4v_2b, ZeRO 1")[-1] == "- / -"


def test_the_tables_that_the_readme_shows_are_as_printed() -> None:
    config, stages = _plan(LARGE)
    shown = Path("jobs/README.md").read_text(encoding="utf-8")
    rows = work_table(config, stages).split("\n\n")[0].splitlines()
    rows += memory_table(config, stages, states_of).split("\n\n")[0].splitlines()
    rows += [row for row in fit_table(config, stages, states_of).splitlines() if row.startswith("| m4v_2b")]
    missing = [row for row in rows if row not in shown]
    assert not missing, "jobs/README.md shows another plan; put in:\n" + "\n".join(missing)


def test_offload_and_summing_in_each_micro_batch_are_told_and_leave_more_of_the_gpu() -> None:
    plain, stages = load_config(LARGE, []), _plan(LARGE)[1]
    config = load_config(LARGE, ["trainer.offload=optimizer", "trainer.reduce_gradients=per_micro_batch"])
    last = stages[-1]
    before, after = (memory(c, last, last.longest(), states_of).states / GIB for c in (plain, config))
    # 2.222 G parameters: gradients whole and 4 shares of 64 go, the bucket and one parameter's buffer come
    assert before - after == pytest.approx(4 * 2.222073728e9 * (1 + 4 / 64) / GIB - 2e9 / GIB, rel=0.03)
    report = plan_report(config, stages, states_of)
    assert "shared out in each micro-batch" in report and "average are on the host" in report
    # six shares of 64 and the sum over micro-batches; weights, average and moments of a snapshot; weights of the build
    offloaded, snapshot, build = (4 * 2.222073728 / 1.073741824 * share for share in (7 / 64, 4 / 64, 1))
    told = re.search(r"Host memory, GiB a rank: ([\d.]+) while .* then ([\d.]+) for .* beside ([\d.]+) of", report)
    assert told is not None
    assert [float(value) for value in told.groups()] == pytest.approx([build, snapshot, offloaded], rel=0.1)
    assert f"8 ranks on a host: {8 * build:.1f}." in report
    assert "offloaded" not in plan_report(plain, stages, states_of)


# ---- refusal


def test_a_stage_that_does_not_fit_is_refused_with_numbers_and_ways_out() -> None:
    config, stages = load_config(LARGE, ["model.recompute=none"]), _plan(LARGE)[1]
    with pytest.raises(ConfigError) as caught:
        require_memory(config, stages, states_of)
    message = str(caught.value)
    assert message.startswith("curriculum 'video_384p_121f': a rank needs ")
    for word in ("A100 80 GB has 73.6 GiB usable. Ways out: ", "model.recompute=blocks (", "micro_batch_slots=1 ("):
        assert word in message
    # each of them is one
    assert all(float(value) <= 73.6 for value in re.findall(r"\(([\d.]+) GiB\)", message))


def test_a_model_of_few_ranks_is_told_that_more_would_do() -> None:
    config = load_config(LARGE, ["launch.gpu='a100_40gb'", "trainer.zero_stage=3"])
    stages = [replace(stage, num_ranks=2) for stage in _plan(LARGE)[1][1:2]]
    with pytest.raises(ConfigError, match=r"twice the workers \(") as caught:
        require_memory(config, stages, states_of)
    assert "trainer.zero_stage" not in str(caught.value) and "recompute" not in str(caught.value)
    alone = [replace(stage, num_ranks=1) for stage in stages]
    with pytest.raises(ConfigError, match=r"Ways out: trainer.offload=optimizer \("):
        require_memory(config, alone, states_of)
    longest = [replace(_plan(LARGE)[1][-1], num_ranks=1)]
    with pytest.raises(ConfigError, match=r"Not enough, each by itself: .*twice the workers \("):
        require_memory(config, longest, states_of)


@pytest.mark.parametrize("overrides", [[], ["launch.gpu='a100_40gb'"]], ids=["80 GB", "40 GB"])
def test_the_papers_config_fits_its_gpu_by_arithmetic(overrides: list[str]) -> None:
    require_memory(load_config(LARGE, overrides), _plan(LARGE)[1], states_of)


def test_without_a_gpu_named_nothing_is_refused() -> None:
    config = load_config(LARGE, ["model.recompute=none"])
    launch = config.launch.model_copy(update={"gpu": None})
    require_memory(config.model_copy(update={"launch": launch}), _plan(LARGE)[1], states_of)
