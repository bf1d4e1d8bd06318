"""The Ray Data graph of raw shard -> latent cache: one task per shard, decode and encode fused in an actor.

The only file here that imports ray. Frames never pass the object store: an actor reads a
raw shard, decodes in child processes, encodes, and writes its output shard itself; what travels are task names and
counts. A shard is committed by its index fragment, so a restart redoes the uncommitted ones only.

One retry rule: a clip that fails is decoded again alone, `num_retries` times, then quarantined by name; its neighbours
are kept. One dead-letter table: `report.json` and `quarantine.txt`. Past `max_bad_fraction` the job fails, after the
report is written; what was committed stays.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from tqdm import tqdm

from data_pipeline.decode import DecodedClip, DecodeError, DecoderPool
from data_pipeline.encode import ClipEncoder, EncodedClip, EncodeError
from data_pipeline.filters import reason_to_drop
from data_pipeline.latent_cache import (
    NULL_PROMPT,
    CacheRecord,
    CacheShardWriter,
    index_path,
    read_manifest,
    write_manifest,
)
from data_pipeline.manifest import IndexRow, read_index
from data_pipeline.pack import RawClip, ShardDamage, read_shard
from data_pipeline.precompute_plan import (
    PrecomputePlan,
    ShardOutcome,
    ShardTask,
    committed_outcome,
    describe_cache,
    plan_tasks,
    require_same_settings,
)
from data_pipeline.precompute_report import write_report
from m4v_dist import storage
from m4v_dist.config.schema import PrecomputeSettings
from m4v_dist.errors import DataError, JobError, OutOfMemoryJobError, RetriesExhaustedError
from m4v_dist.frozen.text_encoder import build_text_encoder
from m4v_dist.frozen.video_vae import build_codec

LOG = logging.getLogger(__name__)
ATTEMPTS = "attempts"
"""Folder of the cache with a note for each shard that is being done."""
_MAX_WORKER_LOSSES = 4


@dataclass(frozen=True)
class PrecomputeResult:
    """How a precompute ended: whether it did anything, and its report."""

    did_nothing: bool
    report: dict[str, Any]


def run_precompute(plan: PrecomputePlan, start_workers: Callable[[], None]) -> PrecomputeResult:
    """Bring the cache to what the plan asks for.

    Args:
        plan: what to do.
        start_workers: starts or joins Ray; called once all that can be checked without it is checked, and only if
            there is work.

    Raises:
        DataError: a shard is missing, the cache was made with other settings, no clip was kept, or more than
            `max_bad_fraction` of the clips are quarantined (the report is written first).
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
    if not pending and existing is not None and existing["fragments"] == sorted(committed):
        LOG.info("nothing to do: all %d shards of %s are committed", len(tasks), cache)
        return PrecomputeResult(True, dict(storage.read_json(storage.join(cache, "report.json"))))
    LOG.info("%d shards: %d committed before, %d to do", len(tasks), len(committed), len(pending))
    _remove_leftovers(cache)
    done_now: dict[str, ShardOutcome] = {}
    if pending:
        start_workers()
        done_now = _run_on_ray(plan, pending)
    report = write_report(cache, {**committed, **done_now}, done_now, time.monotonic() - started)
    _require_enough(plan, report)
    write_manifest(cache, _manifest(plan, description, tasks), _null_text(plan))
    return PrecomputeResult(False, report)


def _remove_leftovers(cache: str) -> None:
    """Remove temporary files and notes of attempts that a killed run left."""
    storage.remove(storage.join(cache, ATTEMPTS))
    for folder in ("shards", "index"):
        for name in storage.list_folder(storage.join(cache, folder)):
            if ".tmp-" in name:
                LOG.info("removing %s/%s, left by a run that was killed", folder, name)
                storage.remove(storage.join(cache, folder, name))


