"""The latent cache: record format, shard writer and reader (data_pipeline/README.md has the layout).

A record is three members of a WebDataset tar that stand side by side: `<key>.latents.safetensors`,
`<key>.text.safetensors`, `<key>.json`. The index row holds their offset, size and checksum, so that a record is one
ranged read. Bytes depend on the records alone: a rerun writes the same files.

Legend: `c` channels, `t` latents in time, `h` `w` grid, `n` text tokens, `d` text width.
"""

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import IO, Any

import torch
from torch import Tensor

from data_pipeline.deterministic_tar import add_member, open_deterministic_tar
from data_pipeline.manifest import IndexRow, read_index, write_index
from m4v_dist import storage, tensor_files
from m4v_dist.batch import TextFeatures
from m4v_dist.errors import DataError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
NULL_PROMPT = "null_prompt.safetensors"
_LATENTS, _TEXT, _JSON = "latents.safetensors", "text.safetensors", "json"


class CorruptRecordError(Exception):
    """A record's bytes are not those that were written; the message names key, shard and reason.

    Attributes:
        shard: name of the cache's tar that holds it.
    """

    def __init__(self, row: IndexRow, reason: str) -> None:
        super().__init__(f"{row.source}/{row.key} in {row.shard}: {reason}")
        self.shard = row.shard


@dataclass(frozen=True)
class CacheRecord:
    """One record: latents c t h w bfloat16, un-normalised, and its text without padding."""

    latents: Tensor
    text: TextFeatures


def shard_path(cache: str, name: str) -> str:
    """Where a shard's tar stands."""
    return storage.join(cache, "shards", f"{name}.tar")


def index_path(cache: str, name: str) -> str:
    """Where a shard's index fragment stands; it exists once the shard is committed."""
    return storage.join(cache, "index", f"{name}.parquet")


class _HashedFile:
    """A file for writing that hashes what passes: a checksum of what was meant, not of what a disk kept of it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = _new_digest()

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def take_checksum(self) -> str:
        """Checksum of what was written since the last call."""
        checksum, self._digest = self._digest.hexdigest(), _new_digest()
        return checksum


class CacheShardWriter:
    """Writes one shard: records into a local temporary file, then place, verify, and commit by the index fragment.

    Args:
        cache: folder of the cache.
        name: of the shard.
        require_held: asked before anything is written under a final name; raises where another job has the cache now.
    """

    def __init__(self, cache: str, name: str, require_held: Callable[[], None] = lambda: None) -> None:
        self._cache = cache
        self._require_held = require_held
        self._name = name
        self._rows: list[IndexRow] = []
        descriptor, self._temporary = tempfile.mkstemp(suffix=".tar")
        os.fchmod(descriptor, 0o644)  # mkstemp's files are for their owner alone; a cache is shared
        self._file = os.fdopen(descriptor, "wb")
        self._hashed = _HashedFile(self._file)
        self._tar = open_deterministic_tar(self._hashed)

    def add(self, row: IndexRow, record: CacheRecord) -> None:
        """Append a record; `row` comes without shard, offset, size and checksum."""
        start = self._tar.offset
        described = {"key": row.key, "source": row.source, "caption": row.caption, "fps": row.fps,
                     "num_frames": row.num_frames, "height_px": row.height_px, "width_px": row.width_px}  # fmt: skip
        add_member(self._tar, f"{row.key}.{_LATENTS}", tensor_files.tensors_to_bytes({"latents": record.latents}))
        add_member(self._tar, f"{row.key}.{_TEXT}", _text_to_bytes(record.text))
        add_member(self._tar, f"{row.key}.{_JSON}", json.dumps(described, sort_keys=True).encode())
        size = self._tar.offset - start
        self._rows.append(replace(row, shard=self._name, offset_bytes=start, size_bytes=size,
                                  checksum=self._hashed.take_checksum()))  # fmt: skip

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
            self._require_held()
            storage.put_file(self._temporary, path)
            _verify_placed(path, size, self._rows)
        else:
            os.remove(self._temporary)
        self._require_held()
        write_index(index_path(self._cache, self._name), self._rows, notes)

    def abandon(self) -> None:
        """Remove the temporary file of a shard that will not be committed."""
        self._file.close()
        if os.path.exists(self._temporary):
            os.remove(self._temporary)


class LatentCache:
    """Read side: manifest, index rows by source, records by ranged read.

    Attributes:
        path: the cache's folder.
        manifest: the whole manifest.
        null_text: features of the empty prompt.
    """

    def __init__(
        self, path: str, manifest: dict[str, Any], rows: Mapping[str, list[IndexRow]], null_text: TextFeatures
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.null_text = null_text
        self._rows = dict(rows)

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
        manifest = read_manifest(path)
        if manifest is None:
            raise DataError(
                f"{storage.shown(path)}: no finished latent cache (no {MANIFEST}); run jobs.precompute_latents first."
            )
        if manifest.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{path}: cache format_version is {manifest.get('format_version')}, this code reads {FORMAT_VERSION}; "
                "precompute into a new folder."
            )
        if fingerprint is not None:
            require_fingerprint(path, manifest, fingerprint)
        rows: dict[str, list[IndexRow]] = {}
        for name in manifest["fragments"]:
            for row in read_index(index_path(path, name))[0]:
                rows.setdefault(row.source, []).append(row)
        if not rows:
            raise DataError(f"{path}: the cache holds no record; see {storage.join(path, 'report.json')} for why.")
        for source_rows in rows.values():
            source_rows.sort(key=lambda row: (row.key, row.shard))
        return cls(path, manifest, rows, _read_null_text(storage.join(path, manifest["null_prompt"])))

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources with at least one record."""
        return tuple(sorted(self._rows))

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent along height and width."""
        return int(self.manifest["spatial_stride"])

    def media(self, source: str) -> str:
        """What a source holds: video or image."""
        return str(self.manifest["sources"][source]["media"])

    def rows(self, source: str) -> list[IndexRow]:
        """Index rows of a source, sorted by key; empty if it has none. Do not change the list."""
        return self._rows.get(source, [])

    def digest(self, source: str) -> str:
        """Digest of a source's keys and checksums: equal only where the records are the same, each and all."""
        digest = _new_digest()
        for row in self.rows(source):
            digest.update(f"{row.key}\t{row.checksum}\n".encode())
        return digest.hexdigest()

    def how_to_redo(self, shards: Iterable[str]) -> str:
        """The way out of damaged records: what makes the precompute do these shards of the cache anew."""
        fragments = sorted({index_path(self.path, shard) for shard in shards})
        return f"remove {', '.join(fragments[:5])}, and run jobs.precompute_latents again"

    def read(self, row: IndexRow) -> CacheRecord:
        """Read one record by a ranged read and check it.

        Raises:
            CorruptRecordError: missing, cut short, or another checksum.
            DataError: whole, but with the text of another encoder.
            OSError: the storage failed: the record may be whole.
        """
        try:
            data = storage.read_bytes(shard_path(self.path, row.shard), row.offset_bytes, row.size_bytes)
        except (EOFError, FileNotFoundError) as error:
            raise CorruptRecordError(row, str(error)) from error
        record = _parse_record(_require_checksum(data, row), row)
        self._require_text(record.text, row)
        return record

    def _require_text(self, text: TextFeatures, row: IndexRow) -> None:
        """Check that a record's text has the tokens of its index row, which are planned with, and the cache's widths.

        No damage that is replaced and counted: whatever wrote the shard wrote all of it so.
        """
        found = (len(text.tokens), text.tokens.shape[-1], text.pooled.shape[-1])
        wanted = (row.num_text_tokens, self.null_text.tokens.shape[-1], self.null_text.pooled.shape[-1])
        if found != wanted:
            raise DataError(
                f"{row.source}/{row.key} in {shard_path(self.path, row.shard)}: its text has {found[0]} tokens of "
                f"width {found[1]} and a pooled vector of width {found[2]}, but index and empty prompt of the cache "
                f"say {wanted[0]}, {wanted[1]} and {wanted[2]}; another encoder wrote it: "
                f"{self.how_to_redo([row.shard])}."
            )


