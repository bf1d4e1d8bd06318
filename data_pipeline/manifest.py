"""Which shards exist, and the index of what the cache holds: the only file that imports pyarrow.

An index fragment is one Parquet file per input shard. Its presence commits the shard: it is written last, and carries
in its schema metadata the fingerprint of the input and settings, and what was filtered and quarantined.
"""

import io
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import pyarrow
import pyarrow.parquet
from braceexpand import braceexpand

from m4v_dist import storage
from m4v_dist.errors import ConfigError, DataError

_NOTES = b"m4v"
_ARROW_TYPES = {"str": pyarrow.string(), "int": pyarrow.int64(), "float": pyarrow.float64()}


@dataclass(frozen=True)
class IndexRow:
    """One record of the cache.

    Args:
        key: the raw record's key.
        source: name of its source.
        media: video or image.
        shard: name of the cache's tar, under `shards/`.
        height_px, width_px: the bucket.
        num_frames: frames of the cached clip, 8k+1.
        num_latents: latents in time.
        fps: frames per second of the cached clip; 0 for a still.
        caption: as encoded.
        num_text_tokens: tokens of the caption.
        offset_bytes, size_bytes: where the record's members stand in the tar.
        checksum: blake2b of these bytes, hex.
        source_height_px, source_width_px, source_num_frames, source_fps: the file it came from.
        scores: what `filters.scores` measured, a JSON object.
    """

    key: str
    source: str
    media: str
    shard: str
    height_px: int
    width_px: int
    num_frames: int
    num_latents: int
    fps: float
    caption: str
    num_text_tokens: int
    offset_bytes: int
    size_bytes: int
    checksum: str
    source_height_px: int
    source_width_px: int
    source_num_frames: int
    source_fps: float
    scores: str = "{}"


def list_shards(pattern: str) -> list[str]:
    """Expand braces in a shard pattern and check that every shard is there.

    Raises:
        ConfigError: braces that do not balance.
        DataError: a shard that is missing, by name, with the local folder if that is missing; or one that stands twice.
    """
    try:
        paths = list(braceexpand(pattern))
    except ValueError as error:
        raise ConfigError(
            f"sources.shards={pattern!r}: braces do not balance; write clips-{{000..009}}.tar or {{a,b}}.tar."
        ) from error
    present: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.dirname(path) or ".", os.path.basename(path)
        if folder not in present:
            present[folder] = set(storage.list_folder(folder))
        if name not in present[folder]:
            missing.append(path)
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise DataError(
            f"{len(missing)} of {len(paths)} shards of {pattern!r} are missing: {shown}; "
            f"{_missing_folders(present) or 'correct sources.shards, or bring the files back'}."
        )
    if len(set(paths)) != len(paths):
        raise DataError(f"{pattern!r} names a shard twice; each shard may stand once.")
    return paths


def _missing_folders(folders: Iterable[str]) -> str:
    """Which buckets, or local folders, of shards are not there at all, and the ways out; empty if all are."""
    buckets = sorted({words for folder in folders if (words := storage.missing_bucket(folder))})
    if buckets:
        return f"{', '.join(buckets)}; correct sources.shards, or AWS_ENDPOINT_URL"
    gone = [
        os.path.abspath(folder) for folder in folders if not storage.is_remote(folder) and not os.path.isdir(folder)
    ]
    if not gone:
        return ""
    return (
        f"there is no folder {', '.join(sorted(gone))}; correct sources.shards, or pack shards there first "
        "(data_pipeline/README.md; `make demo` packs those of the demo)"
    )


def write_index(path: str, rows: list[IndexRow], notes: dict[str, Any]) -> None:
    """Write an index fragment atomically; equal rows and notes give equal bytes."""
    schema = pyarrow.schema(
        [
            (column.name, _ARROW_TYPES[str(getattr(column.type, "__name__", column.type))])
            for column in fields(IndexRow)
        ],
        metadata={_NOTES: json.dumps(notes, sort_keys=True)},
    )
    table = pyarrow.Table.from_pylist([asdict(row) for row in rows], schema=schema)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="zstd")
    storage.write_bytes(path, buffer.getvalue())


def read_index(path: str) -> tuple[list[IndexRow], dict[str, Any]]:
    """Read an index fragment: its rows and notes.

    Raises:
        DataError: missing, no Parquet, or of another format.
    """
    try:
        table = _read_table(storage.read_bytes(path))
        notes = json.loads((table.schema.metadata or {})[_NOTES])
        return [IndexRow(**values) for values in table.to_pylist()], notes
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: this index fragment is missing; run jobs.precompute_latents again, which does its shard anew."
        ) from error
    except (pyarrow.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: is no index of this version ({type(error).__name__}: {error}); "
            "remove it and run jobs.precompute_latents again."
        ) from error


def _read_table(data: bytes) -> pyarrow.Table:
    """Read a Parquet file's bytes in this thread alone.

    `read_table` goes through Arrow's dataset scanner, whose worker threads hold the bytes. A job that is refused right
    after it may end while one of them lets go of what Python owns, and that aborts the interpreter (exit code 134 in
    place of ours). Each of the three parts keeps another thread away: no scanner, no read-ahead, no parallel columns.
    """
    file = pyarrow.parquet.ParquetFile(io.BytesIO(data), pre_buffer=False)
    return file.read(use_threads=False)
