"""The same precompute and loader with shards and cache in an object store (a local moto server)."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data_pipeline.cache_check import check_cache
from data_pipeline.cache_drop import drop_records, plan_drop
from data_pipeline.cache_manifest import index_path
from data_pipeline.cache_record import CorruptRecordError
from data_pipeline.cache_writer import CacheShardWriter
from data_pipeline.captions import Caption
from data_pipeline.latent_cache import LatentCache
from data_pipeline.media_list import list_media, read_annotations, read_media
from data_pipeline.pack import RawClip, read_shard, write_shards
from data_pipeline.precompute_plan import PrecomputePlan
from data_pipeline.record_list import RecordName
from m4v_dist import storage
from m4v_dist.batch import TextFeatures
from m4v_dist.config.data_settings import (
    BucketSettings,
    CodecSettings,
    PrecomputeSettings,
    SourceSettings,
    TextEncoderSettings,
)
from m4v_dist.errors import DataError
from m4v_dist.frozen.video_file import encode_mp4
from tests.data_pipeline.made_cache import MadeSource, made_row, make_cache, moving_blocks
from tests.data_pipeline.run_here import run_here
from tests.object_store_server import object_store


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with object_store(monkeypatch) as (bucket, _):
        yield bucket


@pytest.mark.slow
def test_shards_and_cache_live_in_an_object_store(bucket: str, tmp_path: Path) -> None:
    clips = [
        RawClip(f"c{n}", "mp4", encode_mp4(moving_blocks(n, 18), 12.0), (Caption(f"blocks {n}"),)) for n in range(3)
    ]
    write_shards([*clips, RawClip("bad", "mp4", b"junk", (Caption("junk"),))], f"{bucket}/raw/clips-%03d.tar", 2)

    def make_plan(pattern: str, cache: str) -> PrecomputePlan:
        source = SourceSettings(name="clips", shards=f"{bucket}/raw/{pattern}", media="video", licence="none")
        precompute = PrecomputeSettings(
            cache=cache, buckets=(BucketSettings(height_px=64, width_px=64),), num_frames=17, max_bad_fraction=0.3
        )
        return PrecomputePlan((source,), precompute, CodecSettings(), TextEncoderSettings())

    with pytest.raises(DataError, match="clips-002.tar"):
        run_here(make_plan("clips-{000..002}.tar", f"{bucket}/cache"))
    plan = make_plan("clips-{000..001}.tar", f"{bucket}/cache")
    assert run_here(plan).report["kept"] == 3
    assert run_here(plan).did_nothing
    run_here(make_plan("clips-{000..001}.tar", f"{tmp_path}/cache"))
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


def test_a_shard_that_an_object_store_spoils_is_not_committed(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = storage.put_file

    def spoil(local_path: str, path: str) -> None:
        place(local_path, path)
        data = bytearray(storage.read_bytes(path))
        data[1200] ^= 1
        storage.write_bytes(path, bytes(data))

    monkeypatch.setattr(storage, "put_file", spoil)
    writer = CacheShardWriter(f"{bucket}/spoilt", "vid")
    text = TextFeatures(torch.ones(3, 6), torch.ones(6))
    row = made_row(MadeSource("vid", "video", 1, 3), 0)
    writer.add(row, torch.ones(4, 3, 8, 8).bfloat16(), [text])
    with pytest.raises(OSError, match=rf"{bucket}/spoilt/shards/vid.tar: .*checksum"):
        writer.commit({})
    assert not storage.exists(index_path(f"{bucket}/spoilt", "vid"))


def test_a_remote_cache_is_checked_and_thinned_out_and_remote_media_are_packed(bucket: str) -> None:
    folder = make_cache(f"{bucket}/cache", [MadeSource("vid", "video", 4, 3)])
    report = check_cache(folder, 4, lambda: None)
    assert report.is_sound and report.num_records == 4 and report.unused == []
    drop_records(plan_drop(folder, [RecordName("vid", "vid002")]), "2026-01-02T03:04:05+00:00")
    assert [row.key for row in LatentCache.open(folder).rows("vid")] == ["vid000", "vid001", "vid003"]
    tar = f"{folder}/shards/vid.tar"
    storage.write_bytes(tar, storage.read_bytes(tar)[:-2048])
    report = check_cache(folder, 4, lambda: None)
    assert [str(record.name) for record in report.damaged] == [] and "no end mark" in report.problems[0]

    for name, data in {"a/x.mp4": b"1", "a/x.txt": b"one", "b/y.mp4": b"2", "b/y.json": b'{"caption": "two"}'}.items():
        storage.write_bytes(f"{bucket}/media/{name}", data)
    found = list_media(f"{bucket}/media", "video", 2)
    lines = b'{"video": "media/a/x.mp4", "text": "one"}\n{"video": "no.mp4", "text": "x"}\n'
    storage.write_bytes(f"{bucket}/list.jsonl", lines)
    listed = read_annotations(f"{bucket}/list.jsonl", None, "video")
    assert [entry.key for entry in listed.entries] == ["media/a/x"] and "no.mp4 is not there" in listed.errors[0]
    (shard,) = write_shards(read_media(found.entries, 2), f"{bucket}/packed/x-%03d.tar", 9)
    clips = [(clip.key, clip.data, clip.captions) for clip in read_shard(shard) if isinstance(clip, RawClip)]
    assert clips == [("a/x", b"1", (Caption("one"),)), ("b/y", b"2", (Caption("two"),))]