def _run_on_ray(plan: PrecomputePlan, pending: list[ShardTask]) -> dict[str, ShardOutcome]:
    """Run the pending shards through an actor pool; returns outcomes by output name."""
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    # our own bar counts shards; Ray's would count blocks beside it
    context.enable_progress_bars = False
    settings = plan.precompute
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
    _warn_if_no_actor_fits(settings, ray.cluster_resources())
    done: dict[str, ShardOutcome] = {}
    failures: dict[str, str] = {}
    _collect(outcomes.iter_rows(), len(pending), done, failures)
    if failures:
        name, first = next(iter(failures.items()))
        kinds = (kind for kind in (OutOfMemoryJobError, RetriesExhaustedError) if first.startswith(kind.__name__))
        raise next(kinds, DataError)(
            f"precompute: {len(failures)} of {len(pending)} shards could not be done ({name}: {first}); "
            "the others are committed: mend the cause and run the same command again."
        )
    storage.remove(storage.join(plan.precompute.cache, ATTEMPTS))
    return done


def _collect(
    rows: Iterable[dict[str, Any]], num_shards: int, done: dict[str, ShardOutcome], failures: dict[str, str]
) -> None:
    """Gather what the actors report, with a progress bar; fills `done` and `failures` as it goes."""
    with tqdm(total=num_shards, desc="precompute", unit="shard") as bar:
        for row in rows:
            if row["error"]:
                failures[row["name"]] = row["error"]
            else:
                done[row["name"]] = ShardOutcome(**json.loads(row["outcome"]))
            bar.update()
            bar.set_postfix(
                kept=sum(outcome.kept for outcome in done.values()),
                bad=sum(len(outcome.quarantined) for outcome in done.values()),
            )


def _warn_if_no_actor_fits(settings: PrecomputeSettings, present: Mapping[str, float]) -> None:
    """Say why nothing starts, where a fixed cluster would wait for ever; one that grows may still get there."""
    for name, wanted in (("CPU", settings.cpus_per_actor), ("GPU", settings.gpus_per_actor)):
        if present.get(name, 0.0) < wanted:
            LOG.warning("an actor wants %g %s, the cluster has %g: waiting for it to grow", wanted, name,
                        present.get(name, 0.0))  # fmt: skip


