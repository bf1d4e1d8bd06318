"""`python -m jobs.pack --config FILE pack.input=... pack.shards=...`: media and captions into WebDataset shards.

`pack.input` is a folder of media with `.json` and/or `.txt` beside each file, or a JSON Lines file of annotations, such
as PyramidFlow's. Equal input gives equal bytes.
"""

import logging
import re
import sys

from tqdm import tqdm

from data_pipeline.media_list import MediaList, list_media, read_annotations, read_media
from data_pipeline.pack import write_shards
from jobs import cli
from m4v_dist import storage
from m4v_dist.config.schema import PackSettings, RunConfig
from m4v_dist.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"%0(\d+)d")
_SHOWN = 10


def pack(config: RunConfig, dry_run: bool) -> str:
    """Write the shards.

    Raises:
        ConfigError: input or shards are not named, or shards stand there already.
        DataError: nothing to pack, or more entries than `pack.max_bad_fraction` cannot be; nothing was written.
    """
    settings = config.pack
    if settings.input is None or settings.shards is None:
        raise ConfigError("pack.input and pack.shards must be set: what to pack, and where, as shards/clips-%05d.tar.")
    pattern = settings.shards
    _require_no_shards(pattern)
    found = _entries(settings.input, settings)
    errors = storage.join(config.run.folder, "pack_errors.txt")
    total = len(found.entries) + len(found.errors)
    for line in found.errors[:_SHOWN]:
        logger.warning("left out: %s", line)
    if not dry_run:
        storage.write_bytes(errors, "".join(f"{line}\n" for line in found.errors).encode())
    if not found.entries or len(found.errors) > settings.max_bad_fraction * total:
        raise DataError(
            f"{settings.input}: {len(found.errors)} of {total} entries cannot be packed, more than "
            f"pack.max_bad_fraction={settings.max_bad_fraction:g} ({'; '.join(found.errors[:3]) or 'it is empty'}); "
            + ("mend them" if dry_run else f"{errors} lists them all: mend them")
            + ", or raise the limit. Nothing was packed."
        )
    told = f"{len(found.errors)} left out, {found.num_ignored} other files"
    if dry_run:
        return f"dry run: would pack {len(found.entries)} records to {pattern} ({told})"
    clips = read_media(found.entries, settings.num_threads)
    records = tqdm(clips, desc="pack", total=len(found.entries), unit="record")
    paths = write_shards(records, pattern, settings.records_per_shard, settings.max_shard_mib * 2**20)
    shards = _braces(pattern, len(paths))
    return f"{len(found.entries)} records in {len(paths)} shards ({told}); give the source shards = {shards!r}"


def _entries(path: str, settings: PackSettings) -> MediaList:
    if path.endswith((".jsonl", ".ndjson")):
        return read_annotations(path, settings.root, settings.media)
    if settings.root is not None:
        raise ConfigError(f"pack.root={settings.root!r} is for a file of annotations, and pack.input is a folder.")
    return list_media(path, settings.media, settings.num_threads)


def _require_no_shards(pattern: str) -> None:
    """Refuse to mix new shards with those of another packing, of which some might stay.

    Raises:
        ConfigError: naming the first.
    """
    folder, _, name = pattern.rpartition("/")
    head, width, tail = _NUMBER.split(name)
    shards = re.compile(f"{re.escape(head)}\\d{{{width},}}{re.escape(tail)}")
    there = [name for name in storage.list_folder(folder or ".") if shards.fullmatch(name)]
    if there:
        raise ConfigError(
            f"pack.shards={pattern!r}: {there[0]} stands there already ({len(there)} such shards); remove them, or "
            "give another name."
        )


def _braces(pattern: str, count: int) -> str:
    """The pattern of all shards as `sources.shards` takes it."""
    head, width, tail = _NUMBER.split(pattern)
    first, last = (f"{number:0{width}d}" for number in (0, count - 1))
    return f"{head}{first if count == 1 else f'{{{first}..{last}}}'}{tail}"


if __name__ == "__main__":
    sys.exit(cli.main("pack", pack, "Pack media and captions into WebDataset shards."))
