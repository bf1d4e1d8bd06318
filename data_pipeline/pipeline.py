"""The Ray Data graph of raw shard -> latent cache: one task per shard, decode and encode fused in an actor.

The only file here that imports ray. Frames never pass the object store: an actor reads a
raw shard, decodes in child processes, encodes, and writes its output shard itself; what travels are task names and
counts. A shard is committed by its index fragment, so a restart redoes the uncommitted ones only.

One retry rule: a clip that fails is decoded again alone, `num_retries` times, then quarantined by name; its neighbours
are kept. One dead-letter table: `report.json` and `quarantine.txt`. Past `max_bad_fraction` the job fails, after the
report is written; what was committed stays.
"""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from tqdm import tqdm

from data_pipeline.decode import DecodedClip, DecodeError, DecoderPool, DecodeRule
from data_pipeline.encode import ClipEncoder, EncodedClip, EncodeError
from data_pipeline.filters import reason_to_drop
from data_pipeline.latent_cache import (
    FORMAT_VERSION,
    NULL_PROMPT,
    CacheRecord,
    CacheShardWriter,
    index_path,
    read_manifest,
    require_fingerprint,
    shard_path,
    write_manifest,
)
from data_pipeline.manifest import IndexRow, list_shards, read_index
from data_pipeline.pack import RawClip, ShardDamage, count_records, read_shard
from m4v_dist import storage
from m4v_dist.config.schema import CodecSettings, PrecomputeSettings, SourceSettings, TextEncoderSettings
from m4v_dist.errors import DataError, JobError
from m4v_dist.frozen.text_encoder import build_text_encoder
from m4v_dist.frozen.video_vae import build_codec

LOG = logging.getLogger(__name__)
RESIZE_RULE = "resized inside the decoder (bicubic) to cover the bucket of the nearest aspect ratio, centre crop"
FRAME_RULE = "8k+1 frames from the start"
FPS_RULE = "nearest frames at min(source fps, fps)"
_FINGERPRINT_EDGE_BYTES = 65536


@dataclass(frozen=True)
class PrecomputePlan:
    """All that decides the bytes of a cache, and how the work is spread; plain values, sent to the actors.

    Args:
        sources: what to read.
        precompute: where to, sizes, rates, workers, retries.
        codec: frames to latents.
        text_encoder: captions to embeddings.
    """

    sources: tuple[SourceSettings, ...]
    precompute: PrecomputeSettings
    codec: CodecSettings
    text_encoder: TextEncoderSettings

    @property
    def decode_rule(self) -> DecodeRule:
        """How clips are cut."""
        buckets = tuple((bucket.height_px, bucket.width_px) for bucket in self.precompute.buckets)
        return DecodeRule(buckets, self.precompute.num_frames, self.precompute.fps)


@dataclass(frozen=True)
class ShardTask:
    """One raw shard to do.

    Args:
        source: name of the source.
        media: video or image.
        path: of the raw shard.
        name: of the output shard, unique in the cache.
        fingerprint: of the input's bytes and of every setting that decides the output.
    """

    source: str
    media: str
    path: str
    name: str
    fingerprint: str


@dataclass
class ShardOutcome:
    """What became of a shard's clips; stored in its index fragment.

    Args:
        source: name of the source.
        fingerprint: see `ShardTask`.
        kept: records written.
        filtered: clips dropped, by reason.
        quarantined: clips that failed: key, shard (file name), source, error.
        num_cut_captions: captions longer than the text encoder takes.
    """

    source: str
    fingerprint: str
    kept: int = 0
    filtered: dict[str, int] = field(default_factory=dict)
    quarantined: list[dict[str, str]] = field(default_factory=list)
    num_cut_captions: int = 0

    @property
    def num_clips(self) -> int:
        """Clips seen."""
        return self.kept + sum(self.filtered.values()) + len(self.quarantined)


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
    report = _write_report(cache, {**committed, **done_now}, done_now, time.monotonic() - started)
    _require_enough(plan, report)
    write_manifest(cache, _manifest(plan, description, tasks), _null_text(plan))
    return PrecomputeResult(False, report)


