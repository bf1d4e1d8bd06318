"""The Ray Data graph of raw shard -> latent cache: one task per shard, decode and encode fused in an actor.

With `curation.enabled` a pass before it surveys the raw shards and makes clip lists of the surveys (`first_pass.py`),
which are what is encoded. Ray itself stands in `ray_pool.py`. Frames never pass the object store: a
`shard_actor.ShardActor` does a whole raw shard by itself; what travels are task names and counts. A shard is committed
by its index fragment, so a restart redoes the uncommitted ones only.

One dead-letter table: `report.json` and `quarantine.txt`. Past `max_bad_fraction` the job fails, after the report is
written; what was committed stays.

One job at a time: it holds the cache's lease. Actors ask for it before they write, and the driver before the report and
before the manifest, so that what is left of a job that was overtaken commits nothing.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from data_pipeline.actor_memory import CALLS_PER_ACTOR
from data_pipeline.attempts import ATTEMPTS
from data_pipeline.cache_census import with_counts
from data_pipeline.cache_manifest import MANIFEST, NULL_PROMPT, index_path, read_manifest
from data_pipeline.cache_writer import write_manifest
from data_pipeline.clip_list import CURATION
from data_pipeline.curation import DUPLICATES, SCORES, ListedShard, describe_settings
from data_pipeline.duplicate_keys import quarantine_duplicates
from data_pipeline.first_pass import (
    RunSurveys,
    lists_as_they_stand,
    run_surveys_on_ray,
    survey_and_list,
    with_curation,
    with_lists,
)
from data_pipeline.index_table import INDEX
from data_pipeline.latent_cache import is_index_sound
from data_pipeline.manifest import IndexRow, read_index
from data_pipeline.precompute_plan import (
    PrecomputePlan,
    ShardOutcome,
    ShardTask,
    committed_outcome,
    describe_cache,
    plan_tasks,
    require_decoder,
    require_own_shard,
    require_same_settings,
)
from data_pipeline.precompute_progress import BadLimit, DoneShards, collect
from data_pipeline.precompute_report import require_enough, write_report
from data_pipeline.ray_pool import ActorPool, run_on_ray
from data_pipeline.shard_actor import ShardActor
from m4v_dist import storage
from m4v_dist.batch import TextFeatures
from m4v_dist.errors import ConfigError
from m4v_dist.frozen.text_encoder import build_text_encoder, text_encoder_fingerprint
from m4v_dist.lease import Lease, hold, require_held

logger = logging.getLogger(__name__)

RunShards = Callable[[PrecomputePlan, list[ShardTask], Lease, BadLimit], DoneShards]
"""Does the pending shards under a lease, until the limit is passed; `run_shards_on_ray` is the one of every job."""


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
    show_lists: Callable[[str], None] | None = None,
) -> PrecomputeResult:
    """Bring the cache to what the plan asks for.

    Args:
        plan: what to do.
        ray_session: starts or joins Ray, and leaves it as it was; entered once all that can be checked without it is
            checked, and only if there is work.
        run_shards: does the work; None takes `run_shards_on_ray`.
        run_surveys: does that of curation; None takes `run_surveys_on_ray`.
        show_lists: is given the cache's folder once the clip lists are written, before anything is encoded.

    Raises:
        ConfigError: the text encoder cannot be built, decord cannot be imported, or no node of the cluster holds an
            actor.
        DataError: a shard is missing or cannot be read or written, the cache was made with other settings, no clip was
            kept, or more than `max_bad_fraction` of the clips are quarantined or of the shards are damaged (the report
            is written first).
        OutOfMemoryJobError: a clip does not fit the device that encodes it.
        RetriesExhaustedError: one shard lost its worker too often.
        RunInUseError: another job is at work on this cache, or took it over.
    """
    started = time.monotonic()
    cache = plan.precompute.cache
    description = describe_cache(plan)
    existing = read_manifest(cache)
    if existing is not None:
        require_same_settings(cache, existing, description)
    tasks = plan_tasks(plan, description)
    # what the lists would be, for there may be nothing to do; None where shards are still to be surveyed
    listed = lists_as_they_stand(plan, tasks)
    committed = {} if listed is None else _committed(cache, with_lists(tasks, listed))
    if listed is not None and existing is not None and _is_finished(plan, existing, tasks, committed, listed):
        logger.info("nothing to do: all %d shards of %s are committed", len(tasks), cache)
        return PrecomputeResult(True, dict(storage.read_json(storage.join(cache, "report.json"))))
    require_decoder([task for task in tasks if task.name not in committed], plan.precompute.decoder)
    null_text = _null_text(plan)
    with hold(cache, plan.precompute.lease_timeout_s) as lease, ExitStack() as until_done:
        _remove_leftovers(cache)
        join_ray = _joined_once(ray_session, until_done)
        with _overtaken_first(cache, lease):
            listed = survey_and_list(plan, tasks, lease, join_ray, run_surveys or run_surveys_on_ray)
        if listed and show_lists is not None:
            show_lists(cache)
        tasks = with_lists(tasks, listed)
        # looked at once more: until the lease was claimed another job may have been at work
        committed = _committed(cache, tasks)
        pending = [task for task in tasks if task.name not in committed]
        logger.info("%d shards: %d committed before, %d to do", len(tasks), len(committed), len(pending))
        if existing is not None and any(task.name in existing["fragments"] for task in pending):
            logger.info("%s: shards of the finished cache are done anew: it is unfinished until they are", cache)
            for name in (MANIFEST, INDEX):
                storage.remove(storage.join(cache, name))
        limit = _limit(plan, tasks, committed, listed)
        done = DoneShards(gave_up=limit.why_passed())
        if pending and not done.gave_up:
            with _overtaken_first(cache, lease):
                join_ray()
                done = (run_shards or run_shards_on_ray)(plan, pending, lease, limit)
        require_held(cache, lease)
        _remove_leftovers(cache)
        outcomes = {**committed, **done.outcomes}
        if len(outcomes) == len(tasks):
            outcomes = quarantine_duplicates(cache, tasks, outcomes)
        outcomes = with_curation(outcomes, listed)
        report = write_report(cache, outcomes, done, time.monotonic() - started)
        require_enough(plan.precompute, report)
        manifest = _manifest(plan, description, tasks)
        if listed:
            manifest["curation"] = describe_settings(plan, listed)
        require_held(cache, lease)
        write_manifest(cache, manifest, null_text)
    return PrecomputeResult(False, report)


@contextmanager
def _overtaken_first(cache: str, lease: Lease) -> Iterator[None]:
    """That the job was overtaken says more than which shards it could not do for it."""
    try:
        yield
    except ConfigError:
        require_held(cache, lease)
        raise


def _joined_once(ray_session: Callable[[], AbstractContextManager[object]], stack: ExitStack) -> Callable[[], None]:
    """What enters the session with its first call alone, for as long as `stack` lasts: two passes share one Ray."""
    is_joined = False

    def join() -> None:
        nonlocal is_joined
        if not is_joined:
            stack.enter_context(ray_session())
            is_joined = True

    return join


def _limit(
    plan: PrecomputePlan,
    tasks: Sequence[ShardTask],
    committed: Mapping[str, ShardOutcome],
    listed: Mapping[str, ListedShard],
) -> BadLimit:
    num_bad = sum(len(shard.quarantined) for shard in listed.values())
    num_clips = sum(shard.num_clips for shard in listed.values()) if listed else None
    return BadLimit(plan.precompute.max_bad_fraction, len(tasks), committed.values(), num_bad, num_clips)


def _committed(cache: str, tasks: Iterable[ShardTask]) -> dict[str, ShardOutcome]:
    return {task.name: outcome for task in tasks if (outcome := committed_outcome(cache, task)) is not None}


def _is_finished(
    plan: PrecomputePlan,
    manifest: Mapping[str, Any],
    tasks: Sequence[ShardTask],
    committed: Mapping[str, ShardOutcome],
    listed: Mapping[str, ListedShard],
) -> bool:
    """Whether all shards are committed, and all that stands beside them is there and of these shards and lists."""
    if len(committed) < len(tasks):
        return False
    names = (NULL_PROMPT, "report.json", *((DUPLICATES, SCORES) if listed else ()))
    beside = all(storage.exists(storage.join(plan.precompute.cache, name)) for name in names)
    curation = describe_settings(plan, listed) if listed else None
    is_of_these = manifest["fragments"] == sorted(committed) and manifest.get("curation") == curation
    return beside and is_of_these and is_index_sound(plan.precompute.cache, manifest)


def _remove_leftovers(cache: str) -> None:
    """Remove temporary files and notes of attempts that a killed run or worker left; no worker may be up."""
    storage.remove(storage.join(cache, ATTEMPTS))
    for folder in ("shards", "index", CURATION, f"{CURATION}/lists"):
        for name in storage.list_folder(storage.join(cache, folder)):
            if ".tmp-" in name:
                logger.info("removing %s/%s, left by a run that was killed", folder, name)
                storage.remove(storage.join(cache, folder, name))


def run_shards_on_ray(plan: PrecomputePlan, pending: list[ShardTask], lease: Lease, limit: BadLimit) -> DoneShards:
    """Do the pending shards in an actor pool on the Ray that is up; see `RunShards` and `collect`."""
    tasks = [json.dumps(asdict(task)) for task in pending]
    pool = ActorPool.of(plan.precompute, CALLS_PER_ACTOR)
    return collect(run_on_ray(ShardActor, (plan, lease), tasks, pool), len(pending), limit)


def _manifest(plan: PrecomputePlan, description: dict[str, Any], tasks: list[ShardTask]) -> dict[str, Any]:
    """The manifest of all shards, each looked at once more: that this job's settings made it, and its tar is whole."""
    cache = plan.precompute.cache
    sizes = storage.list_sizes(storage.join(cache, "shards"))

    def fragments() -> Iterator[tuple[list[IndexRow], dict[str, Any]]]:
        for task in tasks:
            rows, notes = read_index(index_path(cache, task.name))
            require_own_shard(cache, task, notes, sizes)
            yield rows, notes

    manifest = {
        **description,
        "code_version": _code_version(),
        "null_prompt": NULL_PROMPT,
        "sources": {
            source.name: {"media": source.media, "licence": source.licence, "split": source.split}
            for source in plan.sources
        },
        "fragments": sorted(task.name for task in tasks),
    }
    return with_counts(manifest, fragments())


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
