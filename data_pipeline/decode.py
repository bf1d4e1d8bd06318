"""Media bytes to frames: decord, or Pillow for stills and GIF, in this process (`decoder_pool.py`: in others).

The only file that imports decord. It imports no torch, because decoder child processes should start fast.

Rules: frames from the start at the asked rate, cut to 8k+1; resized inside the decoder so that they cover the bucket of
the nearest aspect ratio, then cropped at the centre. Slower clips keep their rate.

Legend: `t` frames, `h` `w` pixels, `c` colours.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from m4v_dist.errors import ConfigError
from m4v_dist.frozen.video_file import (
    Frames,
    MediaError,
    centre_crop,
    cover_size,
    decode_animation,
    decode_image,
    resize_cover,
)

VIDEO_KINDS = frozenset({"mp4", "webm", "mkv", "mov", "avi", "gif"})
IMAGE_KINDS = frozenset({"jpg", "jpeg", "png", "webp"})
_TEMPORAL_STRIDE = 8
_WRONG_FRAME_MAGIC = {b"\x00\x00\x01\xba": "MPEG program stream", b"\x30\x26\xb2\x75": "ASF (WMV)"}
_SOURCE_LINE = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ")
_ADDRESS = re.compile(r" ?@? ?\b0x[0-9a-f]{6,}")
_MAX_REASON_CHARS = 300


Span = tuple[int, int]
"""First frame and number of frames of a piece of a video, in its own frames in the order they are shown."""


@dataclass(frozen=True)
class DecodeRule:
    """How clips are cut: frame rate, length and sizes.

    Args:
        buckets: allowed (height, width) in pixels.
        num_frames: longest clip, 8k+1.
        fps: highest frame rate.
        decoder: "auto", or the backend that decodes all video: "decord", "pyav", "torchcodec".
    """

    buckets: tuple[tuple[int, int], ...]
    num_frames: int
    fps: float
    decoder: str = "auto"


@dataclass(frozen=True)
class DecodedClip:
    """Frames t h w c uint8 of one bucket, with what they came from.

    Args:
        frames: t h w c, uint8, t = 8k+1.
        fps: frames per second of `frames`; 0 for a still.
        bucket: (height, width) in pixels.
        source_size: (height, width) of the file, in pixels.
        source_num_frames: frames that the file holds, or those of the span.
        source_fps: its frame rate; 0 for a still.
        decoder: what decoded it: "decord", "pyav", "torchcodec", or "pillow" for pictures.
    """

    frames: Frames
    fps: float
    bucket: tuple[int, int]
    source_size: tuple[int, int]
    source_num_frames: int
    source_fps: float
    decoder: str = "decord"


class DecodeError(Exception):
    """One clip cannot be decoded; the message is printable and holds the reason, not the key."""


def choose_bucket(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Bucket whose aspect ratio is nearest (in logarithm), the first of equals; sizes are (height, width)."""
    return min(buckets, key=lambda bucket: abs(math.log(size[0] / size[1]) - math.log(bucket[0] / bucket[1])))


def choose_frames(num_frames: int, source_fps: float, rule: DecodeRule) -> tuple[np.ndarray, float]:
    """Which frames of a file make the clip.

    Args:
        num_frames: frames in the file, > 0.
        source_fps: its mean rate, > 0.
        rule: length and rate.

    Returns:
        ascending indices from 0, int64, their count 8k+1; and the clip's frame rate.
    """
    fps = min(source_fps, rule.fps)
    step = source_fps / fps
    available = int((num_frames - 1) / step + 1e-6) + 1
    count = (min(available, rule.num_frames) - 1) // _TEMPORAL_STRIDE * _TEMPORAL_STRIDE + 1
    return np.minimum(np.floor(np.arange(count) * step + 0.5).astype(np.int64), num_frames - 1), fps


def decode_clip(data: bytes, kind: str, rule: DecodeRule, span: Span | None = None) -> DecodedClip:
    """Decode one file in this process; callers with unknown files go through `DecoderPool`.

    Args:
        data: the whole file.
        kind: its extension in lower case, without the dot.
        rule: frame rate, length, sizes.
        span: the piece of the video that the clip is cut from; None is all of it.

    Raises:
        DecodeError: it cannot be decoded, or fewer frames came than were asked for, or the span does not lie in it.
        ConfigError: decord is missing or broken.
    """
    try:
        if kind in IMAGE_KINDS:
            return _decode_still(data, kind, rule, span)
        if kind == "gif":
            return _decode_pictures(*decode_animation(data), rule, span)
    except MediaError as error:
        raise DecodeError(str(error)) from error
    if kind not in VIDEO_KINDS:
        raise DecodeError(f"kind {kind!r} is not among {sorted(VIDEO_KINDS | IMAGE_KINDS)}")
    return _decode_video(data, rule, span)


