"""Writes a latent cache: shards of records, each committed by its index fragment, and the manifest at the end.

Bytes depend on the records alone: a rerun writes the same files. `latent_cache.py` reads them,
data_pipeline/README.md has the layout.

Legend: `c` channels, `t` latents in time, `h` `w` grid.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from data_pipeline.cache_manifest import MANIFEST, NULL_PROMPT, fragment_paths, index_path, shard_path
from data_pipeline.cache_record import CorruptRecordError, new_digest, parse_record, record_members, texts_to_bytes
from data_pipeline.deterministic_tar import TarDraft
from data_pipeline.index_table import write_merged_index
from data_pipeline.manifest import IndexRow, write_index
from m4v_dist import storage
from m4v_dist.batch import TextFeatures


class CacheShardWriter:
    """Writes one shard: records into a draft, then place, verify, and commit by the index fragment.

    Args:
        cache: its folder.
        name: of the shard.
        require_held: asked before anything is written under a final name; raises where another job has the cache now.
    """

    def __init__(self, cache: str, name: str, require_held: Callable[[], None] = lambda: None) -> None:
        self._cache = cache
        self._require_held = require_held
        self._name = name
        self._rows: list[IndexRow] = []
        # of what is meant, not of what a disk keeps of it
        self._digest, self._crc32 = new_digest(), 0
        self._tar = TarDraft(shard_path(cache, name), self._sum)

    def add(self, row: IndexRow, latents: Tensor, texts: Sequence[TextFeatures]) -> None:
        """Append a record.

        Args:
            row: without shard, offset, size and checksum.
            latents: c t h w, bfloat16, un-normalised.
            texts: one for each of the row's captions, in order, without padding.

        Raises:
            NoSpaceError: the disk of the draft is full.
        """
        assert len(row.captions) == len(row.caption_weights) == len(row.num_text_tokens) == len(texts) > 0
        start = self._tar.offset_bytes
        self._digest, self._crc32 = new_digest(), 0
        for name, data in record_members(row, latents, texts):
            self._tar.add(name, data)
        size = self._tar.offset_bytes - start
        self._rows.append(replace(row, shard=self._name, offset_bytes=start, size_bytes=size,
                                  checksum=self._digest.hexdigest(), crc32=self._crc32))  # fmt: skip

    def _sum(self, data: bytes) -> None:
        self._digest.update(data)
        self._crc32 = zlib.crc32(data, self._crc32)

    def commit(self, notes: dict[str, Any]) -> None:
        """Place the tar, verify every record under its final name, then write the index fragment.

        The fragment's notes are those given and `tar_bytes`, the size of the tar, 0 where there is none.

        Raises:
            OSError: the placed file does not read back as it was written; the shard stays uncommitted.
            NoSpaceError: a disk is full; the shard stays uncommitted.
        """
        # a shard of which nothing was kept has no tar: WebDataset readers stop at an empty one
        tar_bytes = 0
        if self._rows:
            self._require_held()
            tar_bytes = self._tar.place()
            _verify_placed(shard_path(self._cache, self._name), tar_bytes, self._rows)
        else:
            self._tar.discard()
        self._require_held()
        write_index(index_path(self._cache, self._name), self._rows, {**notes, "tar_bytes": tar_bytes})

    def abandon(self) -> None:
        """Remove the draft of a shard that will not be committed; nothing happens after `commit`."""
        self._tar.discard()


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
