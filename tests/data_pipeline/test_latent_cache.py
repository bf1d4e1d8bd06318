"""The cache's format: WebDataset-readable, exact, repeatable, and refused when it is not the run's."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import webdataset

from data_pipeline.cache_manifest import index_path
from data_pipeline.cache_record import CorruptRecordError
from data_pipeline.cache_writer import CacheShardWriter
from data_pipeline.latent_cache import LatentCache
from data_pipeline.manifest import read_index, write_index
from m4v_dist import storage, tensor_files
from m4v_dist.batch import TextFeatures
from m4v_dist.errors import DataError
from tests.data_pipeline.made_cache import FINGERPRINT, MadeSource, made_row, make_cache

ROOT = Path(__file__).parents[2]
SOURCES = [MadeSource("vid", "video", 5, 3), MadeSource("img", "image", 4, 1)]


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    cache = LatentCache.open(make_cache(str(tmp_path), SOURCES), FINGERPRINT)
    assert cache.sources == ("img", "vid") and cache.media("vid") == "video"
    rows = cache.rows("vid")
    assert [row.key for row in rows] == [f"vid{n:03d}" for n in range(5)]
    record = cache.read(rows[3])
    expected = torch.full((4, 3, 8, 8), 24.0) + torch.arange(3)[:, None, None]
    assert torch.equal(record.latents, expected.bfloat16())
    assert record.text.tokens.shape == (4, 6) and record.text.pooled.shape == (6,)
    assert cache.null_text.tokens.shape == (2, 6)


def test_webdataset_reads_the_shards(tmp_path: Path) -> None:
    folder = make_cache(str(tmp_path), SOURCES)
    samples = list(webdataset.WebDataset(f"{folder}/shards/vid.tar", shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"vid{n:03d}" for n in range(5)]
    latents = tensor_files.tensors_from_bytes(samples[2]["latents.safetensors"])["latents"]
    assert float(latents[0, 0, 0, 0]) == 16.0
    assert json.loads(samples[2]["json"])["captions"] == ["caption 2"]


def test_equal_records_give_equal_bytes(tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        make_cache(str(tmp_path / name), SOURCES)
        files.append({p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.*")})
    assert len(files[0]) == 7 and files[0] == files[1]


def test_an_index_row_places_its_record_in_the_tar(tmp_path: Path) -> None:
    folder = make_cache(str(tmp_path), SOURCES)
    rows, notes = read_index(index_path(folder, "vid"))
    assert notes == {"fingerprint": "made", "tar_bytes": Path(folder, "shards", "vid.tar").stat().st_size}
    data = Path(folder, "shards", "vid.tar").read_bytes()
    for row in rows:
        assert data[row.offset_bytes :].startswith(f"{row.key}.latents.safetensors".encode())
    assert rows[1].offset_bytes == rows[0].offset_bytes + rows[0].size_bytes


_COUNT_THREADS = """
import os, sys
from data_pipeline.manifest import read_index, write_index
before = set(os.listdir("/proc/self/task"))
rows, _ = read_index(sys.argv[1])
print(len(rows), len(set(os.listdir("/proc/self/task")) - before))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc to count threads by")
def test_an_index_is_read_without_a_thread_of_arrow_s_own(tmp_path: Path) -> None:
    """Such a thread lets go of our bytes while the interpreter ends, and aborts it (seen in half of the runs)."""
    folder = make_cache(str(tmp_path), SOURCES)
    # A process of its own: in this one, other tests may have started them already.
    command = [sys.executable, "-c", _COUNT_THREADS, index_path(folder, "vid")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["5", "0"]


def test_a_flipped_bit_and_a_cut_tail_are_named(tmp_path: Path) -> None:
    folder = make_cache(str(tmp_path), SOURCES)
    cache = LatentCache.open(folder)
    tar = Path(folder, "shards", "vid.tar")
    sound = tar.read_bytes()
    row = cache.rows("vid")[4]
    flipped = bytearray(sound)
    flipped[row.offset_bytes + 700] ^= 4
    tar.write_bytes(bytes(flipped))
    with pytest.raises(CorruptRecordError, match="vid/vid004 in vid: checksum"):
        cache.read(row)
    tar.write_bytes(sound[: row.offset_bytes + 100])
    with pytest.raises(CorruptRecordError, match="vid/vid004 in vid: .*cut short"):
        cache.read(row)
    tar.unlink()
    with pytest.raises(CorruptRecordError, match="vid004"):
        cache.read(row)


@pytest.mark.parametrize(
    ("tokens", "pooled", "numbers"),
    [
        ((3, 5), 6, "3 tokens of width 5 and a pooled vector of width 6"),
        ((3, 6), 7, "3 tokens of width 6 and a pooled vector of width 7"),
        ((9, 6), 6, "9 tokens of width 6 and a pooled vector of width 6"),
    ],
)
def test_a_record_with_text_of_another_encoder_is_named_with_the_numbers_and_the_way_out(
    tmp_path: Path, tokens: tuple[int, int], pooled: int, numbers: str
) -> None:
    folder = make_cache(str(tmp_path), SOURCES)
    writer = CacheShardWriter(folder, "vid")
    text = TextFeatures(torch.ones(tokens), torch.ones(pooled))
    writer.add(made_row(SOURCES[0], 0), torch.zeros(4, 3, 8, 8).bfloat16(), [text])
    writer.commit({})
    cache = LatentCache.open(folder, FINGERPRINT)
    with pytest.raises(
        DataError,
        match=f"vid/vid000 in .*vid.tar: its text has {numbers}, but .* say 3, 6 and 6; .* remove .*vid.parquet",
    ):
        cache.read(cache.rows("vid")[0])


def test_a_cache_of_another_encoder_is_refused_by_the_field(tmp_path: Path) -> None:
    folder = make_cache(str(tmp_path), SOURCES)
    with pytest.raises(DataError, match="codec_weights_sha256: cache has 'aa', run has 'zz'") as caught:
        LatentCache.open(folder, FINGERPRINT | {"codec_weights_sha256": "zz"})
    assert "text_encoder" not in str(caught.value).split("(", 1)[1].split(")")[0]


def test_no_cache_an_empty_one_and_an_old_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished latent cache"):
        LatentCache.open(str(tmp_path))
    folder = make_cache(str(tmp_path), [])
    with pytest.raises(DataError, match="holds no record"):
        LatentCache.open(folder)
    manifest = storage.read_json(f"{folder}/manifest.json")
    storage.write_json(f"{folder}/manifest.json", manifest | {"format_version": 0})
    with pytest.raises(DataError, match="format_version is 0"):
        LatentCache.open(folder)


def test_a_shard_is_not_committed_before_its_index(tmp_path: Path) -> None:
    folder = make_cache(str(tmp_path), SOURCES)
    assert storage.list_folder(f"{folder}/index") == ["img.parquet", "vid.parquet"]
    assert not [name for name in storage.list_folder(f"{folder}/shards") if ".tmp" in name]
    storage.write_bytes(index_path(folder, "vid"), b"not parquet")
    with pytest.raises(DataError, match="vid.parquet: is no index"):
        LatentCache.open(folder)


def test_missing_files_of_a_cache_are_named_with_the_way_out(tmp_path: Path) -> None:
    folder = make_cache(str(tmp_path), SOURCES)
    null_prompt = Path(folder, "null_prompt.safetensors")
    null_prompt.rename(tmp_path / "away")
    with pytest.raises(DataError, match=r"null_prompt.safetensors: .* run jobs.precompute_latents again"):
        LatentCache.open(folder)
    (tmp_path / "away").rename(null_prompt)
    Path(index_path(folder, "vid")).unlink()
    with pytest.raises(DataError, match=r"vid.parquet: .* missing; run jobs.precompute_latents again"):
        LatentCache.open(folder)


def write_shard(folder: str) -> None:
    """One shard of one record of a thousand latents."""
    writer = CacheShardWriter(folder, "vid")
    text = TextFeatures(torch.ones(3, 6), torch.ones(6))
    writer.add(made_row(SOURCES[0], 0), torch.ones(4, 3, 8, 8).bfloat16(), [text])
    writer.commit({})


@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_a_shard_that_its_place_spoils_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    place = storage.put_file

    def spoil(local_path: str, path: str) -> None:
        place(local_path, path)
        data = bytearray(Path(path).read_bytes())
        data[1200] ^= 1
        Path(path).write_bytes(bytes(data) if harm == "flip" else bytes(data[:-512]))

    with monkeypatch.context() as patched:
        patched.setattr(storage, "put_file", spoil)
        with pytest.raises(OSError, match=r"shards/vid.tar: "):
            write_shard(str(tmp_path))
    assert not storage.exists(index_path(str(tmp_path), "vid"))
    write_shard(str(tmp_path))
    assert storage.exists(index_path(str(tmp_path), "vid"))


def test_a_checksum_is_of_what_was_meant_not_of_what_the_disk_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = storage.put_file

    def spoil(local_path: str, path: str) -> None:
        data = bytearray(Path(local_path).read_bytes())
        data[1200] ^= 1
        Path(local_path).write_bytes(bytes(data))
        place(local_path, path)

    monkeypatch.setattr(storage, "put_file", spoil)
    with pytest.raises(OSError, match="vid/vid000 in vid: checksum"):
        write_shard(str(tmp_path))


def test_the_digest_of_a_source_changes_with_each_record(tmp_path: Path) -> None:
    whole = LatentCache.open(make_cache(str(tmp_path / "a"), SOURCES))
    again = LatentCache.open(make_cache(str(tmp_path / "b"), SOURCES))
    fewer = LatentCache.open(make_cache(str(tmp_path / "c"), [MadeSource("vid", "video", 4, 3), SOURCES[1]]))
    assert whole.digest("vid") == again.digest("vid") != fewer.digest("vid")
    assert whole.digest("img") == fewer.digest("img")


def test_a_record_gives_the_caption_that_is_asked_for(tmp_path: Path) -> None:
    folder = make_cache(str(tmp_path), SOURCES)
    texts = [TextFeatures(torch.full((n, 6), float(n)), torch.full((6,), float(n))) for n in (3, 5, 2)]
    row = replace(
        made_row(SOURCES[0], 0), captions=("a", "b", "c"), caption_weights=(1.0, 0.5, 0.0), num_text_tokens=(3, 5, 2)
    )
    writer = CacheShardWriter(folder, "vid")
    writer.add(row, torch.zeros(4, 3, 8, 8).bfloat16(), texts)
    writer.commit({})
    cache = LatentCache.open(folder, FINGERPRINT)
    (found,) = cache.rows("vid")
    assert (found.captions, found.caption_weights) == (("a", "b", "c"), (1.0, 0.5, 0.0))
    for number, text in enumerate(texts):
        read = cache.read(found, caption=number).text
        assert torch.equal(read.tokens, text.tokens.bfloat16()) and torch.equal(read.pooled, text.pooled)
    tensors = tensor_files.tensors_from_bytes(
        next(iter(webdataset.WebDataset(f"{folder}/shards/vid.tar", shardshuffle=False)))["text.safetensors"]
    )
    assert sorted(tensors) == ["pooled.0", "pooled.1", "pooled.2", "tokens.0", "tokens.1", "tokens.2"]
    write_index(index_path(folder, "vid"), [replace(found, captions=("a", "b"), num_text_tokens=(3, 5))], {})
    cache = LatentCache.open(folder, FINGERPRINT)
    with pytest.raises(DataError, match="vid/vid000 .* holds 3 captions, but the index says 2; remove .*vid.parquet"):
        cache.read(cache.rows("vid")[0])


def test_a_cache_of_the_format_before_is_refused_with_both_versions_and_the_way_out(tmp_path: Path) -> None:
    folder = make_cache(str(tmp_path), SOURCES)
    manifest = storage.read_json(f"{folder}/manifest.json")
    storage.write_json(f"{folder}/manifest.json", manifest | {"format_version": 1})
    with pytest.raises(DataError, match="format_version is 1, this code reads 2; precompute into a new folder"):
        LatentCache.open(folder)
