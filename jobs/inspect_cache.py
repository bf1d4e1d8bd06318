"""`python -m jobs.inspect_cache SUBJECT --config FILE`: looks into `precompute.cache`; the subject comes first.

table: records, frames, latents, seconds, captions, tokens and MiB by source and bucket. Writes nothing.

histograms: distributions of lengths, captions, sizes and scores, to `<run>/inspect/histograms.svg`.

decode: records back to mp4 (stills to png) with the run's codec, and a contact sheet with their captions, to
`<run>/inspect/decoded/`: those of `inspect.keys`, else `inspect.num_records` drawn of each source.

verify: every record read and checked, tars against the index, the index against the manifest. Damage is exit code 3,
with the records in `<run>/inspect/damaged.txt`.

drop: takes the records of `inspect.drop_list` out of the index. Runs on this cache then refuse to go on.
"""

import logging
import random
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data_pipeline.cache_census import count_by_bucket, distributions
from data_pipeline.cache_check import CheckReport, check_cache
from data_pipeline.cache_drop import drop_records, plan_drop
from data_pipeline.cache_manifest import how_to_redo, require_manifest
from data_pipeline.cache_record import CorruptRecordError
from data_pipeline.latent_cache import LatentCache
from data_pipeline.manifest import IndexRow
from data_pipeline.record_list import parse_name, read_record_list, write_listed
from jobs import cli
from m4v_dist import storage
from m4v_dist.bench.markdown import table as markdown_table
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.frozen.contact_sheet import Strip, contact_sheet, make_strip
from m4v_dist.frozen.video_file import encode_mp4, encode_png
from m4v_dist.frozen.video_vae import Codec, build_codec, frames_to_uint8
from m4v_dist.lease import hold, require_held
from m4v_dist.report.plots import Bars, font_file, histograms_file

logger = logging.getLogger(__name__)

SUBJECTS = ("table", "histograms", "decode", "verify", "drop")
_BINS = 40


def table(config: RunConfig, dry_run: bool) -> str:
    """Print the table.

    Raises:
        ConfigError: no such source in the config.
        DataError: no cache.
    """
    cache = LatentCache.open(config.precompute.cache)
    counts = count_by_bucket(row for source in _sources(config, cache) for row in cache.rows(source))
    heads = ("source", "bucket", "records", "frames", "latents", "seconds", "captions", "tokens", "MiB")
    rows = [
        (source, f"{height}x{width}", f"{count.records:,}", f"{count.frames:,}", f"{count.latents:,}",
         f"{count.seconds:,.1f}", f"{count.captions:,}", f"{count.tokens:,}", f"{count.size_bytes / 2**20:,.1f}")
        for (source, height, width), count in counts.items()
    ]  # fmt: skip
    sys.stdout.write(markdown_table(heads, rows) + "\n\n" + _decoded_by(cache))
    total = sum(count.records for count in counts.values())
    dropped = sum(source.get("dropped", 0) for source in cache.manifest["sources"].values())
    return f"{total:,} records of {len({source for source, _, _ in counts})} sources in {cache.path}, {dropped} dropped"


def _decoded_by(cache: LatentCache) -> str:
    """How many clips each decoder gave, as the precompute's report has it; empty without one."""
    path = storage.join(cache.path, "report.json")
    decoders = storage.read_json(path).get("decoders", {}) if storage.exists(path) else {}
    shown = [f"{name} {count:,}" for name, count in sorted(decoders.items())]
    return f"kept by decoder, dropped ones too: {', '.join(shown)}\n\n" if shown else ""


def histograms(config: RunConfig, dry_run: bool) -> str:
    """Write the plots.

    Raises:
        ConfigError: no such source in the config.
        DataError: no cache.
    """
    cache = LatentCache.open(config.precompute.cache)
    path = storage.join(_folder(config), "histograms.svg")
    found = distributions(row for source in _sources(config, cache) for row in cache.rows(source))
    if dry_run:
        return f"dry run: would draw {len(found)} distributions to {path}"
    storage.write_bytes(path, histograms_file([_bars(name, values) for name, values in found.items()]).encode())
    return f"{len(found)} distributions in {path}"


def _bars(name: str, values: Sequence[float]) -> Bars:
    counts, edges = np.histogram(values, bins=_BINS)
    title = f"{name}: {min(values):.3g} to {max(values):.3g}, median {np.median(values):.3g}"
    return Bars(title, tuple(map(float, edges)), tuple(map(int, counts)))


