"""An S3 store as a file system: how it is asked, what is asked again, and what its errors become.

The only file that imports s3fs, botocore and aiohttp. `storage.py` is the door for everybody else.
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from m4v_dist.errors import StoreError
from m4v_dist.retries import retrying

RETRY_LIMIT_S = 120.0
"""How long a store that fails is asked again: several times a restart of its front end."""

Answer = TypeVar("Answer")


def s3() -> Any:
    """The file system; credentials and endpoint come from the environment."""
    import s3fs

    # Explicit timeouts: the defaults let a stalled server hold a job for minutes. Few retries below ours, which are
    # logged and counted.
    config = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 2, "mode": "standard"}}
    return s3fs.S3FileSystem(config_kwargs=config, use_listings_cache=False)


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
        return retrying(lambda: call(s3()), may_pass=may_pass, what=path, limit_s=RETRY_LIMIT_S)


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
            f"{path}: {type(error).__name__}: {error}. The store takes credentials and endpoint from the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; AWS_ENDPOINT_URL where it is not AWS) or "
            "from the machine's role; every node needs them."
        ) from error
