"""The values of a small run, for tests to break."""

from typing import Any


def run_values() -> dict[str, Any]:
    """A small valid run."""
    return {
        "run": {"name": "test", "folder": "runs/test"},
        "sources": [
            {"name": "clips", "shards": "a-{0..1}.tar", "media": "video", "licence": "MIT"},
            {"name": "unseen", "shards": "b.tar", "media": "video", "licence": "MIT", "split": "held_out"},
        ],
        "precompute": {"cache": "cache", "buckets": [{"height_px": 64, "width_px": 64}], "num_frames": 17},
        "model": {"preset": "tiny"},
        "curriculum": [
            {
                "name": "video",
                "num_steps": 10,
                "num_latents": 3,
                "buckets": [{"height_px": 64, "width_px": 64}],
                "weights": {"clips": 1.0},
            }
        ],
        "launch": {"num_workers": 2},
    }
