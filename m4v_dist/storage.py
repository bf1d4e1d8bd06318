"""Local and `s3://` paths behind one door: open, list, exists, atomic put, remove, JSON.

`object_store.py` below it is the door of s3fs, `tensor_files.py` above it that of safetensors. Paths are strings;
`s3://bucket/key` is remote, all else is local.
Writes become visible at once or not at all: a local file is written beside its final name and renamed, an S3 object
appears when its upload is complete. What a write has put there stays if the power goes (`durable.py`). What a store
refuses for a moment is asked again (`object_store.ask`).
"""

import errno
import io
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from m4v_dist import durable
from m4v_dist.errors import NoSpaceError
from m4v_dist.object_store import RangedFile, ask, endpoint, remote
from m4v_dist.object_store import s3 as _s3  # noqa: F401  the tests ask it for a bucket of their own

logger = logging.getLogger(__name__)

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says of a disk, or of a quota, that is full."""
_READ_BYTES = 8 * 2**20
"""What one request of a remote file that is read front to back asks for."""


def is_remote(path: str) -> bool:
    """Whether `path` names an object store."""
    return path.startswith("s3://")


def join(base: str, *parts: str) -> str:
    """Join path parts with one slash each, local or remote."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def exists(path: str) -> bool:
    """Whether a file or folder stands at `path`."""
    if is_remote(path):
        return ask(path, lambda filesystem: bool(filesystem.exists(path)))
    return os.path.exists(path)


def is_file(path: str) -> bool:
    """Whether a file, and no folder, stands at `path`."""
    if is_remote(path):
        return ask(path, lambda filesystem: bool(filesystem.isfile(path)))
    return os.path.isfile(path)


def shown(path: str) -> str:
    """The path for a message: behind a relative one stands where it leads from here."""
    return path if is_remote(path) or os.path.isabs(path) else f"{path} ({os.path.abspath(path)})"


def missing_bucket(path: str) -> str:
    """What to say if the bucket of a remote path is not there; empty if it is, and of a local path."""
    if not is_remote(path):
        return ""
    bucket = "/".join(path.split("/")[:3])
    return "" if exists(bucket) else f"there is no bucket {bucket} at {endpoint()}"


def size_bytes(path: str) -> int:
    """Size of the file at `path`, in bytes."""
    if is_remote(path):
        return ask(path, lambda filesystem: int(filesystem.size(path)))
    return os.path.getsize(path)


def list_folder(path: str) -> list[str]:
    """Names (not paths) of what stands directly in a folder, sorted; empty if there is no such folder."""
    if is_remote(path):
        return sorted(entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in ask(path, _entries_of(path)))
    return sorted(os.listdir(path)) if os.path.isdir(path) else []


def list_sizes(path: str) -> dict[str, int]:
    """Sizes in bytes of the files that stand directly in a folder, by name: one listing, and no question a file."""
    if is_remote(path):
        found = ask(path, _entries_of(path))
        return {e["name"].rsplit("/", 1)[-1]: int(e["size"]) for e in found if e["type"] == "file"}
    if not os.path.isdir(path):
        return {}
    with os.scandir(path) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def _entries_of(path: str) -> Callable[[Any], list[dict[str, Any]]]:
    def entries(filesystem: Any) -> list[dict[str, Any]]:
        # Not asked by exists(): of a bucket's own root, that says "no" for every error.
        try:
            found: list[dict[str, Any]] = filesystem.ls(path, detail=True)
        except FileNotFoundError:
            return []
        return found

    return entries


def make_folder(path: str) -> None:
    """Make a local folder with its parents; object stores have none to make."""
    if not is_remote(path):
        durable.make_folders(path)


def sync_folder(path: str) -> None:
    """Make durable which names stand in a local folder; of an object that was written, its store says so itself."""
    if not is_remote(path):
        durable.sync_folder(path)


@contextmanager
def open_read(path: str) -> Iterator[IO[bytes]]:
    """Open for reading bytes; a remote file is read in large ranges, each asked again where the store fails."""
    if is_remote(path):
        with remote(path), io.BufferedReader(RangedFile(path, size_bytes(path)), _READ_BYTES) as file:
            yield file
    else:
        with open(path, "rb") as file:
            yield file


def read_bytes(path: str, offset: int = 0, length: int | None = None) -> bytes:
    """Read `length` bytes from `offset` (all to the end when None): a ranged read, local or remote.

    Raises:
        EOFError: the file holds fewer bytes than were asked for.
    """
    if is_remote(path):
        end = None if length is None else offset + length
        data = ask(path, lambda filesystem: bytes(filesystem.cat_file(path, start=offset, end=end)))
    else:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read() if length is None else file.read(length)
    if length is not None and len(data) != length:
        raise EOFError(f"{path}: asked for {length} bytes at offset {offset}, got {len(data)}; the file is cut short.")
    return data


