"""Each rank's numbers arrive unchanged, and MFU and spread are what they say."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from m4v_dist.batch import LatentBatch
from m4v_dist.config.gpus import peak_of
from m4v_dist.trainer.measured import Measured, StepMeter, gpu_peak_tflops, spread_row, utilization_row
from tests.trainer.ranks import run_ranks
from tests.trainer.test_trainer import _trainer, rows
from tests.trainer.toy import ToyOutput, ToyStepBatch, toy_batch, toy_objective

TWO = (Measured(0.1, 2.0, 0.0, 1.5, 3e12, 4e12), Measured(0.4, 1.0, 0.0, 1.25, 5e12, 6e12))


def test_the_sum_over_ranks_is_each_rank_s_own_numbers_to_the_last_bit() -> None:
    odd = (Measured(0.1 + 0.2, 1 / 3, 5e-324, 1e300, 3e18 + 512, 0.0), *TWO)
    total = sum((measured.placed(rank, 3) for rank, measured in enumerate(odd)), start=torch.zeros(18).double())
    assert Measured.of_sum(total.tolist()) == odd
    assert Measured.of_sum([]) == ()


def test_the_spread_is_of_own_work_and_gpu_memory_is_absent_without_a_gpu() -> None:
    row = spread_row(TWO)
    assert (row["timing/step_s_max"], row["timing/step_s_min"], row["timing/data_s_max"]) == (2.0, 1.0, 0.4)
    assert row["memory/host_rss_gib"] == 1.5 and "memory/max_reserved_gib" not in row
    assert spread_row([TWO[0]._replace(reserved_gib=7.0), TWO[1]])["memory/max_reserved_gib"] == 7.0


def test_mfu_is_needed_flops_over_the_peak_of_all_gpus_and_hfu_counts_what_was_computed() -> None:
    # 8 TFLOPs needed, 10 computed, in half a second on two GPUs of 20 TFLOP/s
    row = utilization_row(TWO, seconds=0.5, peak_tflops=20.0)
    assert row == {"perf/mfu": pytest.approx(0.4), "perf/hfu": pytest.approx(0.5)}
    assert utilization_row(TWO, seconds=0.5, peak_tflops=None) == {}
    uncounted = [measured._replace(model_flops=0.0, hardware_flops=0.0) for measured in TWO]
    assert utilization_row(uncounted, seconds=0.5, peak_tflops=20.0) == {}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H20", 148.0),
        ("Tesla T4", None),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_a_gpu_s_peak_is_found_by_its_name_and_never_guessed(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak


def test_a_cpu_has_no_peak_whatever_is_given() -> None:
    assert gpu_peak_tflops(torch.device("cpu"), 312.0) is None


def test_the_meter_counts_each_micro_batch_under_the_stage_s_freeze_set() -> None:
    seen: list[tuple[int, tuple[str, ...]]] = []

    def flops(batch: LatentBatch, freeze: tuple[str, ...]) -> tuple[float, float]:
        seen.append((len(batch.slots), freeze))
        return 10.0 * len(batch.slots), 12.0 * len(batch.slots)

    meter = StepMeter(torch.device("cpu"), flops)
    meter.begin()
    meter.end()
    batch = ToyStepBatch(0, (toy_batch(0, [0, 1], 12), toy_batch(0, [2], 12)))
    measured = meter.measured(batch, ("double_blocks",), data_s=0.25)
    assert seen == [(2, ("double_blocks",)), (1, ("double_blocks",))]
    assert (measured.model_flops, measured.hardware_flops, measured.data_s) == (30.0, 36.0, 0.25)
    assert 0 <= measured.work_s < 1 and measured.host_rss_gib > 0.01 and measured.reserved_gib == 0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_that_share_a_sequence_count_their_part_of_it(size: int) -> None:
    meter = StepMeter(torch.device("cpu"), lambda batch, _: (10.0 * len(batch.slots), 12.0 * len(batch.slots)), size)
    meter.begin()
    meter.end()
    parts = [meter.measured(ToyStepBatch(0, (toy_batch(0, [0, 1, 2], 12),)), (), data_s=0.0) for _ in range(size)]
    assert sum(part.model_flops for part in parts) == 30.0 and sum(part.hardware_flops for part in parts) == 36.0


def _slow_rank_job(folder: str) -> None:
    """Rank 1 takes a fifth of a second longer for each of its two micro-batches in step 3."""
    import time

    trainer = _trainer(folder)

    def objective(model: Any, batch: Any) -> ToyOutput:
        if batch.slots[0].step == 3 and trainer.mesh.rank == 1:
            time.sleep(0.2)
        return toy_objective(model, batch)

    trainer.objective = objective
    trainer.run()


def test_a_slow_rank_shows_in_the_spread_though_rank_0_writes_the_rows(tmp_path: Path) -> None:
    run_ranks(_slow_rank_job, 2, str(tmp_path))
    found = {row["step"]: row for row in rows(str(tmp_path), "train")}
    assert found[3]["timing/step_s_max"] >= 0.4 and found[3]["timing/step_s_min"] < found[3]["timing/step_s_max"] - 0.2
    for row in found.values():
        assert 0 < row["timing/step_s_min"] <= row["timing/step_s_max"] and row["memory/host_rss_gib"] > 0.05
        # no GPU, and no counting: nothing is made up
        assert not {"perf/mfu", "perf/hfu", "memory/max_reserved_gib"} & row.keys()
        assert math.isfinite(row["timing/data_s_max"])
