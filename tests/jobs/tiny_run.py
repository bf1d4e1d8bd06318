"""A whole run in small: four made-up clips as raw shards, and a config that every verb reads."""

from pathlib import Path

from data_pipeline.captions import Caption
from data_pipeline.pack import RawClip, write_shards
from m4v_dist.frozen.video_file import encode_mp4
from tests.data_pipeline.made_cache import moving_blocks

FRAMES = 9

TOML = """
[run]
name = "tiny"
folder = "{folder}/run"
[[sources]]
name = "clips"
shards = "{folder}/shards/clips-000.tar"
media = "video"
licence = "made up"
[[sources]]
name = "unseen"
shards = "{folder}/shards/unseen-000.tar"
media = "video"
licence = "made up"
split = "held_out"
[precompute]
cache = "{folder}/cache"
num_frames = 9
fps = 8.0
buckets = [{{height_px = 64, width_px = 64}}]
[model]
preset = "tiny"
num_double_blocks = 1
num_single_blocks = 1
[[curriculum]]
name = "video"
num_steps = 2
num_latents = 2
weights = {{clips = 1.0}}
buckets = [{{height_px = 64, width_px = 64}}]
micro_batch_slots = 2
[trainer]
global_batch_slots = 2
sync_group = 2
held_out_slots = 2
checkpoint_every_steps = 1
ema_decay = 0.9
[launch]
num_workers = 1
max_failures = 0
[logging]
wandb = "disabled"
[sampling]
prompts = ["moving blocks"]
num_latents = 2
height_px = 64
width_px = 64
fps = 8.0
first_unit_steps = [1, 1, 1]
later_unit_steps = [1, 1, 1]
"""


def write_tiny_run(folder: Path, num_training_clips: int = 3) -> str:
    """Pack the clips (one more is held out) and write the config; return its path."""
    clips = [
        RawClip(
            f"c{n}", "mp4", encode_mp4(moving_blocks(n, 2 * FRAMES), 16.0), (Caption(f"blocks that move, number {n}"),)
        )
        for n in range(num_training_clips + 1)
    ]
    write_shards(clips[:-1], f"{folder}/shards/clips-%03d.tar", len(clips))
    write_shards(clips[-1:], f"{folder}/shards/unseen-%03d.tar", len(clips))
    path = folder / "tiny.toml"
    path.write_text(TOML.format(folder=folder))
    return str(path)
