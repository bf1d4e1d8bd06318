"""Keys that stand in two shards of a source: the record of the first shard stands, the later ones are quarantined.

A key names one record of a source: lists, messages and the noise of a codec that draws go by it.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipeline.cache_manifest import index_path
from data_pipeline.manifest import IndexRow, read_index, without_rows, write_index
from data_pipeline.precompute_plan import ShardOutcome, ShardTask


def quarantine_duplicates(
    cache: str, tasks: Sequence[ShardTask], outcomes: Mapping[str, ShardOutcome]
) -> dict[str, ShardOutcome]:
    """Take records whose key stands in an earlier shard of their source out of the index, and count them.

    Args:
        cache: all shards of which are committed.
        tasks: every shard, in order: the first that has a key keeps it.
        outcomes: by output name.

    Returns:
        the outcomes, those of changed fragments anew.
    """
    twice = _keys_that_come_again(cache, tasks)
    if not twice:
        return dict(outcomes)
    found, first = dict(outcomes), dict[tuple[str, str], str]()
    for task in tasks:
        path = index_path(cache, task.name)
        rows, notes = read_index(path)
        file = task.path.rsplit("/", 1)[-1]
        again: set[str] = set()
        for row in rows:
            if _hash(row) in twice and first.setdefault((task.source, row.key), file) != file:
                again.add(row.key)
        if again:
            kept, changed = without_rows(rows, notes, again)
            where = {"shard": file, "source": task.source}
            errors = [
                {"key": key, **where, "error": f"key stands in {first[task.source, key]} too"} for key in sorted(again)
            ]
            changed["quarantined"] = [*notes["quarantined"], *errors]
            write_index(path, kept, changed)
            found[task.name] = ShardOutcome(**changed)
    return found


def _keys_that_come_again(cache: str, tasks: Sequence[ShardTask]) -> set[int]:
    """Hashes of keys that stand twice; eight bytes a record in memory, for an index of any size."""
    hashes = [
        np.fromiter((_hash(row) for row in read_index(index_path(cache, task.name))[0]), dtype=np.uint64)
        for task in tasks
    ]
    values, counts = np.unique(np.concatenate(hashes), return_counts=True) if hashes else (np.empty(0), np.empty(0))
    return {int(value) for value in values[counts > 1]}


def _hash(row: IndexRow) -> int:
    return int.from_bytes(hashlib.blake2b(f"{row.source}/{row.key}".encode(), digest_size=8).digest(), "little")
