"""An S3 store as a file system: how it is asked, what is asked again, and what its errors become.

The only file that imports s3fs, botocore and aiohttp. `storage.py` is the door for everybody else.
"""

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from m4v_dist.errors import StoreError
from m4v_dist.retries import retrying

RETRY_LIMIT_S = 120.0
"""How long a store that fails is asked again: several times a restart of its front end."""

READ_TIMEOUT_S = 60.0
"""How long a store that has taken a request may say nothing."""
_SHORT_READS = 5
"""How often a store may send fewer bytes than it was asked for, and than the object holds, before it is an error."""

Answer = TypeVar("Answer")


def s3() -> Any:
    """The file system; credentials and endpoint come from the environment."""
    import s3fs

    # Explicit timeouts: the defaults let a stalled server hold a job for minutes. Few retries below ours, which are
    # logged and counted.
    config = {"connect_timeout": 10, "read_timeout": READ_TIMEOUT_S, "retries": {"max_attempts": 2, "mode": "standard"}}
    return s3fs.S3FileSystem(config_kwargs=config, use_listings_cache=False)


def endpoint() -> str:
    """Where requests go, for messages."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"


def may_pass(error: Exception) -> bool:
    """Whether a store's error is one of its bad moments (5xx, timeout, broken connection) and no answer."""
    from aiohttp import ClientError
    from botocore.exceptions import ConnectionError as StoreConnectionError
    from botocore.exceptions import HTTPClientError

    if isinstance(error, HTTPClientError | StoreConnectionError | ClientError | TimeoutError | ConnectionError):
        return True
    # s3fs's words for 500, 503 and SlowDown, and for codes that it does not know, 502 and 504 among them.
    return isinstance(error, OSError) and error.errno in (errno.EREMOTEIO, errno.EBUSY, errno.EIO)


def ask(path: str, call: Callable[[Any], Answer]) -> Answer:
    """Answer of `call(file system)`, asked again while the store has a bad moment, for RETRY_LIMIT_S at most.

    Args:
        path: for messages.
        call: may be called several times.

    Raises:
        StoreError: see `remote`.
        OSError: what the store answered.
    """
    with remote(path):
        try:
            return retrying(lambda: call(s3()), may_pass=may_pass, what=path, limit_s=RETRY_LIMIT_S)
        except OSError as error:
            if not may_pass(error) or error.filename is not None:
                raise
            # s3fs gives the store's words and not what was asked for
            words = f"{error.strerror or error} (asked at {endpoint()} for {RETRY_LIMIT_S:g} s)"
            raise OSError(error.errno or errno.EIO, words, path) from error


class RangedFile(io.RawIOBase):
    """An object as a file for reading, each read a range of its own that is asked again like any other.

    s3fs's own file object gives up on a stream after a few failures; hours of reading meet many.

    Args:
        path: of the object.
        size_bytes: its size.
    """

    def __init__(self, path: str, size_bytes: int) -> None:
        super().__init__()
        self._path, self._size_bytes, self._offset = path, size_bytes, 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; see `io.IOBase`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._size_bytes}[whence]
        self._offset = base + offset
        return self._offset

    def tell(self) -> int:
        """Where it stands."""
        return self._offset

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, or as much of it as is left.

        Raises:
            OSError: the store failed, or sent too few bytes again and again: of an object whose size is known, that is
                no end of the file.
        """
        start, end = self._offset, min(self._offset + len(buffer), self._size_bytes)
        if start >= end:
            return 0
        for _ in range(_SHORT_READS):
            data = ask(self._path, lambda filesystem: bytes(filesystem.cat_file(self._path, start=start, end=end)))
            if len(data) == end - start:
                buffer[: len(data)] = data
                self._offset = end
                return len(data)
        raise OSError(
            errno.EIO,
            f"the store sent {len(data)} of {end - start} bytes at offset {start}, {_SHORT_READS} times over; the "
            f"object holds {self._size_bytes}",
            self._path,
        )


@contextmanager
def remote(path: str) -> Iterator[Any]:
    """The file system for one exchange; what it answers is an OSError, as on a local disk.

    s3fs turns answers into OSErrors, but not what stops a request before it is sent: no credentials, no region, no
    server.

    Raises:
        StoreError: it cannot be asked, or refuses these credentials.
    """
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError

    try:
        yield s3()
    except (BotoCoreError, ClientError, PermissionError) as error:
        raise StoreError(
            f"{path}: {type(error).__name__}: {error} (asked at {endpoint()}). The store takes credentials and "
            "endpoint from the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; "
            "AWS_ENDPOINT_URL where it is not AWS) or from the machine's role; every node needs them."
        ) from error