def decode(config: RunConfig, dry_run: bool) -> str:
    """Decode records and write them with a contact sheet.

    Raises:
        ConfigError: no such source, or what is no source/key.
        DataError: no cache, one of another codec, no such record, or a damaged one.
    """
    codec = build_codec(config.codec)
    cache = LatentCache.open(config.precompute.cache, codec.fingerprint())
    folder = storage.join(_folder(config), "decoded")
    chosen = _chosen(config, cache)
    if dry_run:
        return f"dry run: would decode {len(chosen)} records to {folder}"
    storage.remove(folder)
    strips: list[Strip] = []
    entries: list[dict[str, Any]] = []
    for row in tqdm(chosen, desc="decode", unit="record"):
        entry, strip = _write_decoded(cache, codec, row, folder, len(entries))
        entries.append(entry)
        strips.append(strip)
    storage.write_bytes(storage.join(folder, "contact_sheet.png"), contact_sheet(strips, font_file()))
    storage.write_json(storage.join(folder, "records.json"), {"codec": codec.name, "records": entries})
    return f"{len(entries)} records, contact_sheet.png and records.json in {folder}"


@torch.no_grad()
def _write_decoded(
    cache: LatentCache, codec: Codec, row: IndexRow, folder: str, number: int
) -> tuple[dict[str, Any], Strip]:
    try:
        latents = cache.read(row).latents
    except CorruptRecordError as error:
        raise DataError(f"cached record {error}; {cache.how_to_redo([error.shard])}.") from error
    frames = frames_to_uint8(codec.decode(latents.float())).numpy()  # t h w c
    # the key may hold slashes, and what file systems take amiss: it stands in records.json
    file = f"{number:03d}_{row.source}.{'mp4' if row.fps else 'png'}"
    data = encode_mp4(frames, row.fps) if row.fps else encode_png(frames[0])
    storage.write_bytes(storage.join(folder, file), data)
    length = f"{len(frames)} frames at {row.fps:g} a second" if row.fps else "a still"
    captions = list(zip(row.captions, row.caption_weights, strict=True))
    size = f"{row.height_px} x {row.width_px} px, {length}"
    lines = [f"{file}: {row.source}/{row.key}, {size}", *(f"{weight:g}: {text}" for text, weight in captions)]
    entry = {
        "file": file, "source": row.source, "key": row.key, "height_px": row.height_px, "width_px": row.width_px,
        "num_frames": row.num_frames, "fps": row.fps, "scores": row.scores,
        "captions": [{"text": text, "weight": weight} for text, weight in captions],
    }  # fmt: skip
    return entry, make_strip(frames, lines)


def _chosen(config: RunConfig, cache: LatentCache) -> list[IndexRow]:
    """Rows of `inspect.keys` in their order; else a draw of each source, in the order of its keys."""
    settings = config.inspect
    if not settings.keys:
        drawn = []
        for source in _sources(config, cache):
            rows = cache.rows(source)
            generator = random.Random(f"{settings.draw_seed}/{source}")
            positions = sorted(generator.sample(range(len(rows)), min(settings.num_records, len(rows))))
            drawn += [rows[position] for position in positions]
        return drawn
    try:
        names = [parse_name(key) for key in settings.keys]
    except ValueError as error:
        raise ConfigError(f"inspect.keys: {error}.") from error
    found = {(row.source, row.key): row for source in {name.source for name in names} for row in cache.rows(source)}
    missing = [str(name) for name in names if (name.source, name.key) not in found]
    if missing:
        raise DataError(
            f"{cache.path}: holds no record {', '.join(missing[:5])}; correct inspect.keys (source/key), or leave it "
            "out to draw some."
        )
    return [found[name.source, name.key] for name in names]


