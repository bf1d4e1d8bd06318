"""Takes records out of a finished cache by a list: out of its index, so that no reader finds them again.

Their bytes stay in the tars. The fragment's notes keep who was dropped and when, so that a list given twice changes
nothing, a rerun of the precompute finds its shards committed, and a shard that is done anew leaves them out again.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.cache_census import with_counts
from data_pipeline.cache_manifest import MANIFEST, fragment_paths, index_path, require_manifest
from data_pipeline.index_table import INDEX, write_merged_index
from data_pipeline.latent_cache import is_index_sound
from data_pipeline.manifest import IndexRow, read_index, without_rows, write_index
from data_pipeline.precompute_report import count_dropped
from data_pipeline.record_list import RecordName
from m4v_dist import storage
from m4v_dist.errors import DataError

logger = logging.getLogger(__name__)

DROPPED = "dropped"
"""Key of a fragment's notes, and of the manifest's sources."""
_SHOWN = 5


@dataclass(frozen=True)
class DropPlan:
    """What a list asks of a cache.

    Args:
        cache: its folder.
        manifest: as it is.
        fragments: names of the index fragments that change, with the records to take out of each.
        num_before: records of the list that were dropped before.
    """

    cache: str
    manifest: dict[str, Any]
    fragments: Mapping[str, tuple[RecordName, ...]]
    num_before: int

    @property
    def num_records(self) -> int:
        """Records that will be dropped."""
        return sum(len(names) for names in self.fragments.values())


def plan_drop(cache: str, names: Sequence[RecordName]) -> DropPlan:
    """Find the records of a list; nothing is written.

    Raises:
        DataError: no finished cache, a damaged index fragment, or names that the cache neither holds nor held.
    """
    manifest = require_manifest(cache)
    wanted, before = dict.fromkeys(names), set[RecordName]()
    found: dict[RecordName, str] = {}
    for fragment in manifest["fragments"]:
        rows, notes = read_index(index_path(cache, fragment))
        found.update({name: fragment for name in map(_name, rows) if name in wanted})
        before |= {RecordName(entry["source"], entry["key"]) for entry in notes.get(DROPPED, ())} & wanted.keys()
    unknown = [str(name) for name in wanted if name not in found and name not in before]
    if unknown:
        shown = ", ".join(unknown[:_SHOWN]) + (f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else "")
        raise DataError(
            f"{cache}: holds no record {shown}; nothing was dropped. Correct the list (what was quarantined or "
            f"filtered is in no cache): the sources are {', '.join(sorted(manifest['sources']))}."
        )
    fragments: dict[str, list[RecordName]] = {}
    for name in wanted:
        if name in found:
            fragments.setdefault(found[name], []).append(name)
    changed = {fragment: tuple(of_it) for fragment, of_it in sorted(fragments.items())}
    return DropPlan(cache, manifest, changed, len(wanted) - len(found))


def drop_records(plan: DropPlan, when: str, require_held: Callable[[], None] = lambda: None) -> None:
    """Take the records out of their index fragments, each written at once, then bring manifest and report up to date.

    Killed half-way, a part of the list is dropped; the same list drops the rest.

    Args:
        plan: of `plan_drop`, made just before.
        when: the time to note down, ISO 8601.
        require_held: asked before anything is written; raises where another job has the cache now.
    """
    manifest = plan.manifest
    require_held()
    if plan.fragments:
        # derived, and merged anew below: until then readers take the fragments themselves
        storage.remove(storage.join(plan.cache, INDEX))
    for fragment, names in plan.fragments.items():
        require_held()
        _drop_from(index_path(plan.cache, fragment), {name.key for name in names}, when)
    counted = with_counts(manifest, (read_index(path) for path in fragment_paths(plan.cache, manifest).values()))
    require_held()
    if counted != manifest or not is_index_sound(plan.cache, manifest):
        index = write_merged_index(plan.cache, fragment_paths(plan.cache, manifest))
        storage.write_json(storage.join(plan.cache, MANIFEST), {**counted, "index": index})
    count_dropped(plan.cache, Counter(name.source for names in plan.fragments.values() for name in names))


def _drop_from(path: str, keys: set[str], when: str) -> None:
    """Write an index fragment without some of its records."""
    rows, notes = read_index(path)
    kept, changed = without_rows(rows, notes, keys)
    entries = [{"key": row.key, "source": row.source, "when": when} for row in rows if row.key in keys]
    write_index(path, kept, {**changed, DROPPED: [*notes.get(DROPPED, ()), *entries]})
    logger.info("%s: dropped %d of %d records", path, len(entries), len(rows))


def dropped_before(cache: str, fragment: str) -> dict[str, dict[str, str]]:
    """Entries of the records that a list took out of a fragment, by key; empty where there is no such fragment."""
    path = index_path(cache, fragment)
    if not storage.exists(path):
        return {}
    return {entry["key"]: entry for entry in read_index(path)[1].get(DROPPED, ())}


def _name(row: IndexRow) -> RecordName:
    return RecordName(row.source, row.key)
