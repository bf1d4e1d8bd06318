"""What the actors of a precompute report while they work: the bar, failures, and when to give up before the end."""

import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from data_pipeline.precompute_plan import ShardOutcome
from m4v_dist.errors import ConfigError, DataError, JobError, OutOfMemoryJobError, RetriesExhaustedError

logger = logging.getLogger(__name__)


@dataclass
class DoneShards:
    """What this run did.

    Args:
        outcomes: by output name.
        seconds: `read_s`, `decode_s`, `encode_s`, `write_s`, `wait_s`, summed over all actors (`ShardActor`).
        gave_up: why the rest was not done; empty where all was.
    """

    outcomes: dict[str, ShardOutcome] = field(default_factory=dict)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    gave_up: str = ""


class BadLimit:
    """Whether a precompute has failed already: it then need not run to its end.

    Damaged shards are counted against all shards, which are known. How many clips there are is not: the limit is one of
    all shards as large as the largest done so far. So clips end a run early only if shards yet to come would have to be
    larger than any before to save it.

    Args:
        max_bad_fraction: precompute.max_bad_fraction.
        num_shards: of the whole cache.
        committed: outcomes of earlier runs.
        num_bad: clips that a survey has quarantined already.
        num_clips: how many there are, where a survey has counted them; None where nobody has.
    """

    def __init__(
        self,
        max_bad_fraction: float,
        num_shards: int,
        committed: Iterable[ShardOutcome],
        num_bad: int = 0,
        num_clips: int | None = None,
    ) -> None:
        self._limit, self._num_shards = max_bad_fraction, num_shards
        self._num_damaged = self._largest = 0
        self._num_bad, self._num_clips = num_bad, num_clips
        for outcome in committed:
            self.add(outcome)

    def add(self, outcome: ShardOutcome) -> None:
        """Count a shard."""
        self._num_damaged += bool(outcome.damage)
        self._num_bad += len(outcome.quarantined)
        self._largest = max(self._largest, outcome.num_clips)

    def why_passed(self) -> str:
        """The sentence that ends the run; empty while it may go well."""
        if self._num_damaged > self._limit * self._num_shards:
            return (
                f"{self._num_damaged} of {self._num_shards} shards are damaged, how many clips that loses nobody knows"
            )
        if self._num_clips is not None:
            # a survey passes over records that pass 2 quarantines for another fault
            most = self._num_clips + self._num_bad
            return (
                f"{self._num_bad} of at most {most} clips are quarantined" if self._num_bad > self._limit * most else ""
            )
        if self._num_bad > self._limit * self._largest * self._num_shards:
            return (
                f"{self._num_bad} clips are quarantined, and {self._num_shards} shards of at most {self._largest} "
                "clips as so far cannot make that few enough"
            )
        return ""


def collect(rows: Iterable[Mapping[str, Any]], num_shards: int, limit: BadLimit | None = None) -> DoneShards:
    """Gather what the actors report, with a progress bar: shards, time left, clips/s, kept and bad.

    Args:
        rows: `name`, `outcome`, `error`, `exit_code` and perhaps `seconds` of each shard, see `ShardActor`.
        num_shards: how many come.
        limit: once it is passed the rest is not waited for; None waits for all.

    Raises:
        JobError: once all are done, if some failed: of the failure that says most (see `_raise_failures`).
    """
    done = DoneShards()
    failures: list[Mapping[str, Any]] = []
    counts: Counter[str] = Counter(kept=0, bad=0)
    started = time.monotonic()
    with tqdm(total=num_shards, desc="precompute", unit="shard") as bar:
        for row in rows:
            if row["exit_code"]:
                failures.append(row)
                counts.update(failed_shards=1)
            else:
                outcome = ShardOutcome(**json.loads(row["outcome"]))
                done.outcomes[row["name"]] = outcome
                counts.update(clips=outcome.num_clips, kept=outcome.kept, bad=len(outcome.quarantined))
                if limit is not None:
                    limit.add(outcome)
            for name, seconds in json.loads(row.get("seconds", "{}")).items():
                done.seconds[name] += seconds
            bar.update()
            per_s = counts["clips"] / max(time.monotonic() - started, 1e-9)
            bar.set_postfix({"clips/s": f"{per_s:.1f}"} | {name: counts[name] for name in counts if name != "clips"})
            done.gave_up = limit.why_passed() if limit is not None else ""
            if done.gave_up:
                logger.error("giving up after %d of %d shards: %s", bar.n, num_shards, done.gave_up)
                break
    if failures and not done.gave_up:
        _raise_failures(failures, num_shards, "precompute")
    return done


def collect_surveys(rows: Iterable[Mapping[str, Any]], num_shards: int) -> None:
    """The same for surveys, whose outcome is a number of pieces; all are waited for."""
    failures: list[Mapping[str, Any]] = []
    num_pieces = 0
    with tqdm(total=num_shards, desc="survey", unit="shard") as bar:
        for row in rows:
            if row["exit_code"]:
                failures.append(row)
            else:
                num_pieces += int(row["outcome"])
            bar.update()
            bar.set_postfix(pieces=num_pieces)
    if failures:
        _raise_failures(failures, num_shards, "survey")


def _raise_failures(failures: Sequence[Mapping[str, Any]], num_shards: int, what: str) -> None:
    """Raise for all failed shards together; the order in which they came decides nothing.

    Out of memory goes before workers that died, for it is often why; both go before data, which a rerun may mend.
    """
    codes = {row["exit_code"] for row in failures}
    kinds: tuple[type[JobError], ...] = (OutOfMemoryJobError, RetriesExhaustedError, ConfigError)
    kind = next((kind for kind in kinds if kind.exit_code in codes), DataError)
    of_kind = [row for row in failures if row["exit_code"] == kind.exit_code] or failures
    for row in failures:
        logger.error("%s: %s", row["name"], row["error"])
    first = min(of_kind, key=lambda row: str(row["name"]))
    raise kind(
        f"{what}: {len(failures)} of {num_shards} shards could not be done ({first['name']}: {first['error']}); "
        "the others are committed: mend the cause and run the same command again."
    )
