"""Checks a whole cache: every record read, tars against the index, the index against the manifest.

A tar is known to be whole without a second reading: the records' byte ranges follow one another from its first byte,
each is the three members of a record by its checksum, and zeros follow. That is a tar, and WebDataset reads it
(tests/data_pipeline/test_cache_check.py holds the two together).
"""

import errno
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.cache_census import with_counts
from data_pipeline.cache_manifest import index_path, read_null_text, require_manifest, shard_path
from data_pipeline.cache_record import CorruptRecordError
from data_pipeline.index_table import INDEX
from data_pipeline.latent_cache import LatentCache, is_index_sound
from data_pipeline.manifest import IndexRow, read_index, tar_spans
from data_pipeline.record_list import ListedRecord, RecordName
from m4v_dist import storage
from m4v_dist.errors import DataError

END_MARK_BYTES = 1024
"""Zeros that end a tar, at least."""


@dataclass
class CheckReport:
    """What a check found.

    Args:
        num_records, size_bytes: read, and found whole or not.
        num_dropped: records that were dropped by a list; their bytes are not read.
        damaged: records that cannot be used.
        problems: what is wrong beside the records: an index fragment, a shard's layout, the manifest.
        unused: files that no part of the cache names: shards without a fragment, fragments that the manifest does not
            name, drafts of a run that was killed. They are no damage.
    """

    num_records: int = 0
    size_bytes: int = 0
    num_dropped: int = 0
    damaged: list[ListedRecord] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether every record can be read and all parts agree."""
        return not self.damaged and not self.problems


def check_cache(path: str, num_threads: int, on_record: Callable[[], object]) -> CheckReport:
    """Read and check every record of a finished cache.

    Args:
        path: the cache's folder, local or s3://.
        num_threads: records that are read at once.
        on_record: called after each.

    Raises:
        DataError: no finished cache, of another format version, or without the empty prompt's features.
        OSError: the storage failed, so that what is whole cannot be told from what is not.
    """
    manifest = require_manifest(path)
    report = CheckReport()
    cache = LatentCache(path, manifest, {}, read_null_text(path, manifest))
    fragments: list[tuple[list[IndexRow], dict[str, Any]]] = []
    first_shard: dict[RecordName, str] = {}
    with ThreadPoolExecutor(num_threads, thread_name_prefix="check") as threads:
        for name in manifest["fragments"]:
            try:
                rows, notes = read_index(index_path(path, name))
            except DataError as error:
                report.problems.append(str(error))
                continue
            fragments.append((rows, notes))
            report.num_dropped += len(notes.get("dropped", ()))
            _check_keys(rows, first_shard, report)
            _check_layout(path, name, rows, notes, report)
            for row, error_text in zip(rows, threads.map(lambda row: _fault(cache, row), rows), strict=True):
                report.num_records += 1
                report.size_bytes += row.size_bytes
                if error_text is not None:
                    report.damaged.append(ListedRecord(RecordName(row.source, row.key), row.shard, error_text))
                on_record()
    if len(fragments) == len(manifest["fragments"]):
        _check_counts(manifest, fragments, report)
    if not is_index_sound(path, manifest):
        report.problems.append(
            f"{storage.join(path, INDEX)}: is not made of these fragments, or is missing; run jobs.precompute_latents "
            "again, which merges them anew"
        )
    _find_unused(path, manifest["fragments"], report)
    return report


def _fault(cache: LatentCache, row: IndexRow) -> str | None:
    """Why a record cannot be used, or None."""
    try:
        latents, _ = cache.read_all(row)
    except (CorruptRecordError, DataError) as error:
        return str(error)
    except OSError as error:
        # a bad sector is damage of this record; a store that cannot be asked says nothing of it
        if error.errno != errno.EIO:
            raise
        return f"the disk cannot read it: {error}"
    stride = cache.spatial_stride
    channels = cache.manifest.get("latent_channels", latents.shape[0])
    wanted = (channels, row.num_latents, row.height_px // stride, row.width_px // stride)
    if tuple(latents.shape) != wanted:
        return f"latents are {tuple(latents.shape)}, the index says {wanted}"
    if not bool(latents.isfinite().all()):
        return "latents are not finite"
    return None


def _check_keys(rows: list[IndexRow], first_shard: dict[RecordName, str], report: CheckReport) -> None:
    for row in rows:
        name = RecordName(row.source, row.key)
        if name in first_shard:
            report.problems.append(f"{name} stands twice, in shard {first_shard[name]} and in shard {row.shard}")
        first_shard.setdefault(name, row.shard)


def _check_layout(path: str, name: str, rows: list[IndexRow], notes: Mapping[str, Any], report: CheckReport) -> None:
    """Check that the records' byte ranges, with those of dropped ones, are the whole tar, each byte once."""
    tar = shard_path(path, name)
    strangers = [row.key for row in rows if row.shard != name]
    if strangers:
        report.problems.append(f"{index_path(path, name)}: {strangers[:5]} are said to stand in another shard")
    spans = tar_spans(rows, notes)
    if not spans:
        return
    if not storage.exists(tar):
        report.problems.append(f"{tar}: is missing; {len(rows)} records stand in it")
        return
    end = 0
    for offset, size, key in spans:
        if offset != end:
            what = "overlaps the record before it" if offset < end else "leaves bytes of no record before it"
            report.problems.append(f"{tar}: {key} at byte {offset} {what} (which ends at {end})")
        end = offset + size
    size = storage.size_bytes(tar)
    tail = storage.read_bytes(tar, end, size - end) if END_MARK_BYTES <= size - end <= 2**20 else b"?"
    if any(tail):
        report.problems.append(
            f"{tar}: has {size} bytes, its records end at {end}, and no end mark of a tar follows; it was cut or is "
            "another file"
        )


def _check_counts(
    manifest: dict[str, Any], fragments: list[tuple[list[IndexRow], dict[str, Any]]], report: CheckReport
) -> None:
    counted = with_counts(manifest, fragments)
    for name, source in manifest["sources"].items():
        found = counted["sources"][name]
        if any(source.get(count, found[count]) != found[count] for count in ("records", "dropped")):
            report.problems.append(f"manifest.json: source {name} is {source}, but the index has {found}")
    if manifest.get("totals", counted["totals"]) != counted["totals"]:
        report.problems.append(f"manifest.json: totals {manifest['totals']}, but the index has {counted['totals']}")


def _find_unused(path: str, fragments: list[str], report: CheckReport) -> None:
    for folder, ending in (("shards", ".tar"), ("index", ".parquet")):
        named = {f"{name}{ending}" for name in fragments}
        report.unused += [f"{folder}/{name}" for name in storage.list_folder(f"{path}/{folder}") if name not in named]
