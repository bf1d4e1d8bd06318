"""Reads the latent cache: manifest, index rows, records by ranged read (data_pipeline/README.md has the layout).

A record is three members of a WebDataset tar that stand side by side (`cache_record.py`): `<key>.latents.safetensors`,
`<key>.text.safetensors`, `<key>.json`. The index row holds their offset, size and checksum, so that a record is one
ranged read. `cache_writer.py` writes it.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from data_pipeline.cache_manifest import (
    fragment_paths,
    how_to_redo,
    read_null_text,
    require_fingerprint,
    require_manifest,
    shard_path,
)
from data_pipeline.cache_record import CacheRecord, CorruptRecordError, parse_record
from data_pipeline.host_files import local_copy
from data_pipeline.index_table import (
    INDEX,
    IndexMismatchError,
    RecordTable,
    empty_table,
    merge_fragments,
    open_merged_index,
    tables_of_rows,
)
from data_pipeline.manifest import IndexRow, RecordPlace, read_index
from m4v_dist import storage
from m4v_dist.batch import TextFeatures
from m4v_dist.errors import DataError

logger = logging.getLogger(__name__)


class LatentCache:
    """Read side: manifest, index, records by ranged read.

    Args:
        path, manifest, null_text: see the attributes.
        tables: of each source, for the loader.
        rows: of each source, in the tables' order; None reads them from the fragments when they are asked for.

    Attributes:
        path: the cache's folder.
        manifest: the whole manifest.
        null_text: features of the empty prompt.
    """

    def __init__(
        self,
        path: str,
        manifest: dict[str, Any],
        tables: Mapping[str, RecordTable],
        null_text: TextFeatures,
        rows: Mapping[str, list[IndexRow]] | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.null_text = null_text
        self._tables = dict(tables)
        self._rows = rows

    @classmethod
    def open(cls, path: str, fingerprint: Mapping[str, str] | None = None) -> "LatentCache":
        """Open a finished cache.

        Args:
            path: its folder, local or s3://.
            fingerprint: of codec and text encoder (`codec.fingerprint() | text_encoder.fingerprint()`); None to look
                at a cache without using it.

        Raises:
            DataError: no cache, unfinished, empty, a file of it missing, of another format version, or made by another
                codec or text encoder; the message names the file or the differing field.
        """
        manifest = require_manifest(path)
        if fingerprint is not None:
            require_fingerprint(path, manifest, fingerprint)
        tables = _open_index(path, manifest)
        if not tables:
            raise DataError(f"{path}: the cache holds no record; see {storage.join(path, 'report.json')} for why.")
        return cls(path, manifest, tables, read_null_text(path, manifest))

    @classmethod
    def of_rows(
        cls, path: str, manifest: dict[str, Any], rows: Mapping[str, list[IndexRow]], null_text: TextFeatures
    ) -> "LatentCache":
        """A cache whose rows are at hand, in any order; nothing is read."""
        ordered = {source: sorted(rows[source], key=_order_of) for source in rows}
        return cls(path, manifest, tables_of_rows(ordered), null_text, ordered)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources with at least one record."""
        return tuple(sorted(self._tables))

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent along height and width."""
        return int(self.manifest["spatial_stride"])

    def media(self, source: str) -> str:
        """What a source holds: video or image."""
        return str(self.manifest["sources"][source]["media"])

    def table(self, source: str) -> RecordTable:
        """What the loader asks of a source's records, by position; empty if it has none."""
        return self._tables.get(source) or empty_table(source)

    def rows(self, source: str) -> list[IndexRow]:
        """Index rows of a source, in the table's order, captions and scores too; empty if it has none. For tools: the
        first call reads every fragment into Python objects. Do not change the list.

        Raises:
            DataError: a fragment is missing, or is no index.
        """
        if self._rows is None:
            self._rows = _read_rows(fragment_paths(self.path, self.manifest).values())
        return self._rows.get(source, [])

    def digest(self, source: str) -> str:
        """Digest of a source's keys and checksums: equal only where the records are the same, each and all."""
        return self.table(source).digest

    def how_to_redo(self, shards: Iterable[str]) -> str:
        """The way out of damaged records: what makes the precompute do these shards of the cache anew."""
        return how_to_redo(self.path, shards)

    def read(self, row: IndexRow, caption: int = 0) -> CacheRecord:
        """Read one record with one of its captions; see `read_all`."""
        latents, texts = self.read_all(row)
        return CacheRecord(latents, texts[caption])

    def read_all(self, row: IndexRow) -> tuple[Tensor, tuple[TextFeatures, ...]]:
        """Read one record by a ranged read and check it; return its latents c t h w and the text of each caption.

        Raises:
            CorruptRecordError: missing, cut short, or another checksum.
            DataError: whole, but with other captions than the index says, or the text of another encoder.
            OSError: the storage failed: the record may be whole.
        """
        try:
            data = storage.read_bytes(shard_path(self.path, row.shard), row.offset_bytes, row.size_bytes)
        except (EOFError, FileNotFoundError) as error:
            raise CorruptRecordError(row, str(error)) from error
        latents, texts = parse_record(data, row)
        if len(texts) != len(row.num_text_tokens):
            raise DataError(
                f"{row.source}/{row.key} in {shard_path(self.path, row.shard)}: it holds {len(texts)} captions, but "
                f"the index says {len(row.num_text_tokens)}; {self.how_to_redo([row.shard])}."
            )
        for caption, text in enumerate(texts):
            self.require_text(text, row, caption)
        return latents, texts

    def require_text(self, text: TextFeatures, row: IndexRow | RecordPlace, caption: int) -> None:
        """Check that a caption has the tokens of its index row, which are planned with, and the cache's widths.

        No damage that is replaced and counted: whatever wrote the shard wrote all of it so.

        Raises:
            DataError: it has not; another encoder wrote it.
        """
        found = (len(text.tokens), text.tokens.shape[-1], text.pooled.shape[-1])
        wanted = (row.num_text_tokens[caption], self.null_text.tokens.shape[-1], self.null_text.pooled.shape[-1])
        if found != wanted:
            raise DataError(
                f"{row.source}/{row.key} in {shard_path(self.path, row.shard)}: its text has {found[0]} tokens of "
                f"width {found[1]} and a pooled vector of width {found[2]}, but index and empty prompt of the cache "
                f"say {wanted[0]}, {wanted[1]} and {wanted[2]}; another encoder wrote it: "
                f"{self.how_to_redo([row.shard])}."
            )


