"""The stated bound of an actor's memory, against what a process took for a shard many times as large."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.actor_memory import actor_memory
from data_pipeline.captions import Caption
from data_pipeline.pack import RawClip, write_shards
from m4v_dist.frozen.video_file import encode_mp4
from tests.data_pipeline.copied_shards import CopiedShards
from tests.data_pipeline.made_cache import moving_blocks
from tests.trainer.ranks import ROOT

PADDING_BYTES = 2 * 2**20
NUM_CLIPS = 80
SLACK_BYTES = 24 * 2**20
"""What the allocator keeps, twice what was seen: it does not grow with the shard."""

PROGRAM = """
import json, os, sys, threading
from dataclasses import asdict
from pathlib import Path
from data_pipeline.precompute_plan import PrecomputePlan, plan_tasks
from data_pipeline.shard_actor import ShardActor
from m4v_dist.config.load import parse_config
config = parse_config(json.loads(sys.stdin.read()), where="test")
plan = PrecomputePlan(config.sources, config.precompute, config.codec, config.text_encoder)

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def watch():
    global most
    while not is_over.wait(0.005):
        most = max(most, resident())

actor, most, is_over = ShardActor(plan), 0, threading.Event()
thread = threading.Thread(target=watch)
for number, task in enumerate(plan_tasks(plan, {})):
    if number == 1:
        before = most = resident()
        thread.start()
    assert actor({"task": [json.dumps(asdict(task))]})["error"] == [""]
is_over.set()
thread.join()
actor.close()
print(before, most)
"""


def _padded(seed: int) -> bytes:
    """A short clip whose file is large: an mp4 may end in a box of free space."""
    box = (PADDING_BYTES + 8).to_bytes(4, "big") + b"free" + bytes(PADDING_BYTES)
    return encode_mp4(moving_blocks(seed, 18), 12.0) + box


def test_the_bound_is_made_of_media_frames_and_encoder(tmp_path: Path) -> None:
    plan = CopiedShards(tmp_path, 1).plan(str(tmp_path), media_mib_in_flight=8, decode_processes=2)
    found, frames = actor_memory(plan, 3 * 2**20), 17 * 64 * 64 * 3
    assert (found.media, found.frames, found.encoder) == (2 * 17 * 2**20, 5 * frames, 4 * frames)
    assert found.children == 2 * (3 * 2**20 + 2 * frames)
    # a file larger than all that may be in flight goes alone, and is the bound
    assert actor_memory(plan, 100 * 2**20).media == 2 * 400 * 2**20


@pytest.mark.slow
def test_a_shard_many_times_the_bound_is_streamed(tmp_path: Path) -> None:
    shards = CopiedShards(tmp_path, num_shards=2)
    data = _padded(0)
    for number, count in enumerate((3, NUM_CLIPS)):
        (path,) = write_shards(
            (RawClip(f"{number}-{n}", "mp4", data, (Caption("x"),)) for n in range(count)),
            f"{tmp_path}/one-%d.tar",
            999,
        )
        (tmp_path / "raw").mkdir(exist_ok=True)
        Path(path).rename(tmp_path / "raw" / f"{number:03d}.tar")
    changes = {"media_mib_in_flight": 8, "decode_processes": 1}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(shards.values(str(tmp_path / "cache"), **changes)),
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    before, largest = map(int, process.stdout.split())
    bound = actor_memory(shards.plan(str(tmp_path / "cache"), **changes), len(data), num_calls=1)
    shard_bytes = NUM_CLIPS * len(data)
    most = bound.media + bound.frames + bound.encoder
    assert shard_bytes > 4 * (most + SLACK_BYTES)
    assert largest - before <= most + SLACK_BYTES, (largest - before, shard_bytes, most)
    print(f"grew by {(largest - before) / 2**20:.1f} MiB of {most / 2**20:.1f} for {shard_bytes / 2**20:.0f}")
