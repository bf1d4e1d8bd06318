"""What a local disk keeps when the power goes: folders whose entries are on the disk, and not in memory alone.

fsync of a file makes its bytes durable, and not the name that it was given in its folder: a file that was renamed into
place can be gone after a loss of power, while one that was renamed later is there. So the folder is synced too.

Floor 1 of the house: the standard library only. `storage.py` is the door for everybody else.
"""

import errno
import logging
import os

logger = logging.getLogger(__name__)

_CANNOT = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES)
"""Of a folder that cannot be synced: mounts of object stores and some network mounts know only files, and a folder that
may be written and not read cannot be opened. Their entries are as durable as their server makes them."""


def sync_folder(path: str) -> None:
    """Make durable which names stand in a folder, where its file system can.

    Raises:
        OSError: it can, and failed.
    """
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        logger.debug(
            "%s: a file system that syncs no folders (%s): its newest files may go with the power.", path, error
        )


def make_folders(path: str) -> None:
    """Make a folder with its parents, each with a durable name; nothing happens if it is there."""
    missing, at = [], os.path.abspath(path)
    while not os.path.isdir(at):
        missing.append(at)
        at = os.path.dirname(at)
    os.makedirs(path, exist_ok=True)
    for made in reversed(missing):
        sync_folder(os.path.dirname(made))


def rename(source: str, path: str) -> None:
    """Put a finished file in its place, at once and durably."""
    os.replace(source, path)
    sync_folder(os.path.dirname(path) or ".")
