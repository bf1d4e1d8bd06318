"""The Ray Data graph of raw shard -> latent cache: one task per shard, decode and encode fused in an actor.

The only file here that imports ray. Frames never pass the object store: a `shard_actor.ShardActor` does a whole raw
shard by itself; what travels are task names and counts. A shard is committed by its index fragment, so a restart redoes
the uncommitted ones only.

One dead-letter table: `report.json` and `quarantine.txt`. Past `max_bad_fraction` the job fails, after the report is
written; what was committed stays.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from tqdm import tqdm

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
from data_pipeline.shard_actor import ATTEMPTS, ShardActor
from m4v_dist import storage
from m4v_dist.batch import TextFeatures
from m4v_dist.config.data_settings import PrecomputeSettings
from m4v_dist.errors import ConfigError, DataError, JobError, OutOfMemoryJobError, RetriesExhaustedError
from m4v_dist.frozen.text_encoder import build_text_encoder, text_encoder_fingerprint

logger = logging.getLogger(__name__)

RunShards = Callable[[PrecomputePlan, list[ShardTask]], dict[str, ShardOutcome]]
"""Does the pending shards and returns their outcomes by output name; `run_on_ray` is the one of every job."""


@dataclass(frozen=True)
class PrecomputeResult:
    """How a precompute ended: whether it did anything, and its report."""

    did_nothing: bool
    report: dict[str, Any]


def run_precompute(
    plan: PrecomputePlan,
    ray_session: Callable[[], AbstractContextManager[object]],
    run_shards: RunShards | None = None,
) -> PrecomputeResult:
    """Bring the cache to what the plan asks for.

    Args:
        plan: what to do.
        ray_session: starts or joins Ray, and leaves it as it was; entered once all that can be checked without it is
            checked, and only if there is work.
        run_shards: does the work; None takes `run_on_ray`.

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
    committed = {task.name: outcome for task in tasks if (outcome := committed_outcome(cache, task)) is not None}
    pending = [task for task in tasks if task.name not in committed]
    if not pending and existing is not None and _is_finished(cache, existing, committed):
        logger.info("nothing to do: all %d shards of %s are committed", len(tasks), cache)
        return PrecomputeResult(True, dict(storage.read_json(storage.join(cache, "report.json"))))
    logger.info("%d shards: %d committed before, %d to do", len(tasks), len(committed), len(pending))
    require_decoder(pending, plan.precompute.decoder)
    null_text = _null_text(plan)
    _remove_leftovers(cache)
    done_now: dict[str, ShardOutcome] = {}
    if pending:
        with ray_session():
            done_now = (run_shards or run_on_ray)(plan, pending)
        storage.remove(storage.join(cache, ATTEMPTS))
    report = write_report(cache, {**committed, **done_now}, done_now, time.monotonic() - started)
    _require_enough(plan, report)
    write_manifest(cache, _manifest(plan, description, tasks), null_text)
    return PrecomputeResult(False, report)


def _is_finished(cache: str, manifest: Mapping[str, Any], committed: Mapping[str, ShardOutcome]) -> bool:
    """Whether all that stands beside the shards is there and of these shards, no more and no fewer."""
    beside = all(storage.exists(storage.join(cache, name)) for name in (NULL_PROMPT, "report.json"))
    return beside and manifest["fragments"] == sorted(committed)


def _remove_leftovers(cache: str) -> None:
    """Remove temporary files and notes of attempts that a killed run left."""
    storage.remove(storage.join(cache, ATTEMPTS))
    for folder in ("shards", "index"):
        for name in storage.list_folder(storage.join(cache, folder)):
            if ".tmp-" in name:
                logger.info("removing %s/%s, left by a run that was killed", folder, name)
                storage.remove(storage.join(cache, folder, name))


def run_on_ray(plan: PrecomputePlan, pending: list[ShardTask]) -> dict[str, ShardOutcome]:
    """Do the pending shards in an actor pool on the Ray that is up; see `RunShards` and `collect`."""
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    # our own bar counts shards; Ray's would count blocks beside it
    context.enable_progress_bars = False
    settings = plan.precompute
    require_room_for_an_actor(settings, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    tasks = ray.data.from_items(
        [{"task": json.dumps(asdict(task))} for task in pending], override_num_blocks=len(pending)
    )
    outcomes = tasks.map_batches(
        ShardActor,
        fn_constructor_args=(plan,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(settings.num_actors, len(pending))),
        num_cpus=settings.cpus_per_actor,
        num_gpus=settings.gpus_per_actor or None,
    )
    return collect(outcomes.iter_rows(), len(pending))


def require_room_for_an_actor(settings: PrecomputeSettings, nodes: Sequence[Mapping[str, float]]) -> None:
    """Check that one node that is up could hold an actor if it were idle: else Ray would wait for ever.

    Whether a cluster grows cannot be seen from inside, so the user says it: `precompute.wait_for_nodes`.

    Args:
        settings: what an actor asks for.
        nodes: resources of each node that is up, by Ray's names.

    Raises:
        ConfigError: no node is large enough, and none is waited for.
    """
    wanted = {"CPU": settings.cpus_per_actor, "GPU": settings.gpus_per_actor}
    if any(all(node.get(name, 0.0) >= amount for name, amount in wanted.items()) for node in nodes):
        return
    largest = {name: max((node.get(name, 0.0) for node in nodes), default=0.0) for name in wanted}
    message = (
        f"an actor wants {wanted['CPU']:g} CPU and {wanted['GPU']:g} GPU (precompute.cpus_per_actor, gpus_per_actor) "
        f"on one node, but no node of the cluster has that ({len(nodes)} up; at most {largest['CPU']:g} CPU and "
        f"{largest['GPU']:g} GPU on one)"
    )
    if not settings.wait_for_nodes:
        on_cpu = " (gpus_per_actor=0 encodes on CPUs)" if wanted["GPU"] > largest["GPU"] else ""
        raise ConfigError(f"{message}; lower them{on_cpu}, or set precompute.wait_for_nodes=true if the cluster grows.")
    logger.warning("%s; waiting for it to grow", message)


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
    failures: list[Mapping[str, Any]] = []
    with tqdm(total=num_shards, desc="precompute", unit="shard") as bar:
        for row in rows:
            if row["exit_code"]:
                failures.append(row)
            else:
                done[row["name"]] = ShardOutcome(**json.loads(row["outcome"]))
            bar.update()
            bar.set_postfix(
                kept=sum(outcome.kept for outcome in done.values()),
                bad=sum(len(outcome.quarantined) for outcome in done.values()),
            )
    if failures:
        _raise_failures(failures, num_shards)
    return done


def _raise_failures(failures: Sequence[Mapping[str, Any]], num_shards: int) -> None:
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
        f"precompute: {len(failures)} of {num_shards} shards could not be done ({first['name']}: {first['error']}); "
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
