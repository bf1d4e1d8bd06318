"""Tars whose bytes depend on their members alone; apart from `pack.py`, so that reading a cache needs no decoder."""

import io
import os
import tarfile
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from m4v_dist import storage


class TarDraft:
    """A tar that is being written under a temporary name: it appears under its own name whole, or not at all.

    A local tar is drafted beside its place, so that a rename places it and its own disk alone must have room; a remote
    one in the system's temporary folder (TMPDIR), from where it is uploaded.

    Args:
        path: where the tar will stand, local or s3://.
        on_write: is given each piece of bytes that goes into the file.
    """

    def __init__(self, path: str, on_write: Callable[[bytes], object] | None = None) -> None:
        self._path = path
        if storage.is_remote(path):
            self._draft = f"{tempfile.gettempdir()}/{path.rsplit('/', 1)[-1]}.tmp-{uuid.uuid4().hex[:8]}"
        else:
            storage.make_folder(os.path.dirname(path) or ".")
            self._draft = f"{path}.tmp-{uuid.uuid4().hex[:8]}"
        self._file = open(self._draft, "wb")  # noqa: SIM115  place or discard closes it
        watched: Any = _Watched(self._file.write, on_write)
        # PAX: keys of any length, in UTF-8
        self._tar = tarfile.open(fileobj=watched, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    @property
    def offset_bytes(self) -> int:
        """Where the next member begins."""
        return int(self._tar.offset)

    def add(self, name: str, data: bytes) -> None:
        """Append a file with no time, owner or host in its header.

        Raises:
            NoSpaceError: the disk of the draft is full.
        """
        member = tarfile.TarInfo(name)
        member.size = len(data)
        with storage.naming_full_disk(self._draft, _whole_size(self.offset_bytes + len(data))):
            self._tar.addfile(member, io.BytesIO(data))

    def place(self) -> int:
        """Put the finished tar in its place; return its size in bytes.

        Raises:
            NoSpaceError: the disk is full; nothing stands under the tar's name that was not there before.
        """
        with storage.naming_full_disk(self._draft, _whole_size(self.offset_bytes)):
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            size = self._file.tell()
            self._file.close()
            storage.put_file(self._draft, self._path)
        return size

    def discard(self) -> None:
        """Remove the draft, if it was not placed."""
        # a full disk fails once more where the rest of the buffer is written, and the rest is not wanted
        with suppress(OSError):
            self._file.close()
        if os.path.exists(self._draft):
            os.remove(self._draft)


def _whole_size(size_bytes: int) -> int:
    """Size of a tar with members of this size: its end mark, and zeros up to a whole tape record."""
    return -(-(size_bytes + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


class _Watched:
    """A file for writing that shows what passes."""

    def __init__(self, write: Callable[[bytes], int], on_write: Callable[[bytes], object] | None) -> None:
        self._write = write
        self._on_write = on_write
        self._position = 0

    def write(self, data: bytes) -> int:
        if self._on_write is not None:
            self._on_write(data)
        self._position += len(data)
        return self._write(data)

    def tell(self) -> int:
        return self._position
