"""A disk that is full wherever a precompute writes: a clear error, nothing half-written is read, a rerun finishes."""

import errno
import os
from pathlib import Path

import pytest

from data_pipeline.captions import Caption
from data_pipeline.latent_cache import LatentCache
from data_pipeline.pack import RawClip, write_shards
from m4v_dist import durable
from m4v_dist.errors import DataError, JobError
from m4v_dist.frozen.video_file import encode_mp4
from tests.data_pipeline.copied_shards import CopiedShards, files_of
from tests.data_pipeline.made_cache import moving_blocks
from tests.data_pipeline.run_here import run_here


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> CopiedShards:
    shards = CopiedShards(tmp_path_factory.mktemp("shards"), num_shards=2)
    shards.write()
    return shards


@pytest.fixture(scope="module")
def undisturbed(shards: CopiedShards) -> dict[str, bytes]:
    return shards.undisturbed()


@pytest.mark.parametrize(
    "where",
    [
        "leases/lease_0001.json.tmp",
        "attempts/clips-001",
        "shards/clips-001.tar",
        "index/clips-001.parquet",
        "report.json",
        "quarantine.txt",
        "null_prompt.safetensors",
        "manifest.json",
    ],
)
def test_a_full_disk_ends_the_job_and_a_rerun_finishes(
    shards: CopiedShards, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    cache = tmp_path / "cache"
    rename = durable.rename

    def full(source: str, path: str) -> None:
        if f"{cache}/{where}" in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        rename(source, path)

    with monkeypatch.context() as patched:
        patched.setattr(durable, "rename", full)
        with pytest.raises(JobError, match=f"(?s)No space left on device.*{where}|{where}.*No space left") as caught:
            run_here(shards.plan(str(cache)))
    assert caught.value.exit_code == 3
    with pytest.raises(DataError, match="no finished latent cache"):
        LatentCache.open(str(cache))
    run_here(shards.plan(str(cache)))
    assert files_of(cache) == undisturbed


def test_a_finished_cache_is_unfinished_while_a_shard_of_it_is_done_anew_and_not_while_some_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = CopiedShards(tmp_path, num_shards=1)
    two = CopiedShards(tmp_path, num_shards=2)
    two.write()
    cache = str(tmp_path / "cache")
    run_here(one.plan(cache))

    rename = durable.rename

    def full(source: str, path: str) -> None:
        if "/index/" in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        rename(source, path)

    def fails(shards: CopiedShards) -> None:
        with monkeypatch.context() as patched, pytest.raises(JobError):
            patched.setattr(durable, "rename", full)
            run_here(shards.plan(cache))

    fails(two)
    assert len(LatentCache.open(cache).rows("clips")) == 1
    # another clip in the shard that stands: its tar is replaced before its index
    other = RawClip("sound000", "mp4", encode_mp4(moving_blocks(5, 18), 12.0), (Caption("x"),))
    write_shards([other], f"{tmp_path}/raw/%03d.tar", 2)
    fails(one)
    with pytest.raises(DataError, match="no finished latent cache"):
        LatentCache.open(cache)
    run_here(two.plan(cache))
    assert [row.captions for row in LatentCache.open(cache).rows("clips")] == [("x",), ("blocks",)]