def _open_index(path: str, manifest: Mapping[str, Any]) -> dict[str, RecordTable]:
    """Tables of a cache: of its merged index, or, aloud, of its fragments where that is not what the manifest says.

    Raises:
        DataError: a fragment is missing, or is no index.
    """
    fragments = fragment_paths(path, manifest)
    try:
        return open_merged_index(_index_on_this_host(path, manifest), manifest["index"], fragments)
    except (FileNotFoundError, IndexMismatchError) as error:
        reason = "it is missing" if isinstance(error, FileNotFoundError) else str(error)
    logger.warning(
        "%s is not used: %s; reading %d fragments in its place, into this process's memory. Run "
        "jobs.precompute_latents again, which merges them anew.", storage.join(path, INDEX), reason, len(fragments),
    )  # fmt: skip
    return merge_fragments(fragments)


def is_index_sound(path: str, manifest: Mapping[str, Any]) -> bool:
    """Whether a cache's merged index is what its manifest says, and of its fragments as they are."""
    try:
        open_merged_index(
            _index_on_this_host(path, manifest), manifest.get("index", {}), fragment_paths(path, manifest)
        )
    except (FileNotFoundError, IndexMismatchError):
        return False
    return True


def _index_on_this_host(path: str, manifest: Mapping[str, Any]) -> str:
    """Where the merged index lies on a local disk; that of an object store is copied there once for all processes.

    Raises:
        IndexMismatchError: the manifest names none.
        FileNotFoundError: it is not there.
    """
    entry = manifest.get("index")
    if entry is None:
        raise IndexMismatchError("the manifest names none")
    remote = storage.join(path, entry["file"])
    if not storage.is_remote(path):
        return remote
    return local_copy(remote, entry["checksum"], entry["size_bytes"])


def _read_rows(paths: Iterable[str]) -> dict[str, list[IndexRow]]:
    rows: dict[str, list[IndexRow]] = {}
    for path in paths:
        for row in read_index(path)[0]:
            rows.setdefault(row.source, []).append(row)
    for source_rows in rows.values():
        source_rows.sort(key=_order_of)
    return rows


def _order_of(row: IndexRow) -> tuple[str, str]:
    return row.key, row.shard