def read_manifest(cache: str) -> dict[str, Any] | None:
    """Read a cache's manifest; None where there is none."""
    path = storage.join(cache, MANIFEST)
    if not storage.exists(path):
        return None
    try:
        return dict(storage.read_json(path))
    except ValueError as error:
        raise DataError(str(error)) from error


def write_manifest(cache: str, manifest: dict[str, Any], null_text: TextFeatures) -> None:
    """Write the null prompt, then the manifest: the cache is finished."""
    storage.write_bytes(storage.join(cache, NULL_PROMPT), _text_to_bytes(null_text))
    storage.write_json(storage.join(cache, MANIFEST), manifest)


def _read_null_text(path: str) -> TextFeatures:
    try:
        return _text_from_bytes(storage.read_bytes(path))
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: the empty prompt's features are missing; run jobs.precompute_latents again, which writes them "
            "anew and encodes no clip twice."
        ) from error


def require_fingerprint(cache: str, manifest: Mapping[str, Any], fingerprint: Mapping[str, str]) -> None:
    """Check that a cache was made by these encoders.

    Raises:
        DataError: a field differs; the message names it with both values.
    """
    made_by = manifest["fingerprint"]
    differing = [name for name in sorted(fingerprint) if made_by.get(name) != fingerprint[name]]
    if differing:
        lines = "; ".join(
            f"{name}: cache has {made_by.get(name)!r}, run has {fingerprint[name]!r}" for name in differing
        )
        raise DataError(
            f"{cache}: the cache was made by another codec or text encoder ({lines}); "
            "use the settings it was made with, or precompute into a new folder."
        )


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
            _parse_record(_require_checksum(data, row), row)
        except (EOFError, CorruptRecordError) as error:
            raise OSError(
                f"{path}: what was written does not read back ({error}); run again, or check the storage."
            ) from error


def _new_digest() -> "hashlib.blake2b":
    return hashlib.blake2b(digest_size=16)


def _require_checksum(data: bytes, row: IndexRow) -> bytes:
    digest = _new_digest()
    digest.update(data)
    if digest.hexdigest() != row.checksum:
        raise CorruptRecordError(row, "checksum differs from the index")
    return data


def _parse_record(data: bytes, row: IndexRow) -> CacheRecord:
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = {member.name.removeprefix(f"{row.key}."): tar.extractfile(member) for member in tar}
            latents_file, text_file = members[_LATENTS], members[_TEXT]
            assert latents_file is not None and text_file is not None
            latents = tensor_files.tensors_from_bytes(latents_file.read())["latents"]
            return CacheRecord(latents, _text_from_bytes(text_file.read()))
    except (tarfile.TarError, KeyError) as error:
        raise CorruptRecordError(row, f"{type(error).__name__}: {error}") from error


def _text_to_bytes(text: TextFeatures) -> bytes:
    # tokens are the bulk of a T5 record and come from a bf16 net; there is no mask, because there is no padding
    return tensor_files.tensors_to_bytes({"tokens": text.tokens.to(torch.bfloat16), "pooled": text.pooled.float()})


def _text_from_bytes(data: bytes) -> TextFeatures:
    tensors = tensor_files.tensors_from_bytes(data)
    return TextFeatures(tensors["tokens"], tensors["pooled"])