def _decode_still(data: bytes, kind: str, rule: DecodeRule, span: Span | None) -> DecodedClip:
    if kind == "webp":
        frames, fps = decode_animation(data)
        if len(frames) > 1:
            return _decode_pictures(frames, fps, rule, span)
    else:
        frames = decode_image(data)
    return _decode_pictures(frames, 0.0, rule, span)


def _decode_pictures(frames: Frames, source_fps: float, rule: DecodeRule, span: Span | None) -> DecodedClip:
    """Cut whole decoded pictures to the rule."""
    first, num_frames = checked_span(span, len(frames))
    frames = frames[first : first + num_frames]
    indices, fps = choose_frames(len(frames), source_fps, rule) if source_fps else (np.zeros(1, np.int64), 0.0)
    size = (frames.shape[1], frames.shape[2])
    bucket = choose_bucket(size, rule.buckets)
    clip = centre_crop(resize_cover(frames[indices], *bucket), *bucket)
    return DecodedClip(clip, fps, bucket, size, len(frames), source_fps, "pillow")


def checked_span(span: Span | None, num_frames: int) -> Span:
    """The piece that is asked for, or all of a video of `num_frames`.

    Raises:
        DecodeError: it does not lie in the video.
    """
    first, count = (0, num_frames) if span is None else span
    if first < 0 or count < 1 or first + count > num_frames:
        raise DecodeError(f"frames {first} to {first + count - 1} are asked for, of a video of {num_frames} frames")
    return first, count


def _decode_video(data: bytes, rule: DecodeRule, span: Span | None) -> DecodedClip:
    import io

    decord = _import_decord()
    _refuse_wrong_frame_containers(data)
    try:
        probe = decord.VideoReader(io.BytesIO(data), num_threads=1)
        num_frames, source_fps = len(probe), float(probe.get_avg_fps())
        if num_frames == 0 or not 0 < source_fps < 1000:
            raise DecodeError(f"header says {num_frames} frames at {source_fps} frames per second")
        # the first frame, not the header, knows about rotation
        height, width = probe[0].shape[:2]
        del probe
        bucket = choose_bucket((height, width), rule.buckets)
        cover_height, cover_width = cover_size((height, width), bucket)
        first, num_frames = checked_span(span, num_frames)
        indices, fps = choose_frames(num_frames, source_fps, rule)
        reader = decord.VideoReader(io.BytesIO(data), width=cover_width, height=cover_height, num_threads=1)
        frames = reader.get_batch(indices + first).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError, ValueError) as error:
        raise DecodeError(f"decord: {printable(str(error))[:_MAX_REASON_CHARS]}") from error
    if frames.shape != (len(indices), cover_height, cover_width, 3):
        raise DecodeError(
            f"decord gave frames {frames.shape} where {(len(indices), cover_height, cover_width, 3)} were asked for"
        )
    return DecodedClip(centre_crop(frames, *bucket), fps, bucket, (height, width), num_frames, source_fps)


def _import_decord() -> ModuleType:
    """Load decord.

    Raises:
        ConfigError: it is missing, or a library of it is; that is no fault of the clip at hand.
    """
    try:
        import decord
    # ctypes raises OSError, and decord itself RuntimeError, for a library that is not there
    except (ImportError, OSError, RuntimeError) as error:
        raise broken_decord(f"{type(error).__name__}: {error}") from error
    module: ModuleType = decord
    return module


def broken_decord(reason: str) -> ConfigError:
    """The error of a machine that cannot load decord."""
    return ConfigError(
        f"decord cannot be imported ({reason}), and it decodes all video; install it on every node, as pyproject.toml "
        "names it."
    )


def _refuse_wrong_frame_containers(data: bytes) -> None:
    """Stop at containers from which decord 0.6 was seen to return other frames than asked, with no error."""
    name = _WRONG_FRAME_MAGIC.get(data[:4])
    if len(data) > 188 and data[0] == 0x47 and data[188] == 0x47:
        name = "MPEG transport stream"
    if name:
        raise DecodeError(f"container is {name}, from which decord returns wrong frames; remux it to mp4 or mkv")


def printable(text: str) -> str:
    """One line of printable characters, without what differs from run to run.

    decord's messages carry the time of day and its build's source path, and end in raw bytes of the file; FFmpeg's
    carry addresses.
    """
    line = _ADDRESS.sub("", _SOURCE_LINE.sub("", " ".join(text.split())))
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in line)