def describe_cache(plan: PrecomputePlan) -> dict[str, Any]:
    """The part of the manifest that decides the records' bytes; two caches with equal ones are exchangeable."""
    codec, text_encoder = build_codec(plan.codec), build_text_encoder(plan.text_encoder)
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": codec.fingerprint() | text_encoder.fingerprint(),
        "normalization": codec.normalization.to_json(),
        "spatial_stride": codec.spatial_stride,
        "temporal_stride": codec.temporal_stride,
        "latent_channels": codec.latent_channels,
        "frame_rule": FRAME_RULE,
        "fps_rule": FPS_RULE,
        "resize_rule": RESIZE_RULE,
        "num_frames": plan.precompute.num_frames,
        "min_frames": plan.precompute.min_frames,
        "fps": plan.precompute.fps,
        "buckets": [[bucket.height_px, bucket.width_px] for bucket in plan.precompute.buckets],
    }


def require_same_settings(cache: str, manifest: dict[str, Any], description: dict[str, Any]) -> None:
    """Check that a cache that is there was made with the settings of this run.

    Raises:
        DataError: naming each field that differs, with both values.
    """
    require_fingerprint(cache, manifest, description["fingerprint"])
    differing = [name for name in description if manifest.get(name) != description[name]]
    if differing:
        lines = "; ".join(f"{name}: cache {manifest.get(name)!r}, config {description[name]!r}" for name in differing)
        raise DataError(f"{cache}: holds a cache of other settings ({lines}); give precompute.cache another folder.")


def plan_tasks(plan: PrecomputePlan, description: dict[str, Any]) -> list[ShardTask]:
    """List every shard of every source as a task.

    Raises:
        DataError: a shard is missing.
    """
    shards = [(source, path) for source in plan.sources for path in list_shards(source.shards)]
    names = _output_names(shards)
    tasks = []
    for (source, path), name in zip(shards, names, strict=True):
        settings = {"description": description, "media": source.media, "input": _input_fingerprint(path)}
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()
        tasks.append(ShardTask(source.name, source.media, path, name, digest))
    return tasks


def _output_names(shards: list[tuple[SourceSettings, str]]) -> list[str]:
    """`<source>-<shard>`; shards of one name in several folders also get a hash of their path."""
    plain = [f"{source.name}-{path.rsplit('/', 1)[-1].removesuffix('.tar')}" for source, path in shards]
    twice = {name for name, count in Counter(plain).items() if count > 1}
    hashes = [hashlib.blake2b(path.encode(), digest_size=4).hexdigest() for _, path in shards]
    return [f"{name}-{digest}" if name in twice else name for name, digest in zip(plain, hashes, strict=True)]


def _input_fingerprint(path: str) -> str:
    """Size and both ends of a shard: cheap for terabytes; a change inside of equal size is not seen."""
    size = storage.size_bytes(path)
    edge = min(size, _FINGERPRINT_EDGE_BYTES)
    ends = storage.read_bytes(path, 0, edge) + storage.read_bytes(path, size - edge, edge)
    return f"{size}-{hashlib.blake2b(ends, digest_size=16).hexdigest()}"


def committed_outcome(cache: str, task: ShardTask) -> ShardOutcome | None:
    """The outcome of a shard that is committed with this very input and settings, else None."""
    path = index_path(cache, task.name)
    if not storage.exists(path):
        return None
    rows, notes = read_index(path)
    if notes["fingerprint"] != task.fingerprint or (rows and not storage.exists(shard_path(cache, task.name))):
        return None
    return ShardOutcome(**notes)


def _remove_leftovers(cache: str) -> None:
    """Remove temporary files that a killed run left beside the shards and fragments."""
    for folder in ("shards", "index"):
        for name in storage.list_folder(storage.join(cache, folder)):
            if ".tmp-" in name:
                LOG.info("removing %s/%s, left by a run that was killed", folder, name)
                storage.remove(storage.join(cache, folder, name))


