"""The merged index: it says what the fragments say, is mapped, and is passed over aloud when it does not fit."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.cache_manifest import index_path, read_manifest
from data_pipeline.cache_writer import write_manifest
from data_pipeline.index_table import INDEX, RecordTable, empty_table, tables_of_rows
from data_pipeline.latent_cache import LatentCache, is_index_sound
from data_pipeline.manifest import IndexRow, write_index
from m4v_dist import storage
from m4v_dist.errors import DataError
from tests.data_pipeline.made_cache import MadeSource, made_row, make_cache

ROOT = Path(__file__).parents[2]
SOURCES = [MadeSource("vid", "video", 12, 3), MadeSource("img", "image", 4, 1)]


def check_says(table: RecordTable, rows: list[IndexRow]) -> None:
    """The table and the rows say the same of each record, and of all of them together."""
    assert len(table) == len(rows)
    assert table.height_px.tolist() == [row.height_px for row in rows]
    assert table.width_px.tolist() == [row.width_px for row in rows]
    assert table.num_latents.tolist() == [row.num_latents for row in rows]
    digest = hashlib.blake2b(digest_size=16)
    for record, row in enumerate(rows):
        place = table.place(record)
        for name in ("key", "source", "shard", "offset_bytes", "size_bytes", "checksum", "crc32", "num_text_tokens"):
            assert getattr(place, name) == getattr(row, name), name
        assert table.caption_weights(record) == row.caption_weights
        digest.update(f"{row.key}\t{row.checksum}\n".encode())
    assert table.digest == digest.hexdigest()


def test_the_merged_index_says_what_the_fragments_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = LatentCache.open(make_cache(str(tmp_path), SOURCES))
    assert (tmp_path / INDEX).is_file() and not caplog.records
    assert cache.sources == ("img", "vid") and cache.rows("vid")[3].captions == ("caption 3",)
    for source in cache.sources:
        check_says(cache.table(source), cache.rows(source))
    assert (
        len(cache.table("gone")) == 0 and cache.rows("gone") == [] and cache.digest("gone") == empty_table("x").digest
    )


def test_rows_in_memory_give_the_same_table_in_any_order_of_sources() -> None:
    several = {"captions": ("a", "b", "c"), "caption_weights": (1.0, 0.0, 2.5), "num_text_tokens": (7, 9, 3)}
    rows = {
        source: [
            replace(made_row(MadeSource(source, "video", 9, 2), n), checksum=f"{n:032x}", crc32=n, shard=f"s{n % 2}",
                    **several if n % 3 == 0 else {})
            for n in range(9)
        ]
        for source in ("é", "b", "a")
    }  # fmt: skip
    tables = tables_of_rows(rows)
    for source, table in tables.items():
        check_says(table, rows[source])
        assert table.longer_than(8).tolist() == [0, 3, 6] and table.longer_than(9).tolist() == []
        assert table.longer_than(2).tolist() == list(range(9))


def test_records_of_several_fragments_are_sorted_by_key(tmp_path: Path) -> None:
    make_cache(str(tmp_path), SOURCES)
    rows = LatentCache.open(str(tmp_path)).rows("vid")
    for name, part in (("vid", rows[1::2]), ("vid-2", rows[::2])):
        write_index(index_path(str(tmp_path), name), [replace(row, shard=name) for row in part], {})
    manifest = read_manifest(str(tmp_path))
    assert manifest is not None
    cache = LatentCache.open(str(tmp_path))
    write_manifest(str(tmp_path), manifest | {"fragments": ["img", "vid", "vid-2"]}, cache.null_text)
    cache = LatentCache.open(str(tmp_path))
    keys = [cache.table("vid").key(record) for record in range(12)]
    assert keys == sorted(keys) and cache.table("vid").shard(0) == "vid-2"
    check_says(cache.table("vid"), cache.rows("vid"))


def spoil(folder: Path, how: str) -> None:
    path = folder / INDEX
    data = bytearray(path.read_bytes())
    match how:
        case "missing":
            path.unlink()
        case "flipped":
            data[len(data) // 2] ^= 1
            path.write_bytes(bytes(data))
        case "cut":
            path.write_bytes(bytes(data[:-8]))
        case "of another manifest":
            manifest = storage.read_json(str(folder / "manifest.json"))
            del manifest["index"]
            storage.write_json(str(folder / "manifest.json"), manifest)
        case "of older fragments":
            rows = LatentCache.open(str(folder)).rows("img")
            write_index(index_path(str(folder), "img"), [*rows, replace(rows[0], key="more")], {})


@pytest.mark.parametrize("how", ["missing", "flipped", "cut", "of another manifest", "of older fragments"])
def test_an_index_that_does_not_fit_is_passed_over_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    folder = make_cache(str(tmp_path), SOURCES)
    manifest = read_manifest(folder)
    assert manifest is not None and is_index_sound(folder, manifest)
    spoil(tmp_path, how)
    caplog.clear()
    cache = LatentCache.open(folder)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "index.arrow is not used" in warning and "run jobs.precompute_latents again" in warning.replace("R", "r")
    for source in cache.sources:
        check_says(cache.table(source), cache.rows(source))
    assert len(cache.table("img")) == (5 if how == "of older fragments" else 4)
    manifest = read_manifest(folder)
    assert manifest is not None and not is_index_sound(folder, manifest)


def test_a_fragment_that_is_gone_is_no_matter_of_the_index(tmp_path: Path) -> None:
    """Its shard is to be done anew: a reader must not go on with what the merged index still says of it."""
    folder = make_cache(str(tmp_path), SOURCES)
    os.remove(index_path(folder, "img"))
    with pytest.raises(DataError, match=r"img.parquet: .*missing; run jobs.precompute_latents again"):
        LatentCache.open(folder)


_COUNT_THREADS = """
import os, sys
from data_pipeline.latent_cache import LatentCache
before = set(os.listdir("/proc/self/task"))
cache = LatentCache.open(sys.argv[1])
print(len(cache.table("vid")), len(set(os.listdir("/proc/self/task")) - before))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc to count threads by")
def test_an_index_is_opened_without_a_thread_of_arrow_s_own(tmp_path: Path) -> None:
    """Such a thread may let go of our bytes while the interpreter ends, and abort it."""
    folder = make_cache(str(tmp_path), SOURCES)
    command = [sys.executable, "-c", _COUNT_THREADS, folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["12", "0"]


def test_tables_view_the_file_and_copy_nothing(tmp_path: Path) -> None:
    table = LatentCache.open(make_cache(str(tmp_path), SOURCES)).table("vid")
    assert not table.height_px.flags.owndata and not table.num_latents.flags.writeable
