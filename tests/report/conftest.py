"""A run folder as the jobs leave it, with made-up numbers: enough for every part of the page."""

import base64
import json
import math
from pathlib import Path
from typing import Any

import pytest

TINY_MP4 = base64.b64decode("AAAAHGZ0eXBpc29tAAACAGlzb21pc28ybXA0MQ==")
"""Only an mp4 header: the page embeds bytes and does not decode them."""


def train_row(attempt: int, step: int) -> dict[str, Any]:
    """A train row whose numbers depend on the step alone, as a redone step's must."""
    stage = "image" if step < 40 else "video"
    loss = 0.4 + 0.9 * math.exp(-step / 40) + 0.08 * math.sin(37.0 * step)
    return {
        "attempt": attempt,
        "step": step,
        "kind": "train",
        "curriculum_stage": stage,
        "train/loss": loss,
        "train/grad_norm": 1.0 / (1 + step),
        "train/loss_pyramid_stage_0": loss * 0.7,
        "train/loss_pyramid_stage_1": loss * 0.9,
        "train/loss_pyramid_stage_2": loss * 1.3,
        "data/stills/samples_seen": 12 * min(step + 1, 40) + 3 * max(0, step - 39),
        "data/clips/samples_seen": 9 * max(0, step - 39),
        "timing/step_s_max": 0.5 + 0.01 * (step % 3),
        "timing/step_s_min": 0.4,
        "timing/data_s_max": 0.01,
        "memory/host_rss_gib": 1.5 + 0.001 * step,
    }


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_run_folder(run: Path) -> Path:
    """Write a run that was killed after step 67 and came back at step 60; it has no fault_check.json."""
    rows = [train_row(1, step) for step in range(68)] + [train_row(2, step) for step in range(60, 100)]
    rows += [
        {"attempt": 1, "step": s, "kind": "held_out", "validation/held_out_loss": 1.5 * math.exp(-s / 60) + 0.3}
        for s in (0, 20, 40, 60, 80, 100)
    ]
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(
        run / "ledger.json",
        {
            "step_s": 48.0,
            "data_s": 1.5,
            "checkpoint_s": 4.0,
            "validation_s": 3.0,
            "restart_s": 12.0,
            "lost_s": 3.5,
            "build_s": 6.25,
            "other_s": 1.75,
            "goodput": 0.6,
        },
    )
    write(
        run / "cache" / "report.json",
        {
            "kept": 66,
            "filtered": {"too_short": 1},
            "quarantined": [
                {"key": "broken", "shard": "clips-000000.tar", "source": "clips", "error": "moov <atom> not found"}
            ],
            "damaged_shards": [],
            "clips_per_s": 3.2,
            "num_clips": 68,
            "per_source": {"clips": {"kept": 30, "quarantined": 1, "too_short": 1}, "stills": {"kept": 36}},
        },
    )
    prompts = ["A <b>bold</b> fox & friends", "A white paper plane"]
    write(
        run / "samples" / "samples.json",
        [
            {"prompt": p, "file": f"0{i}.mp4", "checkpoint": "step_00000100", "seconds": 8.0, "seed": 0}
            for i, p in enumerate(prompts)
        ],
    )
    size = {"height_px": 128, "width_px": 128}
    clip = {"key": "a", "source": "clips", "caption": "A fox", "psnr_first_db": 30.1, "psnr_later_db": None, **size}
    write(
        run / "codec" / "codec.json",
        {
            "codec": "pca",
            "mean_psnr": [
                {"split": "train", **size, "first_db": 30.1, "later_db": None, "num_clips": 1},
                {
                    "split": "train",
                    "height_px": 64,
                    "width_px": 192,
                    "first_db": 28.5,
                    "later_db": 22.5,
                    "num_clips": 3,
                },
                {"split": "held_out", **dict.fromkeys(size), "first_db": None, "later_db": None, "num_clips": 0},
            ],
            "clips": [{**clip, "file": "00.mp4"}],
        },
    )
    for video in ("samples/00.mp4", "samples/01.mp4", "codec/00.mp4"):
        (run / video).write_bytes(TINY_MP4)
    write(run / "kill.json", {"attempt": 1, "rank": 1, "pid": 4242, "step": 67, "checkpoint_step": 60})
    write(run / "commands.json", [{"command": "python -m jobs.train --config x.toml", "exit_code": 0, "seconds": 65.0}])
    return run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder of one's own, to change."""
    return make_run_folder(tmp_path / "run")
