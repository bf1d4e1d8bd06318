"""A run as `jobs.sample` sees it: a config whose videos take a second."""

from m4v_dist.config.load import parse_config
from m4v_dist.config.schema import RunConfig

BUCKET = {"height_px": 64, "width_px": 64}


def sample_config(folder: str, **sampling: object) -> RunConfig:
    """A tiny model and two prompts, sampled in few steps; its shards and cache are not there."""
    values = {
        "run": {"name": "t", "folder": folder},
        "sources": [{"name": "clips", "shards": "a.tar", "media": "video", "licence": "MIT"}],
        "precompute": {"cache": "c", "num_frames": 17, "buckets": [BUCKET]},
        "model": {"preset": "tiny", "num_double_blocks": 1, "num_single_blocks": 1},
        "curriculum": [
            {"name": "v", "num_steps": 5, "num_latents": 2, "weights": {"clips": 1.0}, "buckets": [BUCKET]},
        ],
        "sampling": {
            "prompts": ["a fox", "a plane"],
            "num_latents": 2,
            **BUCKET,
            "fps": 8.0,
            "first_unit_steps": [2, 1, 1],
            "later_unit_steps": [1, 1, 1],
            **sampling,
        },
    }
    return parse_config(values, where="test")
