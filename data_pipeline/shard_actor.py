"""What one worker of the precompute does with a raw shard: read, decode, filter, encode, write, commit; no Ray here.

Four things go on at once: a thread reads the shard's next clips, decoder children decode those that were read, this
process encodes those that were decoded, and the shard before is committed. Frames never leave the process (but for its
decoder children): what comes in is a task, what goes out are counts. One retry rule: a clip that fails is decoded again
alone, `num_retries` times, then quarantined by name; its neighbours are kept.
"""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.attempts import counted_attempt
from data_pipeline.cache_drop import dropped_before
from data_pipeline.cache_writer import CacheShardWriter
from data_pipeline.clip_list import ClipList, WantedClip
from data_pipeline.decode import DecodedClip, DecodeError, DecodeRule, Span
from data_pipeline.decoder_pool import DecoderPool
from data_pipeline.encode import ClipEncoder, EncodedClip, EncodeError
from data_pipeline.filters import reason_to_drop, scores
from data_pipeline.manifest import IndexRow
from data_pipeline.pack import RawClip, ShardDamage, read_shard
from data_pipeline.precompute_plan import PrecomputePlan, ShardOutcome, ShardTask
from data_pipeline.raw_records import fault_of
from data_pipeline.read_ahead import ReadAhead
from m4v_dist.errors import DataError, JobError
from m4v_dist.frozen.text_encoder import build_text_encoder
from m4v_dist.frozen.video_vae import build_codec
from m4v_dist.lease import Lease, require_held


@dataclass(frozen=True)
class _Read:
    """A record as it came off the shard: its place there, and why it cannot be used; None where it can."""

    position: int
    raw: RawClip
    fault: str | None


@dataclass
class _Shard:
    """A shard in work: what became of its clips so far, and the seconds that went where."""

    task: ShardTask
    outcome: ShardOutcome
    seconds: defaultdict[str, float]
    bad: list[tuple[int, dict[str, str]]]

    def quarantine(self, record: _Read, error: str, clip: WantedClip | None = None) -> None:
        """Count a record that failed, or a clip of it."""
        where = {"shard": _file_name(self.task), "source": self.task.source}
        key = record.raw.key if clip is None else clip.key
        self.bad.append((record.position, {"key": key, **where, "error": error}))

    def finish(self) -> ShardOutcome:
        """The outcome; failed clips in the order of the shard, however far ahead each was found out."""
        self.outcome.quarantined = [entry for _, entry in sorted(self.bad, key=lambda found: found[0])]
        return self.outcome

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the seconds of a block."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] += time.monotonic() - started


