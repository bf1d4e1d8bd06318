"""What became of every clip of a precompute: report.json, quarantine.txt, and a table for people."""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from data_pipeline.precompute_plan import ShardOutcome
from data_pipeline.precompute_progress import DoneShards
from m4v_dist import storage
from m4v_dist.config.data_settings import PrecomputeSettings
from m4v_dist.errors import DataError

logger = logging.getLogger(__name__)
REST_OF_SHARD = "(rest of the shard)"
"""Stands for the keys that nobody could read in quarantine.txt."""


def write_report(
    cache: str, outcomes: Mapping[str, ShardOutcome], done_now: DoneShards, seconds: float
) -> dict[str, Any]:
    """Write report.json and quarantine.txt over all shards, log the table, return the report.

    `seconds_in` says where the workers' time of this run went, summed over them: `read_s`, `decode_s`, `encode_s`,
    `write_s`, and `wait_s`, for which encoders waited for a clip.
    """
    ordered = [outcomes[name] for name in sorted(outcomes)]
    quarantined = [entry for outcome in ordered for entry in outcome.quarantined]
    damaged = [{**o.damage, "num_clips_before": o.num_clips} for o in ordered if o.damage]
    per_source: dict[str, Counter[str]] = {}
    for outcome in ordered:
        counts = per_source.setdefault(outcome.source, Counter())
        counts.update(kept=outcome.kept, quarantined=len(outcome.quarantined), **outcome.filtered)
        if outcome.dropped:
            counts.update(dropped=len(outcome.dropped))
    num_now = sum(outcome.num_clips for outcome in done_now.outcomes.values())
    report = {
        "kept": sum(outcome.kept for outcome in ordered),
        "filtered": dict(sum((Counter(outcome.filtered) for outcome in ordered), Counter())),
        "dropped": sum(len(outcome.dropped) for outcome in ordered),
        "decoders": dict(sum((Counter(outcome.decoders) for outcome in ordered), Counter())),
        "quarantined": quarantined,
        "damaged_shards": damaged,
        "num_clips": sum(outcome.num_clips for outcome in ordered),
        "num_cut_captions": sum(outcome.num_cut_captions for outcome in ordered),
        "per_source": {source: dict(counts) for source, counts in per_source.items()},
        "num_shards": len(outcomes),
        "num_shards_this_run": len(done_now.outcomes),
        "seconds": round(seconds, 2),
        "clips_per_s": round(num_now / seconds, 3),
        "seconds_in": {name: round(value, 2) for name, value in sorted(done_now.seconds.items())},
        "gave_up": done_now.gave_up,
    }
    storage.write_json(storage.join(cache, "report.json"), report)
    lines = ["\t".join((entry["source"], entry["shard"], entry["key"], entry["error"])) for entry in quarantined]
    for outcome in ordered:
        if outcome.damage:
            lines.append("\t".join((outcome.source, outcome.damage["shard"], REST_OF_SHARD, outcome.damage["error"])))
    storage.write_bytes(storage.join(cache, "quarantine.txt"), "".join(f"{line}\n" for line in lines).encode())
    logger.info("precompute report\n%s", format_report(report))
    return report


def count_dropped(cache: str, num_dropped: Mapping[str, int]) -> None:
    """Move records, so many of each source, from `kept` to `dropped` in report.json; nothing happens without one."""
    path = storage.join(cache, "report.json")
    if not num_dropped or not storage.exists(path):
        return
    report = storage.read_json(path)
    for source, count in num_dropped.items():
        for counts in (report, report["per_source"][source]):
            counts["kept"] -= count
            counts["dropped"] = counts.get("dropped", 0) + count
    storage.write_json(path, report)


def format_report(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    columns = ["kept", "quarantined", *(["dropped"] if report.get("dropped") else []), *sorted(report["filtered"])]
    lines = ["".join([f"{'source':<20}", *(f"{name:>14}" for name in columns)])]
    for source, counts in sorted(report["per_source"].items()):
        lines.append("".join([f"{source:<20}", *(f"{counts.get(name, 0):>14}" for name in columns)]))
    for entry in report["quarantined"][:20]:
        lines.append(f"quarantined: {entry['source']}/{entry['key']} in {entry['shard']}: {entry['error']}")
    if len(report["quarantined"]) > 20:
        lines.append(f"... and {len(report['quarantined']) - 20} more in quarantine.txt")
    for entry in report["damaged_shards"]:
        lines.append(
            f"damaged shard: {entry['source']}/{entry['shard']}: {entry['error']}; {entry['num_clips_before']} clips "
            "before, an unknown number lost"
        )
    if report["seconds_in"]:
        parts = ", ".join(f"{name.removesuffix('_s')} {value:.1f}" for name, value in report["seconds_in"].items())
        lines.append(f"seconds of all workers: {parts} (wait: encoders had no clip to encode)")
    lines.append(f"kept, by decoder: {report['decoders']}")
    lines.append(f"{report['num_clips']} clips, {report['clips_per_s']} clips/s this run")
    return "\n".join(lines)


def require_enough(settings: PrecomputeSettings, report: dict[str, Any]) -> None:
    """Check that the data was good enough to be a cache.

    Raises:
        DataError: too many clips are quarantined or shards damaged (`BadLimit`), or no clip was kept.
    """
    bad, total, limit = len(report["quarantined"]), report["num_clips"], settings.max_bad_fraction
    where = storage.join(settings.cache, "quarantine.txt")
    if report["gave_up"]:
        first = (report["damaged_shards"] or report["quarantined"])[0]
        raise DataError(
            f"precompute: {report['gave_up']}, past precompute.max_bad_fraction={limit:g}, so the run ended after "
            f"{report['num_shards']} shards (first: {first['shard']} of {first['source']}: {first['error']}). See "
            f"{where}, mend, drop or write anew what it names, or raise the limit. The committed shards stay."
        )
    if bad > limit * total:
        raise DataError(
            f"precompute: {bad} of {total} clips are quarantined ({bad / total:.1%}), more than "
            f"precompute.max_bad_fraction={limit:g}; see {where}, mend or drop these clips, or raise the limit. "
            "The committed shards stay."
        )
    if report["kept"] == 0:
        raise DataError(
            f"precompute: none of {total} clips was kept (filtered: {report['filtered']}, quarantined: {bad}); "
            f"see {where}, and lower precompute.min_frames={settings.min_frames} or curation.thresholds, as these say."
        )