def verify(config: RunConfig, dry_run: bool) -> str:
    """Read and check the whole cache.

    Raises:
        DataError: no cache, or a damaged one; the records are in the list that the message names.
    """
    path, listed = config.precompute.cache, storage.join(_folder(config), "damaged.txt")
    manifest = require_manifest(path)
    total = sum(source.get("records", 0) for source in manifest["sources"].values())
    if dry_run:
        return f"dry run: would read {total:,} records of {len(manifest['fragments'])} shards in {path}"
    with tqdm(total=total or None, desc="verify", unit="record") as bar:
        report = check_cache(path, config.inspect.num_threads, bar.update)
    for problem in report.problems:
        logger.error("%s", problem)
    for name in report.unused:
        logger.warning("%s: no part of the cache names this file", storage.join(path, name))
    write_listed(listed, report.damaged)
    if not report.is_sound:
        raise DataError(_what_is_wrong(report, path, listed))
    dropped = f", {report.num_dropped} dropped before" if report.num_dropped else ""
    unused = f", {len(report.unused)} files that nothing names" if report.unused else ""
    size_mib = report.size_bytes / 2**20
    return f"{report.num_records:,} records, {size_mib:,.1f} MiB, all whole, in {path}{dropped}{unused}"


def _what_is_wrong(report: CheckReport, path: str, listed: str) -> str:
    parts = []
    if report.damaged:
        first = report.damaged[0]
        parts.append(
            f"{len(report.damaged)} of {report.num_records} records are damaged, the first is {first.name} in shard "
            f"{first.shard} ({first.error})"
        )
    if report.problems:
        parts.append(f"{len(report.problems)} other faults, the first is: {report.problems[0]}")
    shards = sorted({record.shard for record in report.damaged})
    if not shards:
        return f"{path}: {'; '.join(parts)}; the log names them all."
    return (
        f"{path}: {'; '.join(parts)}. All damaged records stand in {listed}: to make them anew "
        f"{how_to_redo(path, shards)}; to go on without them, python -m jobs.inspect_cache drop with "
        f"inspect.drop_list={listed}."
    )


def drop(config: RunConfig, dry_run: bool) -> str:
    """Take listed records out of the cache's index.

    Raises:
        ConfigError: no list is named, or a precompute is at work on the cache.
        DataError: no cache, or a list with records that it never held.
    """
    if config.inspect.drop_list is None:
        raise ConfigError("inspect.drop_list is not set; name a file with one source/key a line.")
    cache, names = config.precompute.cache, read_record_list(config.inspect.drop_list)
    plan = plan_drop(cache, names)
    what = f"{plan.num_records} records of {len(plan.fragments)} shards"
    before = f"; {plan.num_before} were dropped before" if plan.num_before else ""
    if dry_run:
        return f"dry run: would drop {what} from {cache}{before}"
    with hold(cache, config.precompute.lease_timeout_s) as lease:
        # once more: until the lease was claimed another job may have been at work
        plan = plan_drop(cache, names)
        drop_records(plan, datetime.now(UTC).isoformat(timespec="seconds"), lambda: require_held(cache, lease))
    if not plan.num_records:
        return f"nothing to do: no record of the list stands in {cache}{before}"
    return (
        f"dropped {what} from {cache}{before}; runs in progress on it refuse to go on, since their checkpoints hold "
        "the digest of the records"
    )


def _sources(config: RunConfig, cache: LatentCache) -> list[str]:
    """Names of the cache's sources that are looked at."""
    unknown = [name for name in config.inspect.from_sources if name not in cache.manifest["sources"]]
    if unknown:
        raise ConfigError(
            f"inspect.from_sources={list(config.inspect.from_sources)}: {cache.path} has no {', '.join(unknown)}; it "
            f"has {', '.join(sorted(cache.manifest['sources']))}."
        )
    return [name for name in cache.sources if name in (config.inspect.from_sources or cache.sources)]


def _folder(config: RunConfig) -> str:
    return storage.join(config.run.folder, "inspect")


def parse_subject(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Split the command line into the subject and what every verb takes; see `cli.parse_subject`."""
    return cli.parse_subject("inspect_cache", SUBJECTS, "Look into the latent cache of a run.", argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run; return the exit code."""
    subject, rest = parse_subject(sys.argv[1:] if argv is None else argv)
    name = f"inspect_cache {subject}"
    match subject:
        case "table":
            return cli.main(name, table, "Print what the cache holds.", rest, writes=False)
        case "histograms":
            return cli.main(name, histograms, "Draw what the cache's records are like.", rest)
        case "decode":
            return cli.main(name, decode, "Decode cached records for a person to look at.", rest)
        case "verify":
            return cli.main(name, verify, "Read and check every record of the cache.", rest)
        case "drop":
            return cli.main(name, drop, "Take listed records out of the cache.", rest)
    raise AssertionError(subject)


if __name__ == "__main__":
    sys.exit(main())