class ShardActor:
    """Does shards: encoders and decoder children live as long as it does; one call is one shard.

    `__call__` is what Ray Data maps over batches of one: {"task": [JSON of a `ShardTask`]} to `name`, `outcome` (JSON
    of a `ShardOutcome`, empty where it failed), `error`, `exit_code` (0 where it did not), and `seconds`: JSON of what
    went where, `read_s`, `decode_s` (summed over the children), `encode_s`, `write_s`, and `wait_s`, for which the
    encoder had nothing to do. `actor_memory.CALLS_PER_ACTOR` threads may call at once: one of them decodes and encodes.

    Args:
        plan: what to do.
        lease: on the cache; asked for before each shard and each write, so that a worker whose job was overtaken
            commits nothing. None: nobody else can be at work there.
    """

    def __init__(self, plan: PrecomputePlan, lease: Lease | None = None) -> None:
        import torch

        torch.set_num_threads(max(1, int(plan.precompute.cpus_per_actor)))
        self._plan = plan
        self._lease = lease
        device = "cuda" if plan.precompute.gpus_per_actor else "cpu"
        self._text_encoder = build_text_encoder(plan.text_encoder, device)
        self._encoder = ClipEncoder(build_codec(plan.codec), self._text_encoder, device)
        self._rule: DecodeRule | None = None
        self._pool: DecoderPool | None = None
        self._turn = threading.Lock()

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
        rows: dict[str, list[Any]] = {"name": [], "outcome": [], "error": [], "exit_code": [], "seconds": []}
        for text in batch["task"]:
            task = ShardTask(**json.loads(text))
            shard = _Shard(task, ShardOutcome(task.source, task.fingerprint), defaultdict(float), [])
            outcome, error, exit_code = "", "", 0
            # storage that fails costs this shard, not the run's other shards; the driver ends the job with its error
            try:
                outcome = json.dumps(asdict(self._do(shard)))
            except (JobError, OSError) as problem:
                error = f"{type(problem).__name__}: {problem}"
                exit_code = problem.exit_code if isinstance(problem, JobError) else DataError.exit_code
            found = {"name": task.name, "outcome": outcome, "error": error, "exit_code": exit_code}
            for column, value in (found | {"seconds": json.dumps(shard.seconds)}).items():
                rows[column].append(value)
        return rows

    def _require_held(self) -> None:
        if self._lease is not None:
            require_held(self._plan.precompute.cache, self._lease)

    def _do(self, shard: _Shard) -> ShardOutcome:
        """Do one shard and commit it."""
        task, settings = shard.task, self._plan.precompute
        self._require_held()
        max_bytes = settings.media_mib_in_flight * 2**20
        with ReadAhead(_records(task), _size_bytes, max_bytes) as records, ExitStack() as until_committed:
            with self._turn:
                until_committed.enter_context(counted_attempt(settings.cache, task.name, task.path))
                dropped = dropped_before(settings.cache, task.name)
                writer = CacheShardWriter(settings.cache, task.name, self._require_held)
                until_committed.callback(writer.abandon)
                self._encode_all(shard, records, writer, dropped)
            shard.seconds["read_s"] = records.read_s
            with shard.timed("write_s"):
                writer.commit(asdict(shard.finish()))
        return shard.outcome

    def _encode_all(
        self,
        shard: _Shard,
        records: ReadAhead[_Read | ShardDamage],
        writer: CacheShardWriter,
        dropped: Mapping[str, dict[str, Any]],
    ) -> None:
        cut_before = self._text_encoder.num_cut_captions
        clip_list = ClipList.of(self._plan.precompute.cache, shard.task.name, shard.task.clip_list)
        pool = self._pool_of(shard.task.source)
        clips = self._decoded(shard, records, clip_list, pool)
        while True:
            with shard.timed("wait_s"):
                found = next(clips, None)
            if found is None:
                break
            key = found[1].key
            if key in dropped:
                shard.outcome.dropped.append(dropped[key])
            else:
                self._keep_or_drop(shard, *found, writer)
        shard.outcome.num_cut_captions = self._text_encoder.num_cut_captions - cut_before
        shard.seconds["decode_s"] = pool.take_busy_s()

    def _decoded(
        self, shard: _Shard, records: ReadAhead[_Read | ShardDamage], clip_list: ClipList, pool: DecoderPool
    ) -> Iterator[tuple[_Read, WantedClip, DecodedClip]]:
        """Clips of a shard that are wanted and decode, in shard order; the others are quarantined on the way."""
        waiting: list[tuple[_Read, WantedClip, bool]] = []

        def media() -> Iterator[tuple[bytes, str, Span | None]]:
            for record in records:
                wanted = _wanted(shard, record, clip_list)
                if isinstance(record, ShardDamage) or not wanted:
                    records.release(record)
                    continue
                for clip in wanted:
                    waiting.append((record, clip, clip is wanted[-1]))
                    yield record.raw.data, str(record.raw.kind), clip.span

        for result in pool.decode_all(media()):
            record, clip, is_last = waiting.pop(0)
            final = self._retry(pool, record.raw, clip.span, result) if isinstance(result, DecodeError) else result
            if is_last:
                records.release(record)
            if isinstance(final, DecodeError):
                shard.quarantine(record, str(final), clip)
            else:
                yield record, clip, final

    def _retry(
        self, pool: DecoderPool, raw: RawClip, span: Span | None, error: DecodeError
    ) -> DecodedClip | DecodeError:
        for _ in range(self._plan.precompute.num_retries):
            try:
                return pool.decode(raw.data, str(raw.kind), span)
            except DecodeError as again:
                error = again
        return error

    def _keep_or_drop(
        self, shard: _Shard, record: _Read, wanted: WantedClip, clip: DecodedClip, writer: CacheShardWriter
    ) -> None:
        raw, outcome = record.raw, shard.outcome
        reason = reason_to_drop(clip, shard.task.media, self._plan.precompute.min_frames)
        if reason is not None:
            outcome.filtered[reason] = outcome.filtered.get(reason, 0) + 1
            return
        try:
            with shard.timed("encode_s"):
                encoded = self._encoder.encode(clip, [caption.text for caption in raw.captions], wanted.key)
        except EncodeError as error:
            shard.quarantine(record, str(error), wanted)
            return
        with shard.timed("write_s"):
            writer.add(_row(shard.task, raw, wanted, clip, encoded), encoded.latents, encoded.texts)
        outcome.kept += 1
        outcome.decoders[clip.decoder] = outcome.decoders.get(clip.decoder, 0) + 1


def _records(task: ShardTask) -> Iterator[_Read | ShardDamage]:
    """Records of a raw shard, each key once: without media, caption or a key of their own they have a fault."""
    seen: set[str] = set()
    for position, raw in enumerate(read_shard(task.path)):
        if isinstance(raw, ShardDamage):
            yield raw
            return
        yield _Read(position, raw, fault_of(raw, seen))


def _wanted(shard: _Shard, record: _Read | ShardDamage, clip_list: ClipList) -> list[WantedClip]:
    """Clips of a record to encode; of one that cannot be used none, and that is noted."""
    if isinstance(record, ShardDamage):
        shard.outcome.damage = {"shard": _file_name(shard.task), "source": shard.task.source, "error": record.error}
        return []
    if record.fault is not None:
        shard.quarantine(record, record.fault)
        return []
    try:
        return clip_list.wanted(record.raw.key)
    except KeyError:
        shard.quarantine(record, "was not surveyed: the shard changed while this job ran")
        return []


def _size_bytes(record: _Read | ShardDamage) -> int:
    return len(record.raw.data) if isinstance(record, _Read) else 0


def _file_name(task: ShardTask) -> str:
    return task.path.rsplit("/", 1)[-1]


def _row(task: ShardTask, raw: RawClip, wanted: WantedClip, clip: DecodedClip, encoded: EncodedClip) -> IndexRow:
    return IndexRow(
        key=wanted.key, source=task.source, media=task.media, shard="",
        height_px=clip.bucket[0], width_px=clip.bucket[1],
        num_frames=len(clip.frames), num_latents=encoded.latents.shape[1], fps=clip.fps,
        captions=tuple(caption.text for caption in raw.captions),
        caption_weights=tuple(caption.weight for caption in raw.captions),
        num_text_tokens=tuple(len(text.tokens) for text in encoded.texts),
        offset_bytes=0, size_bytes=0, checksum="",
        source_height_px=clip.source_size[0], source_width_px=clip.source_size[1],
        source_num_frames=clip.source_num_frames, source_fps=clip.source_fps,
        scores=json.dumps(scores(clip) if wanted.scores is None else wanted.scores, sort_keys=True),
    )  # fmt: skip
