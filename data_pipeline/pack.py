"""Raw shards, written and read: media and captions in WebDataset tars.

Written bytes depend on the records alone (no time, owner or host in the tar), and a shard appears under its name only
when it is whole. Per key one media member and `json` and/or `txt` with the captions (`captions.py`).
"""

import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unicodedata import category

import webdataset
from webdataset.tariterators import base_plus_ext, tar_file_iterator

from data_pipeline.captions import Caption, CaptionError, captions_to_json, read_captions, require_captions
from data_pipeline.decode import IMAGE_KINDS, VIDEO_KINDS
from data_pipeline.deterministic_tar import TarDraft
from m4v_dist import storage
from m4v_dist.errors import DataError

MEDIA_KINDS = VIDEO_KINDS | IMAGE_KINDS
_COMPRESSED = (b"\x1f\x8b", b"BZ", b"\xfd7")
"""First bytes of gzip, bzip2 and xz."""
_BROKEN_TAR = (tarfile.TarError, EOFError, ValueError)
"""What the bytes of a shard can be wrong by; ValueError: numbers of a header that are none."""


@dataclass(frozen=True)
class RawClip:
    """One record of a raw shard, undecoded.

    Args:
        key: its name in the shard; no dot in its last path part. Read from a shard: printable and in UTF-8, else
            escaped, with a fault.
        kind: extension of the media, lower case; None where the record has no media member.
        data: the media file; empty where there is none.
        captions: empty where the record has none, or a blank one, or a fault.
        metadata: the json member's other keys.
        fault: why the record cannot be used; None where it can, as far as it was looked at.
    """

    key: str
    kind: str | None
    data: bytes
    captions: tuple[Caption, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None


@dataclass(frozen=True)
class ShardDamage:
    """The rest of a shard cannot be read, from the last record that was whole for certain; what came before stands."""

    error: str


def write_shards(
    records: Iterable[RawClip], pattern: str, max_records: int, max_size_bytes: int | None = None
) -> list[str]:
    """Write records to numbered shards, one record in memory at a time; equal records give equal bytes.

    Args:
        records: in the order they are written; keys must differ.
        pattern: path with one `%d`-like number, such as `shards/clips-%03d.tar`, local or s3://.
        max_records: records of one shard, > 0.
        max_size_bytes: a shard that has reached this size gets no other record; None: any size.

    Returns:
        the shards' paths, in order.

    Raises:
        ValueError: a key with a dot or used twice, an unknown kind, captions that could not be read back, or a pattern
            without a number.
        NoSpaceError: a disk is full. The shards before stand.
    """
    if max_records < 1 or pattern % 0 == pattern % 1:
        raise ValueError(
            f"write_shards: pattern={pattern!r} needs a number like %03d, and max_records={max_records} > 0"
        )
    paths: list[str] = []
    seen: set[str] = set()
    draft: TarDraft | None = None
    try:
        for record in records:
            _check_record(record, seen)
            if draft is None:
                paths.append(pattern % len(paths))
                draft, num_records = TarDraft(paths[-1]), 0
            _add_record(draft, record)
            num_records += 1
            if num_records == max_records or (max_size_bytes is not None and draft.offset_bytes >= max_size_bytes):
                draft.place()
                draft = None
        if draft is not None:
            draft.place()
    except BaseException:
        if draft is not None:
            draft.discard()
        raise
    return paths


def _check_record(record: RawClip, seen: set[str]) -> None:
    if record.key in seen or "." in record.key.rsplit("/", 1)[-1]:
        raise ValueError(f"write_shards: key {record.key!r} holds a dot or stands twice; WebDataset cuts keys at dots.")
    if record.kind is not None and record.kind not in MEDIA_KINDS:
        raise ValueError(f"write_shards: {record.key}: kind {record.kind!r} is not among {sorted(MEDIA_KINDS)}.")
    if record.captions:
        try:
            require_captions(record.captions)
        except CaptionError as error:
            raise ValueError(f"write_shards: {record.key}: {error}.") from error
    seen.add(record.key)


def _add_record(tar: TarDraft, record: RawClip) -> None:
    if record.kind is not None:
        tar.add(f"{record.key}.{record.kind}", record.data)
    notes = {**record.metadata, **captions_to_json(record.captions)}
    tar.add(f"{record.key}.json", json.dumps(notes, sort_keys=True, ensure_ascii=False).encode())


def read_shard(path: str) -> Iterator[RawClip | ShardDamage]:
    """Read a raw shard front to back, local or s3://.

    Yields:
        each record; then one `ShardDamage` if the tar breaks off.

    Raises:
        DataError: no such shard, or a compressed one.
        OSError: the storage failed: the shard itself may be whole, so that is no damage and must be tried again.
    """
    if not storage.exists(path):
        raise DataError(f"{path}: no such shard; correct the sources' shards, or bring the file back.")
    if storage.size_bytes(path) >= 2 and storage.read_bytes(path, 0, 2) in _COMPRESSED:
        raise DataError(f"{path}: is compressed, and tarfile does not see where such a shard was cut; decompress it.")
    with storage.open_read(path) as file:
        records = _records(tar_file_iterator(file, handler=webdataset.reraise_exception))
        while True:
            try:
                record = next(records)
            except StopIteration:
                break
            except _BROKEN_TAR as error:
                # webdataset adds its file object, whose path or address differs from run to run
                reason = str(error).split(" @ <", 1)[0][:200]
                yield ShardDamage(f"tar breaks off: {type(error).__name__}: {reason}")
                return
            yield record
    if not _has_end_mark(path):
        yield ShardDamage("tar ends without its end mark: it was cut between two members")


def _has_end_mark(path: str) -> bool:
    """Whether a tar ends in zeros, as every writer leaves it."""
    size = storage.size_bytes(path)
    return size >= 512 and not any(storage.read_bytes(path, size - 512, 512))


def count_records(path: str) -> int:
    """Number of keys in a shard, reading its headers only.

    Raises:
        DataError: it is no tar, or breaks off.
    """
    try:
        with storage.open_read(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            return len({_key_of(member.name) for member in tar if member.isfile()})
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path}: cannot be listed ({error}); the shard is damaged, write it anew.") from error


def _key_of(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.split('.', 1)[0]}"


def _records(members: Iterable[dict[str, Any]]) -> Iterator[RawClip]:
    """Group members to records as WebDataset does: neighbours of one key, which ends at the file name's first dot.

    Where WebDataset passes over a member or ends the shard, the record gets a fault.
    """
    key: str | None = None
    parts: dict[str, bytes] = {}
    fault: str | None = None
    for member in members:
        prefix, suffix = base_plus_ext(member["fname"])
        if prefix is None:
            prefix, suffix = member["fname"], ""
        suffix = suffix.lower()
        if prefix != key:
            if key is not None:
                yield _raw_clip(key, parts, fault)
            key, parts, fault = prefix, {}, None
        if suffix in parts:
            fault = f"member .{suffix} stands twice"
        parts[suffix] = member["data"]
    if key is not None:
        yield _raw_clip(key, parts, fault)


def _raw_clip(key: str, parts: dict[str, bytes], fault: str | None) -> RawClip:
    kinds = sorted(kind for kind in parts if kind in MEDIA_KINDS)
    shown = printable(key)
    clip = RawClip(shown, kinds[0] if kinds else None, parts[kinds[0]] if kinds else b"", (), fault=fault)
    if shown != key:
        return replace(clip, fault="key is no UTF-8, or holds control characters")
    if fault is not None:
        return clip
    if len(kinds) > 1:
        return replace(clip, fault=f"{len(kinds)} media members: .{', .'.join(kinds)}; a record is one clip")
    try:
        captions, notes = read_captions(parts.get("json"), parts.get("txt"))
    except CaptionError as error:
        return replace(clip, fault=str(error))
    return replace(clip, captions=captions, metadata=notes)


def printable(text: str) -> str:
    """The text with what is no UTF-8 and what ends a line or column escaped, for lists of one record a line."""
    escaped = text.encode("utf-8", "backslashreplace").decode()
    control = {"Cc", "Zl", "Zp"}
    return "".join(c.encode("unicode_escape").decode() if category(c) in control else c for c in escaped)
