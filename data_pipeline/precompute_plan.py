"""What a precompute has to do: tasks, the settings that decide the bytes, and what is committed already; no Ray.

Each raw shard is one task with one output name. A fingerprint of its input and of every setting that decides the output
is stored in its index fragment, so that a restart knows what it may skip.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.cache_manifest import FORMAT_VERSION, index_path, require_fingerprint, shard_path
from data_pipeline.decode import DecodeRule
from data_pipeline.decoder_pool import require_decord
from data_pipeline.manifest import list_shards, read_index
from data_pipeline.shard_keys import first_key, require_keys_of_their_own
from data_pipeline.survey import SurveyRule
from m4v_dist import storage
from m4v_dist.config.curation_settings import CurationSettings, CurationThresholds
from m4v_dist.config.data_settings import (
    BucketSettings,
    CodecSettings,
    PrecomputeSettings,
    SourceSettings,
    TextEncoderSettings,
)
from m4v_dist.errors import DataError
from m4v_dist.frozen.text_encoder import text_encoder_fingerprint
from m4v_dist.frozen.video_vae import build_codec

RESIZE_RULE = (
    "resized inside the decoder (bilinear; pictures bicubic) to cover the bucket of the nearest aspect ratio, "
    "centre crop"
)
FRAME_RULE = "8k+1 frames from the start"
FPS_RULE = "frames nearest in time at min(mean source fps, fps)"
_FINGERPRINT_EDGE_BYTES = 65536


@dataclass(frozen=True)
class PrecomputePlan:
    """All that decides the bytes of a cache, and how the work is spread; plain values, sent to the actors.

    Args:
        sources: what to read.
        precompute: where to, sizes, rates, workers, retries.
        codec: frames to latents.
        text_encoder: captions to embeddings.
        curation: which pieces of raw clips are encoded.
    """

    sources: tuple[SourceSettings, ...]
    precompute: PrecomputeSettings
    codec: CodecSettings
    text_encoder: TextEncoderSettings
    curation: CurationSettings = CurationSettings()

    @property
    def survey_rule(self) -> SurveyRule:
        """How raw clips are surveyed."""
        precompute, curation = self.precompute, self.curation
        return SurveyRule(precompute.num_frames, precompute.fps, curation.cut_change, curation.cut_ratio)

    def thresholds_of(self, source: str) -> CurationThresholds:
        """What the pieces of a source must be to be kept."""
        own = next(item.thresholds for item in self.sources if item.name == source)
        return self.curation.thresholds if own is None else own

    def buckets_of(self, source: str) -> tuple[BucketSettings, ...]:
        """Sizes that the clips of a source may go to."""
        own = next(item.buckets for item in self.sources if item.name == source)
        return own or self.precompute.buckets

    def decode_rule(self, source: str) -> DecodeRule:
        """How the clips of a source are cut."""
        buckets = tuple((bucket.height_px, bucket.width_px) for bucket in self.buckets_of(source))
        settings = self.precompute
        return DecodeRule(
            buckets, settings.num_frames, settings.fps, settings.decoder, int(settings.max_decode_gib * 2**30)
        )


@dataclass(frozen=True)
class ShardTask:
    """One raw shard to do.

    Args:
        source: name of the source.
        media: video or image.
        path: of the raw shard.
        name: of the output shard, unique in the cache.
        fingerprint: of the input's bytes and of every setting that decides the output.
        input_fingerprint: of the input's bytes alone.
        clip_list: digest of what its clip list has encoded; empty where there is none, and all clips are.
    """

    source: str
    media: str
    path: str
    name: str
    fingerprint: str
    input_fingerprint: str = ""
    clip_list: str = ""


@dataclass
class ShardOutcome:
    """What became of a shard's clips; stored in its index fragment.

    Args:
        source: name of the source.
        fingerprint: see `ShardTask`.
        kept: records that stand in the index.
        filtered: clips dropped, by reason.
        quarantined: clips that failed: key, shard (file name), source, error.
        decoders: clips kept, by what decoded them.
        num_cut_captions: captions longer than the text encoder takes.
        dropped: clips that a list of `jobs.inspect_cache drop` named: key, source, when. They stay dropped in a redone
            shard.
        unindexed: records of the tar that no row names, by `manifest.without_rows`: key, offset_bytes, size_bytes.
        damage: shard (file name), source, error, where the rest of the raw shard could not be read; empty where it was
            whole. The clips lost there are in no other count: nobody knows how many they are.
        tar_bytes: size of the shard's tar, as its writer notes it.
    """

    source: str
    fingerprint: str
    kept: int = 0
    filtered: dict[str, int] = field(default_factory=dict)
    quarantined: list[dict[str, str]] = field(default_factory=list)
    decoders: dict[str, int] = field(default_factory=dict)
    num_cut_captions: int = 0
    dropped: list[dict[str, str]] = field(default_factory=list)
    unindexed: list[dict[str, Any]] = field(default_factory=list)
    damage: dict[str, str] = field(default_factory=dict)
    tar_bytes: int = 0

    @property
    def num_clips(self) -> int:
        """Clips seen."""
        return self.kept + sum(self.filtered.values()) + len(self.quarantined) + len(self.dropped)


def describe_cache(plan: PrecomputePlan) -> dict[str, Any]:
    """The part of the manifest that decides the records' bytes; two caches with equal ones are exchangeable."""
    codec = build_codec(plan.codec)
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": codec.fingerprint() | text_encoder_fingerprint(plan.text_encoder),
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
        "decoder": plan.precompute.decoder,
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
        DataError: a shard is missing, or two of a source begin with the same key.
    """
    shards = [(source, path) for source in plan.sources for path in list_shards(source.shards)]
    names = _output_names(shards)
    tasks, first_keys = [], []
    for (source, path), name in zip(shards, names, strict=True):
        of_input, key = _input_fingerprint(path)
        first_keys.append((source.name, path, key))
        settings: dict[str, Any] = {"description": description, "media": source.media, "input": of_input}
        if source.buckets:
            settings["buckets"] = [[bucket.height_px, bucket.width_px] for bucket in source.buckets]
        tasks.append(ShardTask(source.name, source.media, path, name, digest_of(settings), of_input))
    require_keys_of_their_own(first_keys)
    return tasks


def digest_of(settings: Any) -> str:
    """Digest of plain values, as hex."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()