def read_into(path: str, offset: int, buffer: memoryview) -> None:
    """Fill a writable buffer of bytes from `offset`: as `read_bytes`, without a copy from a local file.

    Raises:
        EOFError: the file holds fewer bytes than were asked for.
    """
    if is_remote(path):
        buffer[:] = read_bytes(path, offset, len(buffer))
        return
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while done < len(buffer):
            count = file.readinto(buffer[done:])
            if not count:
                raise EOFError(
                    f"{path}: asked for {len(buffer)} bytes at offset {offset}, got {done}; the file is cut short."
                )
            done += count


def write_bytes(path: str, data: bytes) -> None:
    """Write a whole file so that readers see all of it or nothing.

    Raises:
        NoSpaceError: the disk is full.
    """
    write_chunks(path, lambda: [data], len(data))


def write_chunks(path: str, chunks: Callable[[], Iterable[bytes | memoryview]], size_bytes: int) -> None:
    """The same for what is too large for one `bytes`; a remote file goes up in parts.

    Args:
        path: the file.
        chunks: its bytes in order; called anew where a store is asked again.
        size_bytes: of all of them, for messages.

    Raises:
        NoSpaceError: the disk is full.
    """
    if is_remote(path):
        ask(path, lambda filesystem: _upload(filesystem, path, chunks()))
        return
    temporary = f"{path}.tmp-{uuid.uuid4().hex[:8]}"
    with naming_full_disk(path, size_bytes):
        durable.make_folders(os.path.dirname(path) or ".")
        try:
            with open(temporary, "wb") as file:
                for chunk in chunks():
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            durable.rename(temporary, path)
        finally:
            remove(temporary)


@contextmanager
def naming_full_disk(path: str, size_bytes: int) -> Iterator[None]:
    """Say of a full disk which local file met it, how many bytes it is to have, and how many are free.

    Raises:
        NoSpaceError: in place of the system's own error; every other error passes.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
        raise NoSpaceError(
            f"{path}: {error.strerror}: {size_bytes:,} bytes are needed, {free:,} are free on that disk; make room, "
            "raise the quota, or give another folder."
        ) from error


def _upload(filesystem: Any, path: str, chunks: Iterable[bytes | memoryview]) -> None:
    file = filesystem.open(path, "wb")
    try:
        for chunk in chunks:
            file.write(chunk)
        file.close()
    except BaseException:
        # Closed first: s3fs would upload what it has when the object is collected. Then the parts that went up are
        # dropped: else they stay in the store, and nobody sees them but the bill.
        file.closed = True
        file.discard()
        raise


def _create_exclusively(path: str, data: bytes) -> bool:
    """For mounts without hard links: a reader may meet a file that is not whole yet."""
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(file, "wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())
    durable.sync_folder(os.path.dirname(path) or ".")
    return True


def create_bytes(path: str, data: bytes) -> bool:
    """Write a whole small file only if there is none yet; False if there is one. One of several callers wins.

    A store that does not know conditional writes (If-None-Match) lets the last of them win: read it back to be sure.
    So it is after a retry too: the file that is there may be the caller's own.
    """
    if is_remote(path):

        def create(filesystem: Any) -> bool:
            try:
                filesystem.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            return True

        return ask(path, create)
    temporary = f"{path}.tmp-{uuid.uuid4().hex[:8]}"
    write_bytes(temporary, data)
    try:
        # Whole from the start, unlike a file opened with O_EXCL; also over NFS.
        os.link(temporary, path)
        durable.sync_folder(os.path.dirname(path) or ".")
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        logger.info("%s: no hard links there (%s); created by O_EXCL instead.", path, error.strerror)
        return _create_exclusively(path, data)
    finally:
        remove(temporary)
    return True


def put_file(local_path: str, path: str) -> None:
    """Move a finished local file to its place, at once."""
    if is_remote(path):
        ask(path, lambda filesystem: filesystem.put_file(local_path, path))
        os.remove(local_path)
        return
    durable.make_folders(os.path.dirname(path) or ".")
    temporary = f"{path}.tmp-{uuid.uuid4().hex[:8]}"
    shutil.move(local_path, temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    durable.rename(temporary, path)


def remove(path: str) -> None:
    """Remove a file, or a folder with all in it; nothing happens if there is none."""
    if is_remote(path):
        ask(path, lambda filesystem: filesystem.rm(path, recursive=True) if filesystem.exists(path) else None)
    elif os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)


def read_json(path: str) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: not JSON; the message names the file.
    """
    try:
        return json.loads(read_bytes(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}); the file is damaged, remove it or write it anew."
        ) from error


def parse_json_lines(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """Parse JSON objects, one a line, as an append-only writer leaves them; empty lines are passed over.

    Returns:
        The objects in order, and the number of lines that are none: torn by a lost node or a full disk. A caller counts
        them aloud, or fails.
    """
    rows: list[dict[str, Any]] = []
    num_torn = 0
    for line in data.split(b"\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        # ValueError: no JSON, or bytes that are no UTF-8 (a block that the disk never got).
        except ValueError:
            num_torn += 1
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            num_torn += 1
    return rows, num_torn


def json_bytes(value: Any) -> bytes:
    """JSON with sorted keys, as our files hold it."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def write_json(path: str, value: Any) -> None:
    """Write JSON with sorted keys, atomically."""
    write_bytes(path, json_bytes(value))
