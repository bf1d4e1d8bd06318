"""A record parsed by its headers is what tarfile makes of it; damage is named."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.cache_manifest import FORMAT_VERSION, NULL_PROMPT, shard_path
from data_pipeline.cache_record import CorruptRecordError
from data_pipeline.cache_writer import CacheShardWriter, write_manifest
from data_pipeline.latent_cache import LatentCache
from data_pipeline.manifest import RecordPlace
from data_pipeline.record_bytes import RecordBytes, members_by_tarfile, members_of, new_buffer
from m4v_dist import storage
from m4v_dist.batch import TextFeatures
from tests.data_pipeline.made_cache import MadeSource, made_row

KEYS = ["a", "k" * 60, "folder/" + "k" * 50, "k" * 90, "folder/" + "k" * 120, "schön"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    folder = str(tmp_path_factory.mktemp("cache"))
    writer = CacheShardWriter(folder, "vid")
    generator = torch.Generator().manual_seed(1)
    for number, key in enumerate(KEYS):
        latents = torch.randn((4, 3, 5 + number, 3), generator=generator).bfloat16()
        texts = [
            TextFeatures(torch.randn((count, 5), generator=generator), torch.randn(7, generator=generator))
            for count in (3, 4 + number)
        ]
        row = replace(
            made_row(MadeSource("vid", "video", 9, 3), number), key=key, captions=("one", "two"),
            caption_weights=(1.0, 2.0), num_text_tokens=(3, 4 + number),
        )  # fmt: skip
        writer.add(row, latents, texts)
    writer.commit({})
    manifest = {
        "format_version": FORMAT_VERSION, "fingerprint": {}, "spatial_stride": 8, "null_prompt": NULL_PROMPT,
        "fragments": ["vid"], "sources": {"vid": {"media": "video"}},
    }  # fmt: skip
    write_manifest(folder, manifest, TextFeatures(torch.zeros(2, 5), torch.zeros(7)))
    return LatentCache.open(folder)


def read(cache: LatentCache, place: RecordPlace) -> torch.Tensor:
    data = new_buffer(place.size_bytes)
    storage.read_into(shard_path(cache.path, place.shard), place.offset_bytes, data.numpy().data)
    return data


@pytest.mark.parametrize("record", range(len(KEYS)))
def test_a_record_by_its_headers_is_what_tarfile_makes_of_it(cache: LatentCache, record: int) -> None:
    place = cache.table("vid").place(record)
    data = read(cache, place)
    fast, slow = members_of(data), members_by_tarfile(data)
    assert fast.keys() == slow.keys() and len(fast) == 3
    assert all(torch.equal(fast[name], slow[name]) for name in slow)
    found = RecordBytes(data, place)
    for caption in (0, 1):
        expected, text = cache.read(cache.rows("vid")[record], caption), found.text(caption)
        assert torch.equal(found.latents, expected.latents) and found.latents.dtype == torch.bfloat16
        assert torch.equal(text.tokens, expected.text.tokens) and torch.equal(text.pooled, expected.text.pooled)


def test_tensors_are_views_of_what_was_read(cache: LatentCache) -> None:
    place = cache.table("vid").place(0)
    data = read(cache, place)
    found = RecordBytes(data, place)
    for tensor in (found.latents, found.text(1).tokens, found.text(1).pooled):
        assert tensor.untyped_storage().data_ptr() == data.untyped_storage().data_ptr()


def test_every_flipped_byte_is_found(cache: LatentCache) -> None:
    place = cache.table("vid").place(1)
    data = read(cache, place)
    for at in range(0, len(data), 37):
        data[at] ^= 4
        with pytest.raises(CorruptRecordError, match=f"vid/{place.key} in vid: checksum differs"):
            RecordBytes(data, place)
        data[at] ^= 4
    RecordBytes(data, place)


def test_a_caption_that_a_record_has_not_is_named(cache: LatentCache) -> None:
    place = cache.table("vid").place(0)
    with pytest.raises(CorruptRecordError, match=r"vid/a in vid: caption 2: KeyError.*tokens\.2"):
        RecordBytes(read(cache, place), place).text(2)


def test_a_file_that_is_cut_is_no_record(cache: LatentCache, tmp_path: Path) -> None:
    place = cache.table("vid").place(0)
    path = tmp_path / "cut"
    path.write_bytes(read(cache, place).numpy().tobytes()[:-1])
    with pytest.raises(EOFError, match=rf"asked for {place.size_bytes} bytes at offset 0, got {place.size_bytes - 1}"):
        storage.read_into(str(path), 0, new_buffer(place.size_bytes).numpy().data)
