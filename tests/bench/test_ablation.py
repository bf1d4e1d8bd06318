"""What the ablation's page says of its runs: no order from one seed, and none from ranges that overlap."""

import pytest

from m4v_dist.bench.ablation import (
    TABLES,
    AblationRun,
    ablation_page,
    ablation_panels,
    rows_to_train,
    run_config,
    trained_as,
)
from m4v_dist.config.presets import ABLATIONS
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError
from m4v_dist.report.plots import ON_WHITE, ROLES
from tests.integration.small_run import small_config


@pytest.fixture
def config() -> RunConfig:
    return small_config("/run", "/cache")


def _run(row: str, seed: int, end: float) -> AblationRun:
    return AblationRun(row, seed, 1234567, 5e9, 0.5, ((0, 1.0), (60, end)), ((0, 1.1), (59, end)))


def test_every_row_of_the_ablations_stands_in_a_table_once() -> None:
    assert sorted(row for rows in TABLES.values() for row in rows) == sorted(ABLATIONS)


def test_two_names_of_one_model_train_once() -> None:
    assert trained_as("text_vision") == "full_mamba" and trained_as("text_vision_temporal") == "full_mamba_temporal"
    assert rows_to_train(("text_vision", "text", "full_mamba")) == ("full_mamba", "text")


def test_rows_differ_in_their_model_and_folder_alone(config: RunConfig) -> None:
    first, second = (run_config(config, row, 9).model_dump() for row in ("full_attention", "parallel"))
    assert [key for key in first if first[key] != second[key]] == ["run", "model"]
    differing = {key for key in first["model"] if first["model"][key] != second["model"][key]}
    assert differing == {"ablation", "mixer"}
    assert first["run"]["seed"] == 9 and len(first["curriculum"]) == 1
    assert first["curriculum"][0]["name"] == config.curriculum[-1].name


def test_a_row_replaces_another_that_the_config_names(config: RunConfig) -> None:
    named = config.model_copy(update={"model": run_config(config, "no_components", 0).model})
    assert run_config(named, "text_vision_temporal", 0).model.has_temporal_branch
    assert run_config(named, "text_vision_temporal", 0).model.ablation == "text_vision_temporal"


def test_a_row_that_does_not_fit_the_model_is_refused_by_name(config: RunConfig) -> None:
    small = config.model_copy(update={"model": config.model.model_copy(update={"num_single_blocks": 1})})
    with pytest.raises(ConfigError, match=r"interleaved.*at least 2"):
        run_config(small, "interleaved", 0)


def test_one_seed_ranks_nothing(config: RunConfig) -> None:
    page = ablation_page(config, [_run("full_attention", 7, 0.5), _run("full_mamba", 7, 0.4)], "a CPU")
    assert "One seed" in page and " below " not in page
    assert "a CPU" in page and "1,234,567" in page and "5.000 G" in page


def test_several_seeds_rank_only_ranges_that_do_not_overlap(config: RunConfig) -> None:
    runs = [_run("full_attention", 7, 0.50), _run("full_mamba", 7, 0.40), _run("text", 7, 0.45)]
    runs += [_run("full_attention", 8, 0.52), _run("full_mamba", 8, 0.46), _run("text", 8, 0.47)]
    page = ablation_page(config, runs, "a CPU")
    told = next(line for line in page.splitlines() if "do not overlap" in line)
    assert "full_mamba below full_attention" in told and "text below full_attention" in told
    assert "full_mamba below text" not in told and "full_attention below" not in told
    assert told.endswith("by chance in 33 % of cases.")
    assert "0.4300 (0.4000 to 0.4600)" in page


def test_a_row_whose_seeds_are_not_all_done_is_not_ranked(config: RunConfig) -> None:
    runs = [_run("full_attention", 7, 0.5), _run("full_mamba", 7, 0.1), _run("full_attention", 8, 0.5)]
    page = ablation_page(config, runs, "a CPU")
    assert "do not overlap: none" in page


def test_the_page_and_the_plot_of_a_benchmark_under_way_hold_what_is_done(config: RunConfig) -> None:
    runs = [_run("full_mamba", 7, 0.4)]
    panels = ablation_panels(config, runs)
    assert [(title, [label for label, _, _ in curves]) for title, curves in panels] == [
        ("Architectures", ["full_mamba"]), ("Components", ["text_vision"]),
    ]  # fmt: skip
    assert panels[0][1][0][2] == ((0, 1.0), (60, 0.4))
    assert "| no_components" not in ablation_page(config, runs, "a CPU")


def test_the_curves_of_a_panel_have_different_colours(config: RunConfig) -> None:
    every = config.model_copy(update={"benchmark": config.benchmark.model_copy(update={"rows": tuple(ABLATIONS)})})
    for _, curves in ablation_panels(every, [_run(row, 7, 0.4) for row in rows_to_train(tuple(ABLATIONS))]):
        assert len({ON_WHITE[role] for _, role, _ in curves}) == len(curves)
    assert set(ON_WHITE) == set(ROLES)
