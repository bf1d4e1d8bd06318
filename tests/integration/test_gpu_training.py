"""A host with a GPU and its own torch trains from a carried cache, with no package index and no text encoder.

make demo                                                      # here: makes runs/demo/cache
make test-gpu PYTHON=python3 SKIP_INSTALL=1                    # there, with runs/demo/cache carried along
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("M4V_TEST_CACHE", ROOT / "runs" / "demo" / "cache"))


@pytest.mark.gpu
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
