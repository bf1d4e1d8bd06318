"""The merged index: what the loader asks of every record, as columns of one file that all ranks of a host share.

`index.arrow` beside the manifest is made of the fragments when a precompute ends, and says nothing that they do not
say: they commit a shard, it is derived. It holds no caption and no score (`LatentCache.rows` reads those from the
fragments). It is an Arrow file of one uncompressed batch, so that a rank maps it: its pages are the host's, and only
those of records that are planned are ever read.

Rows are sorted by source, key, shard, so that a source is a slice. The schema's metadata (key `m4v`) names the
fragments with their sizes, the shards, and each source's slice and digest; the manifest holds the file's size and
checksum.

Beside `manifest.py` the only file that imports pyarrow.
"""

import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
from numpy.typing import NDArray

from data_pipeline.manifest import IndexRow, RecordPlace, read_index_columns
from m4v_dist import storage

INDEX = "index.arrow"
_NOTES = b"m4v"
_DIGEST_BYTES = 16
_READS_IN_FLIGHT = 16
_SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.large_string()),
        ("shard", pyarrow.int32()),
        ("height_px", pyarrow.int32()),
        ("width_px", pyarrow.int32()),
        ("num_latents", pyarrow.int32()),
        ("offset_bytes", pyarrow.int64()),
        ("size_bytes", pyarrow.int64()),
        ("checksum", pyarrow.binary(_DIGEST_BYTES)),
        ("crc32", pyarrow.int64()),
        ("num_text_tokens", pyarrow.list_(pyarrow.int32())),
        ("caption_weights", pyarrow.list_(pyarrow.float64())),
    ]
)
FRAGMENT_COLUMNS = ["source", *_SCHEMA.names]


class IndexMismatchError(Exception):
    """A merged index that is not of this cache as it stands; the message says what differs."""


class RecordTable:
    """The records of one source, by position; arrays are views of the file and not to be written.

    Args:
        source: its name.
        columns: of `_SCHEMA`, its rows alone.
        shards: names that the column `shard` counts in.
        digest: of keys and checksums, in order.
        mapped: the file that the columns are views of; None where they are in this process's memory.

    Attributes:
        source, digest: as given.
        height_px, width_px, num_latents: one int32 for each record.
    """

    def __init__(
        self,
        source: str,
        columns: pyarrow.RecordBatch,
        shards: Sequence[str],
        digest: str,
        mapped: mmap.mmap | None = None,
    ) -> None:
        self.source, self.digest = source, digest
        self._mapped = mapped
        self._shards = shards
        self.height_px, self.width_px, self.num_latents, self._shard = (
            columns.column(name).to_numpy() for name in ("height_px", "width_px", "num_latents", "shard")
        )
        self._offset, self._size, self._crc32 = (
            columns.column(name).to_numpy() for name in ("offset_bytes", "size_bytes", "crc32")
        )
        self._key, self._checksum = columns.column("key"), columns.column("checksum")
        tokens, weights = columns.column("num_text_tokens"), columns.column("caption_weights")
        self._caption_at, self._weight_at = tokens.offsets.to_numpy(), weights.offsets.to_numpy()
        self._tokens, self._weights = tokens.values.to_numpy(), weights.values.to_numpy()

    def __len__(self) -> int:
        return len(self.height_px)

    def release(self) -> None:
        """Let go of the pages that were looked at: the host keeps them, this process counts them no longer.

        The system maps sixteen for each one that is asked for, so records drawn at random would soon map the whole.
        """
        if self._mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)

    def key(self, record: int) -> str:
        """The record's key."""
        return str(self._key[record].as_py())

    def shard(self, record: int) -> str:
        """Name of the tar that holds the record."""
        return self._shards[self._shard[record]]

    def place(self, record: int) -> RecordPlace:
        """Where the record lies, and what its bytes must be."""
        return RecordPlace(
            source=self.source,
            key=self.key(record),
            shard=self.shard(record),
            offset_bytes=int(self._offset[record]),
            size_bytes=int(self._size[record]),
            checksum=self._checksum[record].as_py().hex(),
            crc32=int(self._crc32[record]),
            num_text_tokens=self.num_text_tokens(record),
        )

    def num_text_tokens(self, record: int) -> tuple[int, ...]:
        """Tokens of each caption."""
        return tuple(self._tokens[self._caption_at[record] : self._caption_at[record + 1]].tolist())

    def caption_weights(self, record: int) -> tuple[float, ...]:
        """Weight of each caption, relative to the others."""
        return tuple(self._weights[self._weight_at[record] : self._weight_at[record + 1]].tolist())

    def longer_than(self, num_tokens: int) -> NDArray[np.int64]:
        """Positions of the records with a caption of more tokens than that, ascending."""
        first, last = int(self._caption_at[0]), int(self._caption_at[-1])
        too_long = np.flatnonzero(self._tokens[first:last] > num_tokens) + first
        return np.unique(np.searchsorted(self._caption_at, too_long, side="right") - 1)