class ShardActor:
    """Ray actor: encoders and decoder children live as long as it does; one call is one shard."""

    def __init__(self, plan: PrecomputePlan) -> None:
        import torch

        torch.set_num_threads(max(1, int(plan.precompute.cpus_per_actor)))
        self._plan = plan
        self._text_encoder = build_text_encoder(plan.text_encoder)
        device = "cuda" if plan.precompute.gpus_per_actor else "cpu"
        self._encoder = ClipEncoder(build_codec(plan.codec), self._text_encoder, device)
        settings = plan.precompute
        self._pool = DecoderPool(settings.decode_processes, settings.timeout_s, plan.decode_rule)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows: dict[str, list[str]] = {"name": [], "outcome": [], "error": []}
        for text in batch["task"]:
            task = ShardTask(**json.loads(text))
            outcome, error = "", ""
            # storage that fails costs this shard, not the run's other shards; the driver ends the job with its error
            try:
                with self._counted_attempt(task):
                    outcome = json.dumps(asdict(self.run(task)))
            except (JobError, OSError) as problem:
                error = f"{type(problem).__name__}: {problem}"
            for column, value in (("name", task.name), ("outcome", outcome), ("error", error)):
                rows[column].append(value)
        return rows

    @contextmanager
    def _counted_attempt(self, task: ShardTask) -> Iterator[None]:
        """Count how often a worker died in a shard, by a note that only a death leaves behind.

        Ray Data gives a lost actor's task to another for ever, which would never end at a shard that eats all memory.

        Raises:
            RetriesExhaustedError: it died `_MAX_WORKER_LOSSES` times in this run.
        """
        note = storage.join(self._plan.precompute.cache, ATTEMPTS, task.name)
        losses = int(storage.read_bytes(note)) if storage.exists(note) else 0
        if losses >= _MAX_WORKER_LOSSES:
            raise RetriesExhaustedError(
                f"{task.path}: its worker died {losses} times (out of memory, or its node gone); give an actor more "
                "memory by fewer precompute.num_actors, and see Ray's logs."
            )
        storage.write_bytes(note, str(losses + 1).encode())
        yield
        storage.remove(note)

    def run(self, task: ShardTask) -> ShardOutcome:
        """Do one shard and commit it."""
        outcome = ShardOutcome(task.source, task.fingerprint)
        cut_before = self._text_encoder.num_cut_captions
        writer = CacheShardWriter(self._plan.precompute.cache, task.name)
        try:
            for raw, clip in self._decoded(task, outcome):
                self._keep_or_drop(task, raw, clip, writer, outcome)
            outcome.num_cut_captions = self._text_encoder.num_cut_captions - cut_before
            writer.commit(asdict(outcome))
        finally:
            writer.abandon()
        return outcome

    def _decoded(self, task: ShardTask, outcome: ShardOutcome) -> Iterator[tuple[RawClip, DecodedClip]]:
        """Clips of a shard that decode, in shard order; the others are quarantined on the way."""
        waiting: list[RawClip] = []

        def media() -> Iterator[tuple[bytes, str]]:
            for raw in self._usable(task, outcome):
                waiting.append(raw)
                yield raw.data, str(raw.kind)

        for result in self._pool.decode_all(media()):
            raw = waiting.pop(0)
            final = self._retry(raw, result) if isinstance(result, DecodeError) else result
            if isinstance(final, DecodeError):
                _quarantine(outcome, task, raw.key, str(final))
            else:
                yield raw, final

    def _usable(self, task: ShardTask, outcome: ShardOutcome) -> Iterator[RawClip]:
        """Records with media and caption, each key once."""
        seen: set[str] = set()
        for raw in read_shard(task.path):
            if isinstance(raw, ShardDamage):
                _quarantine(outcome, task, "(rest of the shard)", raw.error)
                return
            if raw.key in seen:
                _quarantine(outcome, task, raw.key, "key stands twice in the shard")
            elif raw.kind is None:
                _quarantine(outcome, task, raw.key, "no media member of a known kind")
            elif raw.caption is None:
                _quarantine(outcome, task, raw.key, "caption is missing")
            else:
                yield raw
            seen.add(raw.key)

    def _retry(self, raw: RawClip, error: DecodeError) -> DecodedClip | DecodeError:
        for _ in range(self._plan.precompute.num_retries):
            try:
                return self._pool.decode(raw.data, str(raw.kind))
            except DecodeError as again:
                error = again
        return error

    def _keep_or_drop(
        self, task: ShardTask, raw: RawClip, clip: DecodedClip, writer: CacheShardWriter, outcome: ShardOutcome
    ) -> None:
        reason = reason_to_drop(clip, task.media, self._plan.precompute.min_frames)
        if reason is not None:
            outcome.filtered[reason] = outcome.filtered.get(reason, 0) + 1
            return
        try:
            encoded = self._encoder.encode(clip, str(raw.caption))
        except EncodeError as error:
            _quarantine(outcome, task, raw.key, str(error))
            return
        writer.add(_row(task, raw, clip, encoded), CacheRecord(encoded.latents, encoded.text))
        outcome.kept += 1


def _quarantine(outcome: ShardOutcome, task: ShardTask, key: str, error: str) -> None:
    shard = task.path.rsplit("/", 1)[-1]
    outcome.quarantined.append({"key": key, "shard": shard, "source": task.source, "error": error})


def _row(task: ShardTask, raw: RawClip, clip: DecodedClip, encoded: EncodedClip) -> IndexRow:
    return IndexRow(
        key=raw.key, source=task.source, media=task.media, shard="",
        height_px=clip.bucket[0], width_px=clip.bucket[1],
        num_frames=len(clip.frames), num_latents=encoded.latents.shape[1], fps=clip.fps,
        caption=str(raw.caption), num_text_tokens=len(encoded.text.tokens),
        offset_bytes=0, size_bytes=0, checksum="",
        source_height_px=clip.source_size[0], source_width_px=clip.source_size[1],
        source_num_frames=clip.source_num_frames, source_fps=clip.source_fps,
    )  # fmt: skip


def _require_enough(plan: PrecomputePlan, report: dict[str, Any]) -> None:
    bad, total, limit = len(report["quarantined"]), report["num_clips"], plan.precompute.max_bad_fraction
    where = storage.join(plan.precompute.cache, "quarantine.txt")
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


def _null_text(plan: PrecomputePlan) -> Any:
    return build_text_encoder(plan.text_encoder).encode([""])[0]
