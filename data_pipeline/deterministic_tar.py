"""Tars whose bytes depend on their members alone; apart from `pack.py`, so that reading a cache needs no decoder."""

import io
import tarfile
from typing import Any


def open_deterministic_tar(file: Any) -> tarfile.TarFile:
    """A tar for writing whose bytes depend on its members alone."""
    return tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file with no time, owner or host in its header."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def size_of_tar(end: int) -> int:
    """Bytes of a whole tar whose last member ends at `end`: two blocks of zeros, then up to a full record."""
    return -(-(end + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
