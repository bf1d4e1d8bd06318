"""The files between the two passes: what a survey found in a raw shard, and which of it is encoded.

One Parquet file a raw shard for each, in the cache: `curation/<task>.parquet`, the survey, whose presence commits it,
and `curation/lists/<task>.parquet`, the clip list, made of it by thresholds. A raw shard of several sources is surveyed
once, and has a list for each of them. A list holds every row of its survey, the
dropped ones with the reason, so that a person can ask it why.

No torch and no decoder here.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any

import pyarrow
import pyarrow.parquet

from m4v_dist import storage
from m4v_dist.errors import DataError

CURATION = "curation"
"""Folder of the cache with all that curation writes."""
_NOTES = b"m4v"
_READS_AT_ONCE = 16
_ARROW_TYPES = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}


@dataclass(frozen=True)
class SurveyedClip:
    """A piece of a raw clip, as surveyed, and what became of it; see `survey.Piece` for the scores.

    Args:
        key: of the raw clip.
        clip_key: of the record that it may become: `key` where it begins with the raw clip, else with its first frame
            behind it.
        content_hash: blake2b of the media bytes, hex.
        scene, part: which scene of the raw clip, and which piece of it, from 0.
        first_frame, num_frames: in source frames.
        seconds: its length; 0 for a still.
        fps: of the raw clip; 0 for a still.
        height_px, width_px: of the raw clip, upright.
        reason: why it is dropped; empty: it is encoded. In a survey nothing is judged yet.
    """

    key: str
    clip_key: str
    content_hash: str
    scene: int
    part: int
    first_frame: int
    num_frames: int
    seconds: float
    fps: float
    height_px: int
    width_px: int
    motion: float
    static_share: float
    black_share: float
    brightness: float
    contrast: float
    sharpness: float
    bars_share: float
    reason: str = ""

    def scores(self) -> dict[str, float]:
        """What an index row stores of it."""
        names = ("motion", "static_share", "black_share", "brightness", "contrast", "sharpness", "bars_share")
        return {name: getattr(self, name) for name in names}


def survey_path(cache: str, task: str) -> str:
    """Where the survey of a shard stands; it exists once that shard is surveyed."""
    return storage.join(cache, CURATION, f"{task}.parquet")


def list_path(cache: str, task: str) -> str:
    """Where the clip list of a shard stands."""
    return storage.join(cache, CURATION, "lists", f"{task}.parquet")


def write_clips(path: str, clips: Sequence[SurveyedClip], notes: dict[str, Any]) -> None:
    """Write rows with notes, atomically; equal ones give equal bytes."""
    schema = pyarrow.schema(
        [(column.name, _ARROW_TYPES[_type_of(column.type)]) for column in fields(SurveyedClip)],
        metadata={_NOTES: json.dumps(notes, sort_keys=True)},
    )
    buffer = io.BytesIO()
    table = pyarrow.Table.from_pylist([asdict(clip) for clip in clips], schema=schema)
    pyarrow.parquet.write_table(table, buffer, compression="zstd")
    storage.write_bytes(path, buffer.getvalue())


def _type_of(annotation: object) -> type:
    return next(kind for kind in _ARROW_TYPES if annotation in (kind, kind.__name__))


def read_clips(path: str) -> tuple[list[SurveyedClip], dict[str, Any]]:
    """Read rows and notes.

    Raises:
        DataError: missing, no Parquet, or of another format.
    """
    try:
        data = storage.read_bytes(path)
        # In this thread alone, for the reason that `manifest.read_index` has.
        table = pyarrow.parquet.ParquetFile(io.BytesIO(data), pre_buffer=False).read(use_threads=False)
        notes = json.loads((table.schema.metadata or {})[_NOTES])
        return [SurveyedClip(**values) for values in table.to_pylist()], notes
    except FileNotFoundError as error:
        raise DataError(f"{path}: is missing; run jobs.precompute_latents again, which writes it anew.") from error
    except (pyarrow.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: is no survey or clip list of this version ({type(error).__name__}: {error}); "
            "remove it and run jobs.precompute_latents again."
        ) from error


def read_many(paths: Sequence[str]) -> Iterator[tuple[list[SurveyedClip], dict[str, Any]]]:
    """Read files in order, some at once: an object store lets each wait as long as any."""
    with ThreadPoolExecutor(_READS_AT_ONCE, thread_name_prefix="clips") as pool:
        for start in range(0, len(paths), _READS_AT_ONCE):
            yield from pool.map(read_clips, paths[start : start + _READS_AT_ONCE])


def digest_kept(clips: Sequence[SurveyedClip]) -> str:
    """Digest of what a list has encoded: equal where pass 2 gives the same records; reasons of dropped ones aside."""
    kept = [(clip.key, clip.clip_key, clip.first_frame, clip.num_frames) for clip in clips if not clip.reason]
    return hashlib.blake2b(json.dumps(kept).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class WantedClip:
    """A clip to encode of a raw record.

    Args:
        key: of the record that it becomes.
        span: first frame and number of frames, in source frames; None is all of it.
        scores: what the survey measured; None where there was none.
    """

    key: str
    span: tuple[int, int] | None
    scores: dict[str, float] | None


class ClipList:
    """Which clips of each raw record of one shard are encoded.

    Args:
        clips: rows of the list; None where there is none, and each raw clip is encoded as it stands.
        errors: raw clips that could not be surveyed, by key; they are counted with the list.
    """

    def __init__(self, clips: Sequence[SurveyedClip] | None, errors: dict[str, str]) -> None:
        self._is_for_all = clips is None
        self._wanted: dict[str, list[WantedClip]] = {key: [] for key in errors}
        for clip in clips or ():
            wanted = self._wanted.setdefault(clip.key, [])
            if not clip.reason:
                wanted.append(WantedClip(clip.clip_key, (clip.first_frame, clip.num_frames), clip.scores()))

    @classmethod
    def of(cls, cache: str, task: str, digest: str) -> "ClipList":
        """Read the list of a shard.

        Args:
            cache: folder of the cache.
            task: name of the shard.
            digest: of what is to be encoded; empty: there is no list.

        Raises:
            DataError: it is missing, or another one than the driver made.
        """
        if not digest:
            return cls(None, {})
        path = list_path(cache, task)
        clips, notes = read_clips(path)
        if notes["digest"] != digest:
            raise DataError(f"{path}: was changed while this job ran (by another one?); run the same command again.")
        return cls(clips, notes["errors"])

    def wanted(self, key: str) -> list[WantedClip]:
        """Clips to encode of a raw record, in order; none where all were dropped, which the list has counted.

        Raises:
            KeyError: the survey never saw it.
        """
        return [WantedClip(key, None, None)] if self._is_for_all else self._wanted[key]
