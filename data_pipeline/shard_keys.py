"""Keys of a raw shard from its first bytes: whether a source's shards number their records each from the start.

Such shards are refused before any work, since most of their records would be quarantined after it
(`duplicate_keys.py`).
"""

import io
import tarfile
from collections.abc import Sequence

from data_pipeline.pack import split_name
from m4v_dist.errors import DataError


def first_key(head: bytes) -> str | None:
    """Key of a tar's first member, from the bytes that it begins with; None where they hold no whole header."""
    try:
        with tarfile.open(fileobj=io.BytesIO(head), mode="r:") as tar:
            member = tar.next()
    except (tarfile.TarError, EOFError, ValueError):
        return None
    return None if member is None else split_name(member.name)[0]


def require_keys_of_their_own(first_keys: Sequence[tuple[str, str, str | None]]) -> None:
    """Check that no two shards of a source begin with the same key.

    Args:
        first_keys: (source, path of the shard, key or None) of every shard.

    Raises:
        DataError: naming two of them.
    """
    seen: dict[tuple[str, str], str] = {}
    for source, path, key in first_keys:
        if key is None:
            continue
        if (source, key) in seen:
            raise DataError(
                f"source {source!r}: {seen[source, key]} and {path} both begin with the key {key!r}, but a key names "
                "one record of a source; write them anew with keys that differ (the shard's name in front of each will "
                "do), or make them two sources."
            )
        seen[source, key] = path
