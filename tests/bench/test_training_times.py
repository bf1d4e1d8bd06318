"""Which runs are timed, and what is said of their rows."""

from typing import Any

import pytest

from m4v_dist.bench.training_times import Case, TrainingTimes, case_config, times_of_rows, times_page, training_cases
from m4v_dist.config.load import parse_config
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError
from tests.integration.small_run import small_values


def _config(**benchmark: Any) -> RunConfig:
    values = small_values("run", "cache")
    values["benchmark"] = {"num_warm_up_steps": 2, "num_steps": 3, **benchmark}
    return parse_config(values, where="test")


def _row(step: int, *, seconds: float, tokens: float) -> dict[str, Any]:
    """Of one GPU with a peak of 1000 tokens a second."""
    rate = tokens / seconds
    return {"kind": "train", "step": step, "time": 100.0 + step, "timing/step_s": 0.75 * seconds,
            "timing/data_s": 0.25 * seconds, "perf/tokens_per_sec_per_gpu": rate, "perf/mfu": rate / 1000,
            "perf/hfu": rate / 500, "memory/max_reserved_gib": 2.0 + step}  # fmt: skip


def test_every_stage_is_timed_at_every_zero_stage_and_number_of_workers() -> None:
    cases = training_cases(_config(worker_counts=[1, 2], zero_stages=[2, 3], curriculum_stages=["video"]))
    assert cases == tuple(Case("video", zero, workers) for workers in (1, 2) for zero in (2, 3))
    assert [case.curriculum_stage for case in training_cases(_config())] == ["image"] * 3 + ["video"] * 3
    assert len({case.name for case in cases}) == 4


def test_an_unknown_stage_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="curriculum_stages names vidoe, but the curriculum has image, video"):
        training_cases(_config(curriculum_stages=["vidoe"]))


def test_slots_that_do_not_part_evenly_over_the_workers_are_refused() -> None:
    values = small_values("run", "cache")
    values["launch"]["num_workers"] = 5
    with pytest.raises(ConfigError, match="global_batch_slots=12 must be a multiple of launch.num_workers=5"):
        training_cases(parse_config(values, where="test"))


def test_each_worker_has_as_many_slots_whatever_their_number() -> None:
    config = _config(worker_counts=[1, 2, 4])
    runs = [case_config(config, Case("video", 3, workers)) for workers in (1, 2, 4)]
    assert [run.trainer.global_batch_slots for run in runs] == [6, 12, 24]
    assert [run.launch.num_workers for run in runs] == [1, 2, 4]
    assert {run.trainer.zero_stage for run in runs} == {3}
    assert {tuple(stage.name for stage in run.curriculum) for run in runs} == {("video",)}


def test_rates_are_sums_over_the_timed_steps_and_not_means_of_rates() -> None:
    rows = [_row(0, seconds=90, tokens=9), _row(1, seconds=90, tokens=9)]
    rows += [_row(2, seconds=1, tokens=100), _row(3, seconds=4, tokens=800), _row(4, seconds=5, tokens=100)]
    times = times_of_rows(_config(), Case("video", 2, 1), rows, allocated_gib=1.0, planned_gib=1.5)
    assert times.tokens_a_second == pytest.approx(1000 / 10)
    assert (times.mfu, times.hfu) == (pytest.approx(0.1), pytest.approx(0.2))
    assert (times.step_s, times.reserved_gib) == (pytest.approx(4), 6.0)
    assert times.stall_s is None


def test_steps_beside_the_writing_of_a_save_are_set_against_those_alone() -> None:
    rows = [_row(step, seconds=1, tokens=100) for step in range(2)]
    rows += [_row(2, seconds=3, tokens=200), _row(3, seconds=3, tokens=200)]
    rows.append({"kind": "checkpoint", "step": 2, "time": 103.5, "timing/checkpoint_stall_s": 6.0,
                 "timing/checkpoint_write_s": 7.0, "checkpoint/size_bytes": 2**31})  # fmt: skip
    rows += [_row(step, seconds=1, tokens=100) for step in range(4, 8)]
    times = times_of_rows(_config(), Case("video", 2, 1), rows, allocated_gib=None, planned_gib=1.5)
    assert (times.stall_s, times.write_s, times.saved_gib) == (6.0, 7.0, 2.0)
    # 400 tokens take 4 s alone, and took 6.
    assert (times.tokens_a_second, times.slowed_s) == (pytest.approx(100), pytest.approx(2))
    assert " 1.00 % |" in times_page(_config(), [times], "here")


def test_a_machine_without_a_known_peak_has_no_utilization() -> None:
    rows = [_row(step, seconds=1, tokens=100) for step in range(4)]
    for row in rows:
        del row["perf/mfu"], row["perf/hfu"], row["memory/max_reserved_gib"]
    times = times_of_rows(_config(), Case("video", 2, 1), rows, allocated_gib=None, planned_gib=1.5)
    assert (times.mfu, times.hfu, times.reserved_gib) == (None, None, None)


def test_scaling_is_against_the_fewest_workers_of_the_same_case() -> None:
    def times(zero_stage: int, workers: int, rate: float) -> TrainingTimes:
        return TrainingTimes(Case("video", zero_stage, workers), rate, 1.0, None, None, None, None, 1.0)

    page = times_page(_config(), [times(2, 1, 100), times(2, 2, 95), times(3, 1, 80), times(3, 2, 40)], "here")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| vid")]
    assert [(row[1], row[2], row[4]) for row in cells] == [
        ("2", "1", "-"), ("2", "2", "95.0 %"), ("3", "1", "-"), ("3", "2", "50.0 %"),
    ]  # fmt: skip