def tables_of_rows(rows: Mapping[str, Sequence[IndexRow]]) -> dict[str, RecordTable]:
    """Tables of rows that are in memory, by source, in the order that a merged index has."""
    values = [asdict(row) for source in sorted(rows) for row in rows[source]]
    columns = {name: [value[name] for value in values] for name in FRAGMENT_COLUMNS}
    types = {field.name: field.type for field in _SCHEMA} | dict.fromkeys(("source", "shard", "checksum"), "string")
    table = pyarrow.table({name: pyarrow.array(column, types[name]) for name, column in columns.items()})
    return _tables(*_merged([table]))


def empty_table(source: str) -> RecordTable:
    """The table of a source without a record."""
    return RecordTable(source, _empty_batch(), (), hashlib.blake2b(digest_size=_DIGEST_BYTES).hexdigest())


def merge_fragments(paths: Mapping[str, str]) -> dict[str, RecordTable]:
    """Read fragments and merge them in memory.

    Args:
        paths: of each fragment, by its name.

    Raises:
        DataError: one is missing, or is no index.
    """
    return _tables(*_merged(_read_fragments(paths.values())))


def write_merged_index(cache: str, paths: Mapping[str, str]) -> dict[str, Any]:
    """Merge a cache's fragments into its `index.arrow`.

    Args:
        cache: its folder.
        paths: as for `merge_fragments`.

    Returns:
        what the manifest says of it: `file`, `size_bytes`, `checksum`.

    Raises:
        DataError: see `merge_fragments`.
    """
    return write_index_of(cache, _read_fragments(paths.values()), _fragment_sizes(paths))


def write_index_of(cache: str, tables: Sequence[pyarrow.Table], fragments: Mapping[str, int]) -> dict[str, Any]:
    """As `write_merged_index`, of fragments' columns that are at hand.

    Args:
        cache: its folder.
        tables: of `FRAGMENT_COLUMNS`.
        fragments: sizes in bytes of the files that they were read from, by name.
    """
    columns, notes = _merged(tables)
    notes["fragments"] = dict(fragments)
    schema = _SCHEMA.with_metadata({_NOTES: json.dumps(notes, sort_keys=True)})
    descriptor, temporary = tempfile.mkstemp(suffix=".arrow")
    os.fchmod(descriptor, 0o644)  # mkstemp's files are for their owner alone; a cache is shared
    with os.fdopen(descriptor, "wb") as file, pyarrow.ipc.new_file(file, schema) as writer:
        writer.write_batch(columns.replace_schema_metadata(schema.metadata))
    entry = {"file": INDEX, "size_bytes": os.path.getsize(temporary), "checksum": _checksum_of(temporary)}
    storage.put_file(temporary, storage.join(cache, INDEX))
    return entry


