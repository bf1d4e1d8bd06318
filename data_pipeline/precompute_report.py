"""What became of every clip of a precompute: report.json, quarantine.txt, and a table for people."""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

from data_pipeline.precompute_plan import ShardOutcome
from m4v_dist import storage

logger = logging.getLogger(__name__)
REST_OF_SHARD = "(rest of the shard)"
"""Stands for the keys that nobody could read in quarantine.txt."""


def write_report(
    cache: str, outcomes: Mapping[str, ShardOutcome], done_now: Mapping[str, ShardOutcome], seconds: float
) -> dict[str, Any]:
    """Write report.json and quarantine.txt over all shards, log the table, return the report."""
    ordered = [outcomes[name] for name in sorted(outcomes)]
    quarantined = [entry for outcome in ordered for entry in outcome.quarantined]
    damaged = [{**o.damage, "num_clips_before": o.num_clips} for o in ordered if o.damage]
    per_source: dict[str, Counter[str]] = {}
    for outcome in ordered:
        counts = per_source.setdefault(outcome.source, Counter())
        counts.update(kept=outcome.kept, quarantined=len(outcome.quarantined), **outcome.filtered)
    num_now = sum(outcome.num_clips for outcome in done_now.values())
    report = {
        "kept": sum(outcome.kept for outcome in ordered),
        "filtered": dict(sum((Counter(outcome.filtered) for outcome in ordered), Counter())),
        "decoders": dict(sum((Counter(outcome.decoders) for outcome in ordered), Counter())),
        "quarantined": quarantined,
        "damaged_shards": damaged,
        "num_clips": sum(outcome.num_clips for outcome in ordered),
        "num_cut_captions": sum(outcome.num_cut_captions for outcome in ordered),
        "per_source": {source: dict(counts) for source, counts in per_source.items()},
        "num_shards": len(outcomes),
        "num_shards_this_run": len(done_now),
        "seconds": round(seconds, 2),
        "clips_per_s": round(num_now / seconds, 3),
    }
    storage.write_json(storage.join(cache, "report.json"), report)
    lines = ["\t".join((entry["source"], entry["shard"], entry["key"], entry["error"])) for entry in quarantined]
    for outcome in ordered:
        if outcome.damage:
            lines.append("\t".join((outcome.source, outcome.damage["shard"], REST_OF_SHARD, outcome.damage["error"])))
    storage.write_bytes(storage.join(cache, "quarantine.txt"), "".join(f"{line}\n" for line in lines).encode())
    logger.info("precompute report\n%s", format_report(report))
    return report


def format_report(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    columns = ["kept", "quarantined", *sorted(report["filtered"])]
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
    lines.append(f"kept, by decoder: {report['decoders']}")
    lines.append(f"{report['num_clips']} clips, {report['clips_per_s']} clips/s this run")
    return "\n".join(lines)
