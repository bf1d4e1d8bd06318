"""The Ray Data graph of raw shard -> latent cache: one task per shard, decode and encode fused in an actor.

With `curation.enabled` a pass before it surveys the raw shards (`survey_actor.SurveyActor`), makes clip lists of the
surveys (`curation.py`), and these are encoded.

Ray itself stands in `ray_pool.py`. Frames never pass the object store: a `shard_actor.ShardActor` does a whole raw
shard by itself; what travels are task names and counts. A shard is committed by its index fragment, so a restart redoes
the uncommitted ones only.

One dead-letter table: `report.json` and `quarantine.txt`. Past `max_bad_fraction` the job fails, after the report is
written; what was committed stays.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from tqdm import tqdm

from data_pipeline.attempts import ATTEMPTS
from data_pipeline.clip_list import CURATION
from data_pipeline.curation import (
    ListedShard,
    describe_settings,
    format_counts,
    is_surveyed,
    make_lists,
    survey_tasks,
)
from data_pipeline.latent_cache import NULL_PROMPT, index_path, read_manifest, write_manifest
from data_pipeline.manifest import read_index
from data_pipeline.precompute_plan import (
    PrecomputePlan,
    ShardOutcome,
    ShardTask,
    committed_outcome,
    describe_cache,
    plan_tasks,
    require_decoder,
    require_same_settings,
)
from data_pipeline.precompute_report import write_report
from data_pipeline.ray_pool import ActorPool, run_on_ray
from data_pipeline.shard_actor import ShardActor
from data_pipeline.survey_actor import SurveyActor
from m4v_dist import storage
from m4v_dist.batch import TextFeatures
from m4v_dist.errors import ConfigError, DataError, JobError, OutOfMemoryJobError, RetriesExhaustedError
from m4v_dist.frozen.text_encoder import build_text_encoder, text_encoder_fingerprint

logger = logging.getLogger(__name__)

RunShards = Callable[[PrecomputePlan, list[ShardTask]], dict[str, ShardOutcome]]
"""Does the pending shards and returns their outcomes by output name; `run_shards_on_ray` is the one of every job."""
RunSurveys = Callable[[PrecomputePlan, list[ShardTask]], None]
"""Surveys the pending shards; `run_surveys_on_ray` is the one of every job."""


@dataclass(frozen=True)
class PrecomputeResult:
    """How a precompute ended: whether it did anything, and its report."""

    did_nothing: bool
    report: dict[str, Any]


def run_precompute(
    plan: PrecomputePlan,
    ray_session: Callable[[], AbstractContextManager[object]],
    run_shards: RunShards | None = None,
    run_surveys: RunSurveys | None = None,
) -> PrecomputeResult:
    """Bring the cache to what the plan asks for.

    Args:
        plan: what to do.
        ray_session: starts or joins Ray, and leaves it as it was; entered once all that can be checked without it is
            checked, and only if there is work.
        run_shards: does the work; None takes `run_shards_on_ray`.
        run_surveys: does that of curation; None takes `run_surveys_on_ray`.

    Raises:
        ConfigError: the text encoder cannot be built, decord cannot be imported, or no node of the cluster holds an
            actor.
        DataError: a shard is missing or cannot be read or written, the cache was made with other settings, no clip was
            kept, or more than `max_bad_fraction` of the clips are quarantined or of the shards are damaged (the report
            is written first).
        OutOfMemoryJobError: a clip does not fit the device that encodes it.
        RetriesExhaustedError: one shard lost its worker too often.
    """
    started = time.monotonic()
    cache = plan.precompute.cache
    description = describe_cache(plan)
    existing = read_manifest(cache)
    if existing is not None:
        require_same_settings(cache, existing, description)
    tasks = plan_tasks(plan, description)
    with ExitStack() as until_done:
        join_ray = _joined_once(ray_session, until_done)
        listed = _curate(plan, tasks, join_ray, run_surveys or run_surveys_on_ray)
        tasks = [listed[task.name].task if listed else task for task in tasks]
        curation = describe_settings(plan, listed) if listed else None
        committed = {task.name: outcome for task in tasks if (outcome := committed_outcome(cache, task)) is not None}
        pending = [task for task in tasks if task.name not in committed]
        if not pending and existing is not None and _is_finished(cache, existing, committed, curation):
            logger.info("nothing to do: all %d shards of %s are committed", len(tasks), cache)
            return PrecomputeResult(True, dict(storage.read_json(storage.join(cache, "report.json"))))
        logger.info("%d shards: %d committed before, %d to do", len(tasks), len(committed), len(pending))
        require_decoder(pending)
        null_text = _null_text(plan)
        _remove_leftovers(cache)
        done_now: dict[str, ShardOutcome] = {}
        if pending:
            join_ray()
            done_now = (run_shards or run_shards_on_ray)(plan, pending)
            storage.remove(storage.join(cache, ATTEMPTS))
    outcomes = {**committed, **done_now}
    if listed:
        outcomes = {name: listed[name].outcome_with(outcome) for name, outcome in outcomes.items()}
    report = write_report(cache, outcomes, done_now, time.monotonic() - started)
    _require_enough(plan, report)
    manifest = _manifest(plan, description, tasks)
    write_manifest(cache, manifest if curation is None else {**manifest, "curation": curation}, null_text)
    return PrecomputeResult(False, report)


def _joined_once(ray_session: Callable[[], AbstractContextManager[object]], stack: ExitStack) -> Callable[[], None]:
    """What enters the session with its first call alone, for as long as `stack` lasts: two passes share one Ray."""
    is_joined = False

    def join() -> None:
        nonlocal is_joined
        if not is_joined:
            stack.enter_context(ray_session())
            is_joined = True

    return join


def _curate(
    plan: PrecomputePlan, tasks: list[ShardTask], join_ray: Callable[[], None], run_surveys: RunSurveys
) -> dict[str, ListedShard]:
    """Pass 1: survey what is not surveyed yet, then make the clip lists; nothing where curation is off."""
    if not plan.curation.enabled:
        return {}
    cache = plan.precompute.cache
    surveys = survey_tasks(plan, tasks)
    pending = [task for task in surveys if not is_surveyed(cache, task)]
    if pending:
        logger.info(
            "curation: %d shards: %d surveyed before, %d to do", len(tasks), len(tasks) - len(pending), len(pending)
        )
        _remove_leftovers(cache)
        join_ray()
        run_surveys(plan, pending)
    listed = make_lists(plan, tasks)
    logger.info("curation\n%s", format_counts(listed))
    return listed


def _is_finished(
    cache: str, manifest: Mapping[str, Any], committed: Mapping[str, ShardOutcome], curation: dict[str, Any] | None
) -> bool:
    """Whether all that stands beside the shards is there and of these shards and lists, no more and no fewer."""
    beside = all(storage.exists(storage.join(cache, name)) for name in (NULL_PROMPT, "report.json"))
    return beside and manifest["fragments"] == sorted(committed) and manifest.get("curation") == curation


def _remove_leftovers(cache: str) -> None:
    """Remove temporary files and notes of attempts that a killed run left."""
    storage.remove(storage.join(cache, ATTEMPTS))
    for folder in ("shards", "index", CURATION, f"{CURATION}/lists"):
        for name in storage.list_folder(storage.join(cache, folder)):
            if ".tmp-" in name:
                logger.info("removing %s/%s, left by a run that was killed", folder, name)
                storage.remove(storage.join(cache, folder, name))


def run_shards_on_ray(plan: PrecomputePlan, pending: list[ShardTask]) -> dict[str, ShardOutcome]:
    """Do the pending shards in an actor pool on the Ray that is up; see `RunShards` and `collect`."""
    tasks = [json.dumps(asdict(task)) for task in pending]
    return collect(run_on_ray(ShardActor, (plan,), tasks, ActorPool.of(plan.precompute)), len(pending))


def run_surveys_on_ray(plan: PrecomputePlan, pending: list[ShardTask]) -> None:
    """Survey the pending shards in an actor pool on the Ray that is up; see `RunSurveys` and `collect_surveys`."""
    settings = plan.curation
    pool = ActorPool(settings.num_actors, settings.cpus_per_actor, 0.0, plan.precompute.wait_for_nodes)
    tasks = [json.dumps(asdict(task)) for task in pending]
    collect_surveys(run_on_ray(SurveyActor, (plan,), tasks, pool), len(pending))


def collect(rows: Iterable[Mapping[str, Any]], num_shards: int) -> dict[str, ShardOutcome]:
    """Gather what the actors report, with a progress bar.

    Args:
        rows: `name`, `outcome`, `error` and `exit_code` of each shard, see `ShardActor`.
        num_shards: how many come.

    Returns:
        outcomes by output name.

    Raises:
        JobError: once all are done, if some failed: of the failure that says most (see `_raise_failures`).
    """
    done: dict[str, ShardOutcome] = {}
    for row, bar in _done_rows(rows, num_shards, "precompute"):
        done[row["name"]] = ShardOutcome(**json.loads(row["outcome"]))
        bar.set_postfix(
            kept=sum(outcome.kept for outcome in done.values()),
            bad=sum(len(outcome.quarantined) for outcome in done.values()),
        )
    return done


def collect_surveys(rows: Iterable[Mapping[str, Any]], num_shards: int) -> None:
    """The same for surveys, whose outcome is a number of pieces."""
    pieces = 0
    for row, bar in _done_rows(rows, num_shards, "survey"):
        pieces += int(row["outcome"])
        bar.set_postfix(pieces=pieces)


def _done_rows(
    rows: Iterable[Mapping[str, Any]], num_shards: int, what: str
) -> Iterator[tuple[Mapping[str, Any], "tqdm[Any]"]]:
    """Rows of shards that were done, with the bar that counts all; raises for the others once all have come."""
    failures: list[Mapping[str, Any]] = []
    with tqdm(total=num_shards, desc=what, unit="shard") as bar:
        for row in rows:
            if row["exit_code"]:
                failures.append(row)
            else:
                yield row, bar
            bar.update()
    if failures:
        _raise_failures(failures, num_shards, what)


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


def _require_enough(plan: PrecomputePlan, report: dict[str, Any]) -> None:
    bad, total, limit = len(report["quarantined"]), report["num_clips"], plan.precompute.max_bad_fraction
    where = storage.join(plan.precompute.cache, "quarantine.txt")
    damaged, num_shards = report["damaged_shards"], report["num_shards"]
    if len(damaged) > limit * num_shards:
        first = damaged[0]
        raise DataError(
            f"precompute: {len(damaged)} of {num_shards} shards are damaged ({len(damaged) / num_shards:.1%}), more "
            f"than precompute.max_bad_fraction={limit:g}: {first['shard']} of {first['source']} after "
            f"{first['num_clips_before']} clips ({first['error']}); how many clips are lost cannot be known. See "
            f"{where}, write these shards anew, or raise the limit. The committed shards stay."
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
            f"see {where}, and lower precompute.min_frames={plan.precompute.min_frames} if clips are short."
        )


def _manifest(plan: PrecomputePlan, description: dict[str, Any], tasks: list[ShardTask]) -> dict[str, Any]:
    totals: dict[str, Counter[str]] = {}
    records: Counter[str] = Counter()
    for task in tasks:
        for row in read_index(index_path(plan.precompute.cache, task.name))[0]:
            counts = totals.setdefault(f"{row.height_px}x{row.width_px}", Counter())
            counts.update(records=1, frames=row.num_frames, latents=row.num_latents, size_bytes=row.size_bytes)
            records[row.source] += 1
    return {
        **description,
        "code_version": _code_version(),
        "null_prompt": NULL_PROMPT,
        "sources": {
            source.name: {"media": source.media, "licence": source.licence, "split": source.split,
                          "records": records[source.name]}
            for source in plan.sources
        },
        "fragments": sorted(task.name for task in tasks),
        "totals": {bucket: dict(counts) for bucket, counts in totals.items()},
    }  # fmt: skip


def _code_version() -> str:
    try:
        return metadata.version("m4v-dist")
    except metadata.PackageNotFoundError:
        return "not installed as a package"


def _null_text(plan: PrecomputePlan) -> TextFeatures:
    """The empty prompt's features; made before any worker starts, so that a text encoder that fails does so here.

    Raises:
        ConfigError: it cannot be built, or its weights are not those that the cache's fingerprint states.
    """
    encoder = build_text_encoder(plan.text_encoder)
    stated = text_encoder_fingerprint(plan.text_encoder)
    if encoder.fingerprint() != stated:
        raise ConfigError(
            f"text_encoder.kind={plan.text_encoder.kind!r}: the installed weights have fingerprint "
            f"{encoder.fingerprint()}, this version expects {stated}; install the version that pyproject.toml pins."
        )
    return encoder.encode([""])[0]
