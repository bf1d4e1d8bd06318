"""How often a worker died in a raw shard, by notes that only a death leaves behind.

Ray Data gives a lost actor's task to another for ever, which would never end at a shard that eats all memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from m4v_dist import storage
from m4v_dist.errors import RetriesExhaustedError

ATTEMPTS = "attempts"
"""Folder of the cache with a note for each shard that is being done."""
_MAX_WORKER_LOSSES = 4


@contextmanager
def counted_attempt(cache: str, name: str, path: str) -> Iterator[None]:
    """Note that a worker is at a shard; an error that it raises removes the note, for it is reported by itself.

    Args:
        cache: folder of the cache.
        name: of the note, unique among those of a run.
        path: of the raw shard, for the message.

    Raises:
        RetriesExhaustedError: too many workers died there in this run.
    """
    note = storage.join(cache, ATTEMPTS, name)
    losses = int(storage.read_bytes(note)) if storage.exists(note) else 0
    if losses >= _MAX_WORKER_LOSSES:
        raise RetriesExhaustedError(
            f"{path}: its worker died {losses} times (out of memory, or its node gone); give an actor more memory by "
            "fewer actors, and see Ray's logs."
        )
    storage.write_bytes(note, str(losses + 1).encode())
    try:
        yield
    finally:
        storage.remove(note)
