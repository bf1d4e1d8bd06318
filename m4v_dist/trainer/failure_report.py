"""Why an attempt ended: the rank that failed first, and what it was doing, from the files that its ranks left.

Written by the next attempt, or by the driver where there is none: `attempts/attempt_0003_failure.json`, and the same to
read as `attempt_0003_failure.log`.
"""

import logging
from collections.abc import Sequence
from typing import Any

from m4v_dist import storage
from m4v_dist.trainer.rank_status import Status, last_lines, newest_attempt, ranks_folder, read_statuses, records_shown

logger = logging.getLogger(__name__)

LOG_LINES = 40
MAX_RANKS_SHOWN = 32
"""Ranks in the readable report, those that stand furthest back; the JSON has all."""


def report_failure(run_folder: str, silent_ranks: Sequence[int] = ()) -> str | None:
    """Write the report of the newest attempt, which is over, unless it stands already; one process calls it.

    Args:
        run_folder: of the run.
        silent_ranks: ranks whose processes are known to have died; empty where nobody knows.

    Returns:
        One sentence with the cause and the report's path; None if no rank of it failed, or none left a file.
    """
    attempt = newest_attempt(run_folder)
    if attempt is None:
        return None
    path = storage.join(run_folder, "attempts", f"attempt_{attempt:04d}_failure.json")
    if storage.exists(path):
        return str(storage.read_json(path)["sentence"])
    found = read_statuses(run_folder, attempt)
    if all(status.state == "done" for status, _ in found):
        return None
    report = failure_of(found, silent_ranks)
    first = report["first_rank"]
    stem = storage.join(ranks_folder(run_folder, attempt), f"rank_{first:05d}")
    stacks = f"{stem}_stacks.txt"
    report |= {
        "attempt": attempt,
        "log": last_lines(f"{stem}.log", LOG_LINES),
        "stacks": stacks if storage.exists(stacks) else None,
        "sentence": f"attempt {attempt}: {report['cause']}; report: {path.removesuffix('.json')}.log",
    }
    try:
        storage.write_bytes(f"{path.removesuffix('.json')}.log", failure_text(report).encode())
        storage.write_json(path, report)
    except OSError as error:
        # The cause must not be hidden by a disk that is full.
        report["sentence"] = f"attempt {attempt}: {report['cause']}; {path} cannot be written ({error})"
    logger.error("%s", report["sentence"])
    return str(report["sentence"])


def failure_of(found: Sequence[tuple[Status, float]], silent_ranks: Sequence[int] = ()) -> dict[str, Any]:
    """Which rank failed first and why; pure.

    In this order: a rank that is known to have died; the first error that is no echo of another rank's death; of
    ranks that their stall clock ended, the one that the others waited for; a rank that said nothing, by its last sign
    of life (compared over hosts, so clocks that differ may mislead).

    Args:
        found: what each rank left and when it last gave a sign of life; not empty.
        silent_ranks: see `report_failure`.
    """
    by_rank = {status.rank: (status, seen) for status, seen in found}
    known = [by_rank[rank] for rank in silent_ranks if rank in by_rank and by_rank[rank][0].state == "running"]
    told = sorted((s for s, _ in found if s.state == "failed"), key=lambda status: (status.is_echo, status.time))
    stalled = sorted((s for s, _ in found if s.state == "stalled"), key=lambda status: (status.step, status.phase))
    silent = sorted(known or [pair for pair in found if pair[0].state == "running"], key=lambda pair: pair[1])
    if told and not told[0].is_echo and not known:
        kind, first, when = "error", told[0], told[0].time
        cause = f"rank {first.rank} failed: {first.error}"
    elif stalled and not known:
        kind, first, when = "stall", stalled[0], stalled[0].time
        behind = "" if len(stalled) == 1 else f"; of {len(stalled)} ranks that stalled it is the furthest back"
        cause = f"rank {first.rank} stalled: {first.error}{behind}"
    elif silent:
        kind, (first, when) = "silent death", silent[0]
        cause = f"rank {first.rank} died without a word (killed, or its node was lost) at step {first.step}"
    else:
        kind, first, when = "echo", told[0], told[0].time
        cause = f"rank {first.rank} lost the others, of which none told an error: {first.error}"
    return {
        "kind": kind,
        "cause": cause,
        "first_rank": first.rank,
        "time": when,
        "step": first.step,
        "doing": first.doing,
        "records": list(first.records),
        "host": first.host,
        "pid": first.pid,
        "gpu": first.gpu,
        "memory": first.memory,
        "traceback": first.traceback,
        "ranks": [_rank_entry(status, seen, when) for status, seen in found],
    }


def _rank_entry(status: Status, seen: float, when: float) -> dict[str, Any]:
    last = status.last_step_time
    return {
        "rank": status.rank,
        "host": status.host,
        "pid": status.pid,
        "state": status.state,
        "step": status.step,
        "doing": status.doing,
        "seconds_since_last_step": None if last is None else when - last,
        "last_sign_of_life": seen,
        "memory": status.memory,
        "error": status.error,
    }


def failure_text(report: dict[str, Any]) -> str:
    """The report to read."""
    memory = ", ".join(f"{name} {value:.2f}" for name, value in report["memory"].items()) or "not known"
    lines = [
        f"attempt {report['attempt']} ended by: {report['kind']}",
        report["cause"],
        "",
        f"rank {report['first_rank']} on {report['host']}, process {report['pid']}, {report['gpu'] or 'CPU'}",
        f"step {report['step']}, {report['doing']}",
        f"records in flight: {records_shown(report['records'], 64)}",
        f"memory: {memory}",
        f"stacks: {report['stacks'] or 'none, it did not stall'}",
        "",
        f"{'rank':>6}  {'state':<8}{'step':>8}  {'since its last step':>20}  doing",
    ]
    ranks = sorted(report["ranks"], key=lambda entry: (entry["step"], entry["rank"]))
    for entry in ranks[:MAX_RANKS_SHOWN]:
        since = entry["seconds_since_last_step"]
        shown = "none finished" if since is None else f"{since:.1f} s"
        lines.append(f"{entry['rank']:>6}  {entry['state']:<8}{entry['step']:>8}  {shown:>20}  {entry['doing']}")
    if len(ranks) > MAX_RANKS_SHOWN:
        lines.append(f"and {len(ranks) - MAX_RANKS_SHOWN} more ranks; all are in the JSON")
    lines += ["", report["traceback"] or "no traceback", "last lines of its log:", *report["log"], ""]
    return "\n".join(lines)
