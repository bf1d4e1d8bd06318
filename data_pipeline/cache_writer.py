"""Writes a latent cache: shards of records, each committed by its index fragment, and the manifest at the end.

Bytes depend on the records alone: a rerun writes the same files. `latent_cache.py` reads them,
data_pipeline/README.md has the layout.

Legend: `c` channels, `t` latents in time, `h` `w` grid.
"""

import os
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import IO, Any

from torch import Tensor

from data_pipeline.cache_record import CorruptRecordError, new_digest, parse_record, record_members, texts_to_bytes
from data_pipeline.deterministic_tar import add_member, open_deterministic_tar
from data_pipeline.index_table import write_merged_index
from data_pipeline.latent_cache import MANIFEST, NULL_PROMPT, fragment_paths, index_path, shard_path
from data_pipeline.manifest import IndexRow, write_index
from m4v_dist import storage
from m4v_dist.batch import TextFeatures


class _HashedFile:
    """A file for writing that hashes what passes: a checksum of what was meant, not of what a disk kept of it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest, self._crc32 = new_digest(), 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._crc32 = zlib.crc32(data, self._crc32)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def take_checksums(self) -> tuple[str, int]:
        """Checksum and CRC-32 of what was written since the last call."""
        found = self._digest.hexdigest(), self._crc32
        self._digest, self._crc32 = new_digest(), 0
        return found


class CacheShardWriter:
    """Writes one shard: records into a local temporary file, then place, verify, and commit by the index fragment."""

    def __init__(self, cache: str, name: str) -> None:
        self._cache = cache
        self._name = name
        self._rows: list[IndexRow] = []
        descriptor, self._temporary = tempfile.mkstemp(suffix=".tar")
        os.fchmod(descriptor, 0o644)  # mkstemp's files are for their owner alone; a cache is shared
        self._file = os.fdopen(descriptor, "wb")
        self._hashed = _HashedFile(self._file)
        self._tar = open_deterministic_tar(self._hashed)

    def add(self, row: IndexRow, latents: Tensor, texts: Sequence[TextFeatures]) -> None:
        """Append a record.

        Args:
            row: without shard, offset, size and checksum.
            latents: c t h w, bfloat16, un-normalised.
            texts: one for each of the row's captions, in order, without padding.
        """
        assert len(row.captions) == len(row.caption_weights) == len(row.num_text_tokens) == len(texts) > 0
        start = self._tar.offset
        for name, data in record_members(row, latents, texts):
            add_member(self._tar, name, data)
        size = self._tar.offset - start
        checksum, crc32 = self._hashed.take_checksums()
        self._rows.append(replace(row, shard=self._name, offset_bytes=start, size_bytes=size,
                                  checksum=checksum, crc32=crc32))  # fmt: skip

    def commit(self, notes: dict[str, Any]) -> None:
        """Place the tar, verify every record under its final name, then write the index fragment.

        Raises:
            OSError: the placed file does not read back as it was written; the shard stays uncommitted.
        """
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        # a shard of which nothing was kept has no tar: WebDataset readers stop at an empty one
        if self._rows:
            path = shard_path(self._cache, self._name)
            storage.put_file(self._temporary, path)
            _verify_placed(path, size, self._rows)
        else:
            os.remove(self._temporary)
        write_index(index_path(self._cache, self._name), self._rows, notes)

    def abandon(self) -> None:
        """Remove the temporary file of a shard that will not be committed."""
        self._file.close()
        if os.path.exists(self._temporary):
            os.remove(self._temporary)


def write_manifest(cache: str, manifest: dict[str, Any], null_text: TextFeatures) -> None:
    """Write the null prompt, merge the index of the manifest's fragments, then write the manifest: it is finished.

    Raises:
        DataError: a fragment is missing, or is no index.
    """
    storage.write_bytes(storage.join(cache, NULL_PROMPT), texts_to_bytes([null_text]))
    index = write_merged_index(cache, fragment_paths(cache, manifest))
    storage.write_json(storage.join(cache, MANIFEST), {**manifest, "index": index})


def _verify_placed(path: str, size: int, rows: list[IndexRow]) -> None:
    """Read a placed shard back as the loader will, record by record.

    Raises:
        OSError: size, checksum or content is not what was written; names the file and the record.
    """
    found = storage.size_bytes(path)
    if found != size:
        raise OSError(f"{path}: holds {found} bytes where {size} were written; run again, or check the storage.")
    for row in rows:
        try:
            data = storage.read_bytes(path, row.offset_bytes, row.size_bytes)
            parse_record(data, row)
        except (EOFError, CorruptRecordError) as error:
            raise OSError(
                f"{path}: what was written does not read back ({error}); run again, or check the storage."
            ) from error
