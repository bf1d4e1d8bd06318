"""What one process of a host fetches and the others find: files that they share, for as long as there is room.

A file is written beside its name and renamed, so it is whole or not there; its name is a checksum of what it holds, so
it is never another. Whoever wants one that is not there takes its lock (`flock`, which the system lets go when a
process dies, however it dies), looks again, and fetches it; the others wait, but not for ever: past `wait_s` they fetch
it for themselves. Nobody relies on a file: one that is gone, short or cut is fetched again. So any process may remove
any file at any time, and the oldest go when a new one needs their room: what killed processes leave stays within that.
"""

import errno
import fcntl
import logging
import os
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from m4v_dist import storage

logger = logging.getLogger(__name__)

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05
_INDEX_WAIT_S = 600.0
_INDEX_READ_BYTES = 64 << 20
_MAX_INDEXES = 4


class SharedReads:
    """A bounded folder of records that ranks of one host share.

    Args:
        max_bytes: of all files; each process may exceed it by one file for a moment.
        folder: None takes one of this user's in memory (`/dev/shm`), or among the temporary files where there is none.
        wait_s: how long another process's read is waited for.

    Attributes:
        num_found: buffers that were filled from a file of another process.
        num_waits_ended: waits that were given up.
        num_not_left: reads that found no room in the folder.
    """

    def __init__(self, max_bytes: int, folder: str | None = None, wait_s: float = 60.0) -> None:
        self.num_found = self.num_waits_ended = self.num_not_left = 0
        self._max_bytes, self._wait_s = max_bytes, wait_s
        self._folder = folder or _own_folder("reads", "/dev/shm")
        self._left: deque[str] = deque(maxlen=4096)

    def fill(self, name: str, buffer: memoryview, load: Callable[[memoryview], None]) -> bool:
        """Fill a buffer from the file of that name, or load it and leave it there for the others.

        Args:
            name: checksum of what it is filled with.
            buffer: as long as the file must be.
            load: fills it; its errors are raised, and keep no other process from trying.

        Returns:
            whether another process had loaded it.
        """
        if self._take(name, buffer):
            return True
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        with _locked(os.path.join(self._folder, f"lock-{name[:2]}"), self._wait_s) as is_locked:
            if is_locked and self._take(name, buffer):
                return True
            load(buffer)
            if is_locked:
                self._leave(name, buffer)
            else:
                self.num_waits_ended += 1
        return False

    def forget(self, name: str) -> None:
        """Remove a file, whose content turned out to be wrong."""
        _remove(os.path.join(self._folder, name))

    def close(self) -> None:
        """Remove what this process left, as far as it remembers; others fetch again what they still want."""
        while self._left:
            self.forget(self._left.popleft())

    def _take(self, name: str, buffer: memoryview) -> bool:
        try:
            with open(os.path.join(self._folder, name), "rb", buffering=0) as file:
                is_whole = os.fstat(file.fileno()).st_size == len(buffer) and file.readinto(buffer) == len(buffer)
        except FileNotFoundError:
            return False
        self.num_found += is_whole
        return is_whole

    def _leave(self, name: str, buffer: memoryview) -> None:
        temporary = os.path.join(self._folder, f"{name}.tmp-{uuid.uuid4().hex[:8]}")
        try:
            if not self._make_room(len(buffer)):
                self.num_not_left += 1
                return
            with open(temporary, "wb", buffering=0) as file:
                file.write(buffer)
            os.rename(temporary, os.path.join(self._folder, name))
            self._left.append(name)
        except FileNotFoundError:
            # somebody made room by it; it was there to save reads, and this process has its own
            self.num_not_left += 1
        except OSError as error:
            if error.errno not in storage.NO_SPACE:
                raise
            if not self.num_not_left:
                logger.warning("%s: %s; ranks read for themselves what does not fit.", self._folder, error.strerror)
            self.num_not_left += 1
            _remove(temporary)

    def _make_room(self, size_bytes: int) -> bool:
        """Remove the oldest files until there is room; False if there never will be."""
        files = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if not entry.name.startswith("lock-"):
                    try:
                        found = entry.stat()
                    except FileNotFoundError:
                        continue
                    files.append((found.st_mtime_ns, found.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total + size_bytes <= self._max_bytes:
                break
            _remove(path)
            total -= size
        return total + size_bytes <= self._max_bytes


def local_copy(remote: str, checksum: str, size_bytes: int, folder: str | None = None) -> str:
    """Path of a copy of a remote file among this user's temporary files, made once for all processes of the host.

    The newest few copies are kept. Removing one does no harm to a process that has it mapped.

    Args:
        remote: the file.
        checksum: of its content; the name of the copy. Whoever uses the copy checks it.
        size_bytes: of the file.
        folder: None takes the usual one.

    Raises:
        FileNotFoundError: no such file.
        EOFError: it is shorter.
        TimeoutError: another process has been fetching it for too long.
    """
    folder = folder or _own_folder("index", tempfile.gettempdir())
    os.makedirs(folder, mode=0o700, exist_ok=True)
    path = os.path.join(folder, checksum)
    with _locked(f"{path}.lock", _INDEX_WAIT_S) as is_locked:
        if not is_locked:
            raise TimeoutError(f"{remote}: another process of this host has been fetching it for {_INDEX_WAIT_S:.0f} s")
        if os.path.exists(path) and os.path.getsize(path) == size_bytes:
            os.utime(path)
            return path
        temporary = f"{path}.tmp"  # of whoever holds the lock: what a killed one left is written over
        with open(temporary, "wb") as file:
            for start in range(0, size_bytes, _INDEX_READ_BYTES):
                file.write(storage.read_bytes(remote, start, min(_INDEX_READ_BYTES, size_bytes - start)))
        os.rename(temporary, path)
    copies = [os.path.join(folder, name) for name in os.listdir(folder) if "." not in name]
    for old in sorted(copies, key=os.path.getmtime)[:-_MAX_INDEXES]:
        _remove(old)
        _remove(f"{old}.lock")
    return path


@contextmanager
def _locked(path: str, wait_s: float) -> Iterator[bool]:
    """Hold a lock over processes and threads; yields whether it could be had in time."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield _try_lock(descriptor, wait_s)
    finally:
        os.close(descriptor)  # lets go of the lock


def _try_lock(descriptor: int, wait_s: float) -> bool:
    deadline, pause_s = time.monotonic() + wait_s, _SHORTEST_PAUSE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _own_folder(what: str, base: str) -> str:
    """A folder of this user alone."""
    base = base if os.path.isdir(base) and os.access(base, os.W_OK) else tempfile.gettempdir()
    return os.path.join(base, f"m4v-{what}-{os.getuid()}")


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):
        os.remove(path)
