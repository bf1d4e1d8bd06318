"""The same precompute and loader with shards and cache in an object store (a local moto server)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline import pipeline
from data_pipeline.latent_cache import CorruptRecordError, LatentCache
from data_pipeline.pack import RawClip, write_shards
from data_pipeline.pipeline import ShardActor, run_precompute
from data_pipeline.precompute_plan import PrecomputePlan, ShardOutcome, ShardTask
from m4v_dist import storage
from m4v_dist.config.schema import (
    BucketSettings,
    CodecSettings,
    PrecomputeSettings,
    SourceSettings,
    TextEncoderSettings,
)
from m4v_dist.errors import DataError
from m4v_dist.frozen.video_file import encode_mp4
from tests.data_pipeline.made_cache import moving_blocks


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    # Here, not above: a GPU host that runs the gpu tests alone has no moto to collect this file with.
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "an-access-key-id",
        "AWS_SECRET_ACCESS_KEY": "a-secret-access-key",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    filesystem = storage._s3()
    filesystem.clear_instance_cache()
    storage._s3().mkdir("videos")
    yield "s3://videos"
    storage._s3().clear_instance_cache()
    server.stop()


@pytest.mark.slow
def test_shards_and_cache_live_in_an_object_store(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clips = [RawClip(f"c{n}", "mp4", encode_mp4(moving_blocks(n, 18), 12.0), f"blocks {n}") for n in range(3)]
    write_shards([*clips, RawClip("bad", "mp4", b"junk", "junk")], f"{bucket}/raw/clips-%03d.tar", 2)

    def make_plan(pattern: str, cache: str) -> PrecomputePlan:
        source = SourceSettings(name="clips", shards=f"{bucket}/raw/{pattern}", media="video", licence="none")
        precompute = PrecomputeSettings(
            cache=cache, buckets=(BucketSettings(height_px=64, width_px=64),), num_frames=17, max_bad_fraction=0.3
        )
        return PrecomputePlan((source,), precompute, CodecSettings(), TextEncoderSettings())

    def run_tasks(plan: PrecomputePlan, pending: list[ShardTask]) -> dict[str, ShardOutcome]:
        actor = ShardActor(plan)
        try:
            return {task.name: actor.run(task) for task in pending}
        finally:
            actor._pool.close()

    monkeypatch.setattr(pipeline, "_run_on_ray", run_tasks)
    with pytest.raises(DataError, match="clips-002.tar"):
        run_precompute(make_plan("clips-{000..002}.tar", f"{bucket}/cache"), lambda: None)
    plan = make_plan("clips-{000..001}.tar", f"{bucket}/cache")
    assert run_precompute(plan, lambda: None).report["kept"] == 3
    assert run_precompute(plan, lambda: None).did_nothing
    run_precompute(make_plan("clips-{000..001}.tar", f"{tmp_path}/cache"), lambda: None)
    remote, local = LatentCache.open(f"{bucket}/cache"), LatentCache.open(f"{tmp_path}/cache")
    assert remote.rows("clips") == local.rows("clips") and len(remote.rows("clips")) == 3
    for row in remote.rows("clips"):
        assert remote.read(row).latents.equal(local.read(row).latents)
    row = remote.rows("clips")[0]
    path = f"{bucket}/cache/shards/{row.shard}.tar"
    storage.write_bytes(path, storage.read_bytes(path)[: row.size_bytes // 2])
    with pytest.raises(CorruptRecordError, match="c0"):
        remote.read(row)
    storage.remove(path)
    with pytest.raises(CorruptRecordError, match="c0"):
        remote.read(row)