def open_merged_index(local_path: str, entry: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, RecordTable]:
    """Map a merged index that lies on this host, after checking that it is the manifest's and of these fragments.

    Args:
        local_path: the file.
        entry: what the manifest says of it.
        paths: fragments of the cache by name; they are listed, not read.

    Raises:
        IndexMismatchError: another size or checksum, or a fragment is gone or of another size than was merged.
    """
    if os.path.getsize(local_path) != entry["size_bytes"] or _checksum_of(local_path) != entry["checksum"]:
        raise IndexMismatchError("its bytes are not those that the manifest names")
    with open(local_path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # as one buffer: from a file, even a mapped one, Arrow would read in threads of its own
    reader = pyarrow.ipc.open_file(pyarrow.py_buffer(mapped), options=pyarrow.ipc.IpcReadOptions(use_threads=False))
    notes = json.loads(reader.schema.metadata[_NOTES])
    found = _fragment_sizes(paths)
    differing = sorted(
        name for name in {*found, *notes["fragments"]} if found.get(name) != notes["fragments"].get(name)
    )
    if differing:
        raise IndexMismatchError(
            f"fragments were made anew since it was merged, or are gone: {', '.join(differing[:5])}"
        )
    return _tables(reader.get_batch(0), notes, mapped)


def _read_fragments(paths: Iterable[str]) -> list[pyarrow.Table]:
    with ThreadPoolExecutor(_READS_IN_FLIGHT) as pool:
        return list(pool.map(lambda path: read_index_columns(path, FRAGMENT_COLUMNS), paths))


def _fragment_sizes(paths: Mapping[str, str]) -> dict[str, int]:
    """Sizes of the fragments that are there, by name: one listing of each folder that they stand in."""
    folders = {os.path.dirname(path) for path in paths.values()}
    sizes = {
        storage.join(folder, name): size for folder in folders for name, size in storage.list_sizes(folder).items()
    }
    return {name: sizes[path] for name, path in paths.items() if path in sizes}


def _merged(tables: Sequence[pyarrow.Table]) -> tuple[pyarrow.RecordBatch, dict[str, Any]]:
    """Fragments' rows, sorted, as one batch of `_SCHEMA`, and the notes on its slices."""
    if not tables:
        return _empty_batch(), {"sources": {}, "shards": []}
    table = pyarrow.concat_tables(tables)
    table = table.set_column(table.schema.get_field_index("key"), "key", table["key"].cast(pyarrow.large_string()))
    order = pyarrow.compute.sort_indices(table, [(name, "ascending") for name in ("source", "key", "shard")])
    table = table.take(order).combine_chunks()
    sources, start = {}, 0
    for counted in table["source"].value_counts().to_pylist():
        stop = start + counted["counts"]
        sources[counted["values"]] = [start, stop, _digest_of(table.slice(start, stop - start))]
        start = stop
    shards = table["shard"].dictionary_encode().combine_chunks()
    columns = {name: table[name] for name in _SCHEMA.names}
    columns |= {"shard": shards.indices, "checksum": _binary_of(table["checksum"])}
    arrays = [_one_chunk(columns[field.name].cast(field.type)) for field in _SCHEMA]
    notes = {"sources": sources, "shards": shards.dictionary.to_pylist()}
    return pyarrow.RecordBatch.from_arrays(arrays, schema=_SCHEMA), notes


def _empty_batch() -> pyarrow.RecordBatch:
    return pyarrow.RecordBatch.from_arrays([pyarrow.array([], field.type) for field in _SCHEMA], schema=_SCHEMA)


def _one_chunk(column: pyarrow.Array | pyarrow.ChunkedArray) -> pyarrow.Array:
    return column.combine_chunks() if isinstance(column, pyarrow.ChunkedArray) else column


def _tables(
    columns: pyarrow.RecordBatch, notes: Mapping[str, Any], mapped: mmap.mmap | None = None
) -> dict[str, RecordTable]:
    return {
        source: RecordTable(source, columns.slice(start, stop - start), notes["shards"], digest, mapped)
        for source, (start, stop, digest) in notes["sources"].items()
    }


def _digest_of(table: pyarrow.Table) -> str:
    """Digest of rows' keys and checksums: of `key`, a tab, `checksum`, a line feed, row after row."""
    join = pyarrow.compute.binary_join_element_wise
    tab, line_feed, nothing = (pyarrow.scalar(text, pyarrow.large_string()) for text in ("\t", "\n", ""))
    lines = join(join(table["key"], table["checksum"].cast(pyarrow.large_string()), tab), nothing, line_feed)
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for chunk in lines.chunks:
        offsets = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        digest.update(memoryview(chunk.buffers()[2])[int(offsets[0]) : int(offsets[-1])])
    return digest.hexdigest()


def _binary_of(checksums: pyarrow.ChunkedArray) -> pyarrow.Array:
    """Hexadecimal checksums as bytes; an empty one, of a record that is only assumed, as zeros."""
    given = checksums.to_pylist()
    return pyarrow.array(
        [bytes.fromhex(text) if text else bytes(_DIGEST_BYTES) for text in given], _SCHEMA.field("checksum").type
    )


def _checksum_of(path: str) -> str:
    """Of a local file. It is read, not mapped, so that its pages do not count as this process's."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES)).hexdigest()