def _run_on_ray(plan: PrecomputePlan, pending: list[ShardTask]) -> dict[str, ShardOutcome]:
    """Run the pending shards through an actor pool; returns outcomes by output name."""
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
    done: dict[str, ShardOutcome] = {}
    failures: list[str] = []
    with tqdm(total=len(pending), desc="precompute", unit="shard") as bar:
        for row in outcomes.iter_rows():
            if row["error"]:
                failures.append(f"{row['name']}: {row['error']}")
            else:
                done[row["name"]] = ShardOutcome(**json.loads(row["outcome"]))
            bar.update()
            bar.set_postfix(
                kept=sum(outcome.kept for outcome in done.values()),
                bad=sum(len(outcome.quarantined) for outcome in done.values()),
            )
    if failures:
        raise DataError(
            f"precompute: {len(failures)} of {len(pending)} shards could not be read or written ({failures[0]}); "
            "the others are committed: mend the cause and run the same command again."
        )
    return done


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
                outcome = json.dumps(asdict(self.run(task)))
            except (JobError, OSError) as problem:
                error = f"{type(problem).__name__}: {problem}"
            for column, value in (("name", task.name), ("outcome", outcome), ("error", error)):
                rows[column].append(value)
        return rows

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


def _write_report(
    cache: str, outcomes: dict[str, ShardOutcome], done_now: dict[str, ShardOutcome], seconds: float
) -> dict[str, Any]:
    """Write report.json and quarantine.txt over all shards, log the table, return the report."""
    ordered = [outcomes[name] for name in sorted(outcomes)]
    quarantined = [entry for outcome in ordered for entry in outcome.quarantined]
    per_source: dict[str, Counter[str]] = {}
    for outcome in ordered:
        counts = per_source.setdefault(outcome.source, Counter())
        counts.update(kept=outcome.kept, quarantined=len(outcome.quarantined), **outcome.filtered)
    num_now = sum(outcome.num_clips for outcome in done_now.values())
    report = {
        "kept": sum(outcome.kept for outcome in ordered),
        "filtered": dict(sum((Counter(outcome.filtered) for outcome in ordered), Counter())),
        "quarantined": quarantined,
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
    storage.write_bytes(storage.join(cache, "quarantine.txt"), "".join(f"{line}\n" for line in lines).encode())
    LOG.info("precompute report\n%s", format_report(report))
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
    lines.append(f"{report['num_clips']} clips, {report['clips_per_s']} clips/s this run")
    return "\n".join(lines)


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


def describe_plan(plan: PrecomputePlan) -> str:
    """What a run would do, as a table; reads shard headers, writes nothing.

    Raises:
        DataError: a shard is missing or is no tar; the cache has other settings.
    """
    description = describe_cache(plan)
    existing = read_manifest(plan.precompute.cache)
    if existing is not None:
        require_same_settings(plan.precompute.cache, existing, description)
    tasks = plan_tasks(plan, description)
    largest = max(plan.precompute.buckets, key=lambda bucket: bucket.height_px * bucket.width_px)
    grid = largest.height_px * largest.width_px // description["spatial_stride"] ** 2
    longest = (plan.precompute.num_frames - 1) // description["temporal_stride"] + 1
    lines, total = [f"{'source':<20}{'shards':>8}{'to do':>8}{'clips':>10}{'at most MiB':>14}"], 0.0
    for source in plan.sources:
        of_source = [task for task in tasks if task.source == source.name]
        todo = sum(committed_outcome(plan.precompute.cache, task) is None for task in of_source)
        clips = sum(count_records(task.path) for task in of_source)
        latents = longest if source.media == "video" else 1
        mib = clips * latents * grid * description["latent_channels"] * 2 / 2**20
        total += mib
        lines.append(f"{source.name:<20}{len(of_source):>8}{todo:>8}{clips:>10}{mib:>14.1f}")
    lines.append(f"latents of the whole cache: at most {total:.1f} MiB in {plan.precompute.cache}, text beside it")
    return "\n".join(lines)