def _output_names(shards: list[tuple[SourceSettings, str]]) -> list[str]:
    """`<source>-<shard>`; shards of one name in several folders also get a hash of their path."""
    plain = [f"{source.name}-{path.rsplit('/', 1)[-1].removesuffix('.tar')}" for source, path in shards]
    twice = {name for name, count in Counter(plain).items() if count > 1}
    hashes = [hashlib.blake2b(path.encode(), digest_size=4).hexdigest() for _, path in shards]
    return [f"{name}-{digest}" if name in twice else name for name, digest in zip(plain, hashes, strict=True)]


def _input_fingerprint(path: str) -> tuple[str, str | None]:
    """Size and both ends of a shard, and its first key: cheap; a change inside of equal size is not seen."""
    size = storage.size_bytes(path)
    edge = min(size, _FINGERPRINT_EDGE_BYTES)
    head, tail = storage.read_bytes(path, 0, edge), storage.read_bytes(path, size - edge, edge)
    return f"{size}-{hashlib.blake2b(head + tail, digest_size=16).hexdigest()}", first_key(head)


def require_decoder(tasks: Iterable[ShardTask], decoder: str) -> None:
    """Check that what the tasks need to decode can be imported here; stills need nothing that could be missing.

    Raises:
        ConfigError: decord is missing or broken.
    """
    if decoder in {"auto", "decord"} and any(task.media == "video" for task in tasks):
        require_decord()


def committed_outcome(cache: str, task: ShardTask) -> ShardOutcome | None:
    """The outcome of a shard that is committed with this very input and settings, else None."""
    path = index_path(cache, task.name)
    if not storage.exists(path):
        return None
    rows, notes = read_index(path)
    if notes["fingerprint"] != task.fingerprint or (rows and not storage.exists(shard_path(cache, task.name))):
        return None
    return ShardOutcome(**notes)


def require_own_shard(cache: str, task: ShardTask, notes: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Check that a committed shard is of this task, and its tar as long as it was committed.

    Args:
        cache: folder of the cache.
        task: that it should be of.
        notes: of its index fragment.
        sizes: of the files in `shards/`, by name.

    Raises:
        DataError: another job wrote one of the two after this one; the message says what to remove.
    """
    found = sizes.get(f"{task.name}.tar", 0)
    if notes["fingerprint"] != task.fingerprint or found != notes["tar_bytes"]:
        raise DataError(
            f"{shard_path(cache, task.name)}: holds {found} bytes where its index, of fingerprint "
            f"{notes['fingerprint']}, says {notes['tar_bytes']}, and this job's fingerprint is {task.fingerprint}: "
            f"another job wrote here. Remove {index_path(cache, task.name)}, and run again."
        )
