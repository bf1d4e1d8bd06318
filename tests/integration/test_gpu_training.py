"""Training on a GPU host: against the same run on the CPU, and from a carried cache through `python -m jobs.train`.

The first makes its cache here. The second needs no package index and no text encoder on the host, but a cache:

make demo                                                      # here: makes runs/demo/cache
make test-gpu PYTHON=python3 SKIP_INSTALL=1                    # there, with runs/demo/cache carried along
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from m4v_dist.config.load import config_to_json, parse_config
from tests.integration.small_run import TOTAL_STEPS, make_small_cache, rows, small_values, train_each
from tests.trainer.ranks import ROOT, run_fresh_ranks, run_ranks

CACHE = Path(os.environ.get("M4V_TEST_CACHE", ROOT / "runs" / "demo" / "cache"))

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def _config(folder: str, cache: str, *, use_gpu: bool, zero_stage: int) -> str:
    values = small_values(folder, cache, zero_stage=zero_stage, precision="bfloat16" if use_gpu else "float32")
    values["launch"] = {"num_workers": 1, "use_gpu": use_gpu, "gpu_peak_tflops": 1000.0}
    values["trainer"]["profile"] = {"start_step": 4, "num_steps": 1}
    return config_to_json(parse_config(values, where="test"))


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_gpu_run_follows_the_cpu_run_and_resumes(tmp_path: Path, zero_stage: int) -> None:
    cache = make_small_cache(str(tmp_path / "cache"))
    cpu, gpu = str(tmp_path / "cpu"), str(tmp_path / "gpu")
    environment = {**os.environ, "DS_ACCELERATOR": "cuda"}
    run_ranks(train_each, 1, [_config(cpu, cache, use_gpu=False, zero_stage=zero_stage)])
    config = [_config(gpu, cache, use_gpu=True, zero_stage=zero_stage)]
    assert run_fresh_ranks(train_each, 1, config, environment=environment) == [[TOTAL_STEPS]]
    shutil.rmtree(f"{gpu}/checkpoints/step_{TOTAL_STEPS:08d}")
    assert run_fresh_ranks(train_each, 1, config, environment=environment) == [[TOTAL_STEPS]]
    losses = {folder: {row["step"]: row["train/loss"] for row in rows(folder, "train")} for folder in (cpu, gpu)}
    assert sorted(losses[gpu]) == list(range(TOTAL_STEPS))
    assert all(math.isfinite(loss) for loss in losses[gpu].values())
    # the same weights and draws: bfloat16 matmuls keep 8 bits
    assert losses[gpu][0] == pytest.approx(losses[cpu][0], rel=3e-2)
    for row in rows(gpu, "train"):
        # tiny kernels that wait for Python: a share of the peak that is far from it
        assert 0 < row["perf/mfu"] <= row["perf/hfu"] < 1 and row["memory/max_reserved_gib"] > 0
        assert 0 < row["timing/step_s_min"] == row["timing/step_s_max"] < row["timing/step_s"]
    names = sorted(path.name for path in Path(gpu, "profile").iterdir())
    assert names == ["rank_00000_steps_4_to_4.json", "rank_00000_steps_4_to_4_memory.pickle"]
    assert '"cat": "kernel"' in Path(gpu, "profile", names[0]).read_text()
    redone = [row for row in rows(gpu, "train") if row["attempt"] == 2]
    assert redone[0]["step"] == 6
    first = next(row for row in rows(gpu, "train") if row["step"] == 6 and row["attempt"] == 1)
    assert redone[0]["train/loss"] == pytest.approx(first["train/loss"], rel=1e-2)


@pytest.mark.ray
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_gpu_host_trains_a_few_steps_from_a_carried_cache(tmp_path: Path, zero_stage: int) -> None:
    assert (CACHE / "manifest.json").exists(), f"no cache at {CACHE}: carry one, or name it in M4V_TEST_CACHE"
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "jobs.train", "--config", "jobs/configs/demo.toml",
        f"run.folder={run}", f"precompute.cache={CACHE}", "launch.num_workers=1", "launch.use_gpu=true",
        f"trainer.zero_stage={zero_stage}", "trainer.precision=bfloat16", "logging.wandb=disabled",
        "curriculum.0.num_steps=4", "curriculum.1.num_steps=8", "trainer.checkpoint_every_steps=6",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if row["kind"] == "train"]
    held_out = [row["validation/held_out_loss"] for row in rows if row["kind"] == "held_out"]
    print(f"\nZeRO-{zero_stage}: training loss {losses[0]:.4f} .. {losses[-1]:.4f}")
    print(f"ZeRO-{zero_stage}: held-out loss {held_out[0]:.4f} .. {held_out[-1]:.4f}")
    assert len(losses) == 12
    assert held_out[-1] < held_out[0]
    assert (run / "checkpoints" / "step_00000012" / "COMMITTED").exists()
