"""A few training steps on a GPU, from a cache made here: NCCL, bfloat16 matmuls, ZeRO 2 and 3, save and resume."""

import math
import os
import shutil
from pathlib import Path

import pytest

from m4v_dist.config.load import config_to_json, parse_config
from tests.integration.small_run import make_small_cache, small_values
from tests.integration.test_resume import TOTAL, _train, rows
from tests.trainer.ranks import run_fresh_ranks, run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def _config(folder: str, cache: str, *, use_gpu: bool, zero_stage: int) -> str:
    values = small_values(folder, cache, zero_stage=zero_stage, precision="bfloat16" if use_gpu else "float32")
    values["launch"] = {"num_workers": 1, "use_gpu": use_gpu}
    return config_to_json(parse_config(values, where="test"))


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_gpu_run_follows_the_cpu_run_and_resumes(tmp_path: Path, zero_stage: int) -> None:
    cache = make_small_cache(str(tmp_path / "cache"))
    cpu, gpu = str(tmp_path / "cpu"), str(tmp_path / "gpu")
    environment = {**os.environ, "DS_ACCELERATOR": "cuda"}
    run_ranks(_train, 1, [_config(cpu, cache, use_gpu=False, zero_stage=zero_stage)])
    config = [_config(gpu, cache, use_gpu=True, zero_stage=zero_stage)]
    assert run_fresh_ranks(_train, 1, config, environment=environment) == [[TOTAL]]
    shutil.rmtree(f"{gpu}/checkpoints/step_{TOTAL:08d}")
    assert run_fresh_ranks(_train, 1, config, environment=environment) == [[TOTAL]]
    losses = {folder: {row["step"]: row["train/loss"] for row in rows(folder, "train")} for folder in (cpu, gpu)}
    assert sorted(losses[gpu]) == list(range(TOTAL))
    assert all(math.isfinite(loss) for loss in losses[gpu].values())
    # the same weights and draws: bfloat16 matmuls keep 8 bits
    assert losses[gpu][0] == pytest.approx(losses[cpu][0], rel=3e-2)
    redone = [row for row in rows(gpu, "train") if row["attempt"] == 2]
    assert redone[0]["step"] == 6
    first = next(row for row in rows(gpu, "train") if row["step"] == 6 and row["attempt"] == 1)
    assert redone[0]["train/loss"] == pytest.approx(first["train/loss"], rel=1e-2)
