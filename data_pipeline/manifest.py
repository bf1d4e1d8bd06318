"""Which shards exist, and the index of what the cache holds, in fragments (`index_table.py` merges them).

An index fragment is one Parquet file per input shard. Its presence commits the shard: it is written last, and carries
in its schema metadata the fingerprint of the input and settings, and what was filtered and quarantined.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, fields
from typing import Any

import pyarrow
import pyarrow.parquet
from braceexpand import braceexpand

from m4v_dist import storage
from m4v_dist.errors import ConfigError, DataError

_NOTES, _CHECKSUM = b"m4v", b"m4v_checksum"
_UNSEALED = b"here stands the checksum of this"
_ARROW_TYPES: dict[Any, pyarrow.DataType] = {
    str: pyarrow.string(),
    int: pyarrow.int64(),
    float: pyarrow.float64(),
    tuple[str, ...]: pyarrow.list_(pyarrow.string()),
    tuple[int, ...]: pyarrow.list_(pyarrow.int64()),
    tuple[float, ...]: pyarrow.list_(pyarrow.float64()),
}


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
        captions: as encoded, at least one.
        caption_weights: of each caption, relative to the others; >= 0, not all 0.
        num_text_tokens: tokens of each caption.
        offset_bytes, size_bytes: where the record's members stand in the tar.
        checksum: blake2b of these bytes, hex.
        source_height_px, source_width_px, source_num_frames, source_fps: the file it came from.
        scores: what `filters.scores` measured, a JSON object.
        crc32: the same bytes' CRC-32: what the loader checks each read by, five times as fast (measured) as `checksum`.
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
    captions: tuple[str, ...]
    caption_weights: tuple[float, ...]
    num_text_tokens: tuple[int, ...]
    offset_bytes: int
    size_bytes: int
    checksum: str
    source_height_px: int
    source_width_px: int
    source_num_frames: int
    source_fps: float
    scores: str = "{}"
    crc32: int = 0


@dataclass(frozen=True, slots=True)
class RecordPlace:
    """Where a record lies and what must be found there: of `IndexRow`, what it takes to read one."""

    key: str
    source: str
    shard: str
    num_text_tokens: tuple[int, ...]
    offset_bytes: int
    size_bytes: int
    checksum: str
    crc32: int


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


def without_rows(
    rows: Iterable[IndexRow], notes: Mapping[str, Any], keys: AbstractSet[str]
) -> tuple[list[IndexRow], dict[str, Any]]:
    """A fragment without the rows of some keys, whose bytes stay in the tar: `unindexed` of the notes keeps where."""
    kept: list[IndexRow] = []
    unindexed = list(notes.get("unindexed", ()))
    for row in rows:
        if row.key in keys:
            unindexed.append({"key": row.key, "offset_bytes": row.offset_bytes, "size_bytes": row.size_bytes})
        else:
            kept.append(row)
    return kept, {**notes, "kept": len(kept), "unindexed": unindexed}


def tar_spans(rows: Iterable[IndexRow], notes: Mapping[str, Any]) -> list[tuple[int, int, str]]:
    """(offset, size, key) of every record in a fragment's tar, in order, those that `without_rows` took out too."""
    spans = [(row.offset_bytes, row.size_bytes, row.key) for row in rows]
    return sorted(spans + [(e["offset_bytes"], e["size_bytes"], e["key"]) for e in notes.get("unindexed", ())])


def write_index(path: str, rows: list[IndexRow], notes: dict[str, Any]) -> None:
    """Write an index fragment atomically; equal rows and notes give equal bytes."""
    text = json.dumps(notes, sort_keys=True).encode()
    columns = [(column.name, _ARROW_TYPES[column.type]) for column in fields(IndexRow)]
    schema = pyarrow.schema(columns, metadata={_NOTES: text, _CHECKSUM: _UNSEALED})
    table = pyarrow.Table.from_pylist([asdict(row) for row in rows], schema=schema)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="zstd")
    storage.write_bytes(path, _seal(buffer.getvalue()))


def read_index(path: str) -> tuple[list[IndexRow], dict[str, Any]]:
    """Read an index fragment: its rows and notes.

    Raises:
        DataError: missing, no Parquet, or of another format.
    """
    table, notes = _read_table(path, None)
    return [_row(values) for values in table.to_pylist()], notes


def read_index_columns(path: str, names: Sequence[str]) -> pyarrow.Table:
    """Read some columns of an index fragment, without a Python object for each row.

    Raises:
        DataError: missing, no Parquet, or of another format.
    """
    return _read_table(path, list(names))[0]


def _read_table(path: str, names: list[str] | None) -> tuple[pyarrow.Table, dict[str, Any]]:
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: this index fragment is missing; run jobs.precompute_latents again, which does its shard anew."
        ) from error
    try:
        file = _open_table(data)
        stored = file.metadata.metadata
        _require_seal(data, stored[_CHECKSUM])
        # in this thread alone, see `_open_table`
        table = file.read(columns=names, use_threads=False)
        return table.select(names or table.column_names), json.loads(stored[_NOTES])
    # OSError: Arrow's word for bytes that it cannot make sense of; the storage was asked above
    except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: is no index of this version ({type(error).__name__}: {error}); "
            "remove it and run jobs.precompute_latents again."
        ) from error


def _seal(data: bytes) -> bytes:
    """A Parquet file with the checksum of itself in its footer; Parquet's own cover pages alone."""
    start = data.rindex(_UNSEALED)
    return data[:start] + _checksum(data) + data[start + len(_UNSEALED) :]


def _require_seal(data: bytes, checksum: bytes) -> None:
    start = data.rindex(checksum)
    if checksum != _checksum(data[:start] + _UNSEALED + data[start + len(checksum) :]):
        raise ValueError("its checksum is another one")


def _checksum(data: bytes) -> bytes:
    """As long as what stands in its place while it is computed."""
    return hashlib.blake2b(data, digest_size=len(_UNSEALED) // 2).hexdigest().encode()


def _row(columns: dict[str, Any]) -> IndexRow:
    values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in columns.items()}
    return IndexRow(**values)


def _open_table(data: bytes) -> pyarrow.parquet.ParquetFile:
    """Open a Parquet file's bytes to be read in this thread alone.

    `read_table` goes through Arrow's dataset scanner, whose worker threads hold the bytes. A job that is refused right
    after it may end while one of them lets go of what Python owns, and that aborts the interpreter (exit code 134 in
    place of ours). Each of the three parts keeps another thread away: no scanner, no read-ahead, no parallel columns.
    """
    return pyarrow.parquet.ParquetFile(io.BytesIO(data), pre_buffer=False)
