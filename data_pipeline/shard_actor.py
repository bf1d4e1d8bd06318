"""What one worker of the precompute does with a raw shard: read, decode, filter, encode, write, commit; no Ray here.

Frames never leave the process (but for its decoder children): what comes in is a task, what goes out are counts. One
retry rule: a clip that fails is decoded again alone, `num_retries` times, then quarantined by name; its neighbours are
kept.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from data_pipeline.decode import DecodedClip, DecodeError, DecodeRule, Span
from data_pipeline.decoder_pool import DecoderPool
from data_pipeline.encode import ClipEncoder, EncodedClip, EncodeError
from data_pipeline.filters import reason_to_drop, scores
from data_pipeline.latent_cache import CacheRecord, CacheShardWriter
from data_pipeline.manifest import IndexRow
from data_pipeline.pack import RawClip, ShardDamage, read_shard
from data_pipeline.precompute_plan import PrecomputePlan, ShardOutcome, ShardTask
from m4v_dist import storage
from m4v_dist.errors import DataError, JobError, RetriesExhaustedError
from m4v_dist.frozen.text_encoder import build_text_encoder
from m4v_dist.frozen.video_vae import build_codec

ATTEMPTS = "attempts"
"""Folder of the cache with a note for each shard that is being done."""
_MAX_WORKER_LOSSES = 4


class ShardActor:
    """Does shards: encoders and decoder children live as long as it does; one call is one shard.

    `__call__` is what Ray Data maps over batches of one: {"task": [JSON of a `ShardTask`]} to `name`, `outcome` (JSON
    of a `ShardOutcome`, empty where it failed), `error` and `exit_code` (0 where it did not).
    """

    def __init__(self, plan: PrecomputePlan) -> None:
        import torch

        torch.set_num_threads(max(1, int(plan.precompute.cpus_per_actor)))
        self._plan = plan
        device = "cuda" if plan.precompute.gpus_per_actor else "cpu"
        self._text_encoder = build_text_encoder(plan.text_encoder, device)
        self._encoder = ClipEncoder(build_codec(plan.codec), self._text_encoder, device)
        self._rule: DecodeRule | None = None
        self._pool: DecoderPool | None = None

    def close(self) -> None:
        """End the decoder children."""
        if self._pool is not None:
            self._pool.close()
        self._rule = self._pool = None

    def _pool_of(self, source: str) -> DecoderPool:
        """Decoder children that cut clips as this source wants them; those of another rule end first."""
        rule = self._plan.decode_rule(source)
        if self._pool is None or self._rule != rule:
            self.close()
            settings = self._plan.precompute
            self._rule, self._pool = rule, DecoderPool(settings.decode_processes, settings.timeout_s, rule)
        return self._pool

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows: dict[str, list[Any]] = {"name": [], "outcome": [], "error": [], "exit_code": []}
        for text in batch["task"]:
            task = ShardTask(**json.loads(text))
            outcome, error, exit_code = "", "", 0
            # storage that fails costs this shard, not the run's other shards; the driver ends the job with its error
            try:
                with self._counted_attempt(task):
                    outcome = json.dumps(asdict(self.run(task)))
            except (JobError, OSError) as problem:
                error = f"{type(problem).__name__}: {problem}"
                exit_code = problem.exit_code if isinstance(problem, JobError) else DataError.exit_code
            found = {"name": task.name, "outcome": outcome, "error": error, "exit_code": exit_code}
            for column, value in found.items():
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
        # an error that is raised is reported by itself; only a process that dies leaves the note
        try:
            yield
        finally:
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

        def media() -> Iterator[tuple[bytes, str, Span | None]]:
            for raw in self._usable(task, outcome):
                waiting.append(raw)
                yield raw.data, str(raw.kind), None

        pool = self._pool_of(task.source)
        for result in pool.decode_all(media()):
            raw = waiting.pop(0)
            final = self._retry(pool, raw, result) if isinstance(result, DecodeError) else result
            if isinstance(final, DecodeError):
                _quarantine(outcome, task, raw.key, str(final))
            else:
                yield raw, final

    def _usable(self, task: ShardTask, outcome: ShardOutcome) -> Iterator[RawClip]:
        """Records with media and caption, each key once."""
        seen: set[str] = set()
        for raw in read_shard(task.path):
            if isinstance(raw, ShardDamage):
                outcome.damage = {"shard": _file_name(task), "source": task.source, "error": raw.error}
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

    def _retry(self, pool: DecoderPool, raw: RawClip, error: DecodeError) -> DecodedClip | DecodeError:
        for _ in range(self._plan.precompute.num_retries):
            try:
                return pool.decode(raw.data, str(raw.kind))
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
            encoded = self._encoder.encode(clip, str(raw.caption), raw.key)
        except EncodeError as error:
            _quarantine(outcome, task, raw.key, str(error))
            return
        writer.add(_row(task, raw, clip, encoded), CacheRecord(encoded.latents, encoded.text))
        outcome.kept += 1
        outcome.decoders[clip.decoder] = outcome.decoders.get(clip.decoder, 0) + 1


def _quarantine(outcome: ShardOutcome, task: ShardTask, key: str, error: str) -> None:
    outcome.quarantined.append({"key": key, "shard": _file_name(task), "source": task.source, "error": error})


def _file_name(task: ShardTask) -> str:
    return task.path.rsplit("/", 1)[-1]


def _row(task: ShardTask, raw: RawClip, clip: DecodedClip, encoded: EncodedClip) -> IndexRow:
    return IndexRow(
        key=raw.key, source=task.source, media=task.media, shard="",
        height_px=clip.bucket[0], width_px=clip.bucket[1],
        num_frames=len(clip.frames), num_latents=encoded.latents.shape[1], fps=clip.fps,
        caption=str(raw.caption), num_text_tokens=len(encoded.text.tokens),
        offset_bytes=0, size_bytes=0, checksum="",
        source_height_px=clip.source_size[0], source_width_px=clip.source_size[1],
        source_num_frames=clip.source_num_frames, source_fps=clip.source_fps,
        scores=json.dumps(scores(clip), sort_keys=True),
    )  # fmt: skip
