"""Media bytes to frames of a bucket: what is asked of which decoder, in this process (`decoder_pool.py`: in others).

It imports no torch, because decoder child processes should start fast.

Rules: frames from the start at the asked rate by their real times, cut to 8k+1; upright, in square pixels, resized
inside the decoder so that they cover the bucket of the nearest aspect ratio, then cropped at the centre. Slower clips
keep their rate.

Every video is probed first (`m4v_dist/frozen/video_facts.py`), and whoever decodes is held to that. "auto" takes
decord for what it is trusted with, and PyAV, which reads front to back and checks each frame, for the rest and wherever
decord fails, counts or times frames otherwise, or prints an error. Pictures and GIF go to Pillow.

Legend: `t` frames, `h` `w` pixels, `c` colours.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_pipeline.decode_decord import decord_frames, is_trusted, why_not_decord
from data_pipeline.decode_torchcodec import torchcodec_frames
from m4v_dist.frozen.video_facts import VideoFacts, probe_video, stored_bytes
from m4v_dist.frozen.video_file import (
    Frames,
    MediaError,
    centre_crop,
    cover_size,
    decode_animation,
    decode_image,
    resize_cover,
)
from m4v_dist.frozen.video_stream import check_stream, stream_frames

VIDEO_KINDS = frozenset(
    {"mp4", "m4v", "mov", "webm", "mkv", "avi", "gif", "mpg", "mpeg", "ts", "m2ts", "wmv", "flv", "ogv"}
)
IMAGE_KINDS = frozenset({"jpg", "jpeg", "png", "webp"})
_TEMPORAL_STRIDE = 8
_SOURCE_LINE = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ")
_ADDRESS = re.compile(r" ?@? ?\b0x[0-9a-f]{6,}")
_MAX_REASON_CHARS = 300

Span = tuple[int, int]
"""First frame and number of frames of a piece of a video, in its own frames in the order they are shown."""


@dataclass(frozen=True)
class DecodeRule:
    """How clips are cut: frame rate, length and sizes; and by what.

    Args:
        buckets: allowed (height, width) in pixels.
        num_frames: longest clip, 8k+1.
        fps: highest frame rate.
        decoder: "auto", or the backend that decodes all video: "decord", "pyav", "torchcodec".
        max_bytes: a clip whose decoding would take more memory is an error.
    """

    buckets: tuple[tuple[int, int], ...]
    num_frames: int
    fps: float
    decoder: str = "auto"
    max_bytes: int = 4 << 30


@dataclass(frozen=True)
class DecodedClip:
    """Frames t h w c uint8 of one bucket, with what they came from.

    Args:
        frames: t h w c, uint8, t = 8k+1.
        fps: frames per second of `frames`; 0 for a still.
        bucket: (height, width) in pixels.
        source_size: (height, width) of the file as shown: upright, in square pixels.
        source_num_frames: frames that the file holds, or those of the span.
        source_fps: its mean frame rate; 0 for a still.
        decoder: what decoded it: "decord", "pyav", "torchcodec", or "pillow" for pictures.
    """

    frames: Frames
    fps: float
    bucket: tuple[int, int]
    source_size: tuple[int, int]
    source_num_frames: int
    source_fps: float
    decoder: str


class DecodeError(Exception):
    """One clip cannot be decoded; the message is printable and holds the reason, not the key."""


def choose_bucket(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Bucket whose aspect ratio is nearest (in logarithm), the first of equals; sizes are (height, width)."""
    return min(buckets, key=lambda bucket: abs(math.log(size[0] / size[1]) - math.log(bucket[0] / bucket[1])))


def choose_frames(times_s: np.ndarray, source_fps: float, rule: DecodeRule) -> tuple[np.ndarray, float]:
    """Which frames of a video make the clip: at each tick of its rate the one whose time is nearest, later on a tie.

    Args:
        times_s: when each frame is shown, ascending from 0; at least one.
        source_fps: its mean rate, > 0.
        rule: length and rate.

    Returns:
        ascending indices from 0, int64, their count 8k+1; and the clip's frame rate. Where a video's frames are
        unevenly spaced, one may be taken twice.
    """
    fps = min(source_fps, rule.fps)
    available = int(times_s[-1] * fps + 1e-6) + 1
    count = (min(available, rule.num_frames) - 1) // _TEMPORAL_STRIDE * _TEMPORAL_STRIDE + 1
    borders = (times_s[:-1] + times_s[1:]) / 2
    ticks = np.arange(count) / fps
    return np.searchsorted(borders, ticks + 1e-6 / source_fps, side="right").astype(np.int64), fps


def decode_clip(data: bytes, kind: str, rule: DecodeRule, span: Span | None = None) -> DecodedClip:
    """Decode one file in this process; callers with unknown files go through `DecoderPool`.

    Args:
        data: the whole file.
        kind: its extension in lower case, without the dot.
        rule: frame rate, length, sizes, decoder.
        span: the piece of the video that the clip is cut from; None is all of it.

    Raises:
        DecodeError: it cannot be decoded, other frames came than were asked for, it is too large, or the span does not
            lie in it.
        ConfigError: a decoder is missing or broken.
    """
    if kind not in VIDEO_KINDS | IMAGE_KINDS:
        raise DecodeError(f"kind {kind!r} is not among {sorted(VIDEO_KINDS | IMAGE_KINDS)}")
    try:
        if kind in IMAGE_KINDS:
            return _decode_still(data, kind, rule, span)
        if kind == "gif":
            return _decode_pictures(*decode_animation(data, max_bytes=rule.max_bytes), rule, span)
        return _decode_video(data, rule, span)
    except MediaError as error:
        raise DecodeError(printable(str(error))[:_MAX_REASON_CHARS]) from error


def _decode_still(data: bytes, kind: str, rule: DecodeRule, span: Span | None) -> DecodedClip:
    if kind == "webp":
        frames, fps = decode_animation(data, max_bytes=rule.max_bytes)
        if len(frames) > 1:
            return _decode_pictures(frames, fps, rule, span)
    else:
        frames = decode_image(data)
    return _decode_pictures(frames, 0.0, rule, span)


def _decode_pictures(frames: Frames, source_fps: float, rule: DecodeRule, span: Span | None) -> DecodedClip:
    """Cut whole decoded pictures to the rule."""
    first, num_frames = checked_span(span, len(frames))
    frames = frames[first : first + num_frames]
    indices, fps = np.zeros(1, np.int64), 0.0
    if source_fps:
        indices, fps = choose_frames(np.arange(num_frames) / source_fps, source_fps, rule)
    size = (frames.shape[1], frames.shape[2])
    bucket = choose_bucket(size, rule.buckets)
    _require_room(len(indices), cover_size(size, bucket), size, rule)
    clip = centre_crop(resize_cover(frames[indices], *bucket), *bucket)
    return DecodedClip(clip, fps, bucket, size, num_frames, source_fps, "pillow")


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
    facts = probe_video(data, rule.max_bytes)
    first, num_frames = checked_span(span, facts.num_frames)
    times_s = facts.times_s()[first : first + num_frames]
    indices, fps = choose_frames(times_s - times_s[0], facts.fps, rule)
    bucket = choose_bucket(facts.size, rule.buckets)
    cover = cover_size(facts.size, bucket)
    _require_room(len(indices), cover, facts.coded_size, rule)
    frames, decoder = decode_frames(data, facts, cover, indices + first, rule.decoder)
    return DecodedClip(centre_crop(frames, *bucket), fps, bucket, facts.size, num_frames, facts.fps, decoder)


def decode_frames(
    data: bytes, facts: VideoFacts, size: tuple[int, int], indices: np.ndarray, decoder: str
) -> tuple[Frames, str]:
    """Frames of a probed video by the decoder that is asked for; for "auto", by the one that suits.

    Args:
        data: the file.
        facts: what `probe_video` said of it.
        size: (height, width) that upright frames are scaled to.
        indices: of frames in the order they are shown; int64, ascending, perhaps with repeats.
        decoder: "auto", "decord", "pyav" or "torchcodec".

    Returns:
        t h w c uint8; and the decoder that they came from.

    Raises:
        MediaError: no decoder that may be asked gives them whole.
        ConfigError: a decoder is missing or broken.
    """
    match decoder:
        case "auto":
            frames = _trusted_decord_frames(data, facts, size, indices) if is_trusted(facts) else None
            return (_pyav_frames(data, facts, size, indices), "pyav") if frames is None else (frames, "decord")
        case "decord":
            reason = why_not_decord(facts)
            if reason:
                raise MediaError(f"decord gives wrong frames for {reason}, or none; set precompute.decoder='auto'")
            frames, printed = decord_frames(data, facts, size, indices)
            if printed or not is_trusted(facts):
                check_stream(data, facts)
            return frames, "decord"
        case "pyav":
            return _pyav_frames(data, facts, size, indices), "pyav"
        case "torchcodec":
            frames = torchcodec_frames(data, facts, size, indices)
            # it tells nobody of damaged data
            check_stream(data, facts)
            return frames, "torchcodec"
    raise AssertionError(decoder)


def _trusted_decord_frames(data: bytes, facts: VideoFacts, size: tuple[int, int], indices: np.ndarray) -> Frames | None:
    """decord's frames; None where it fails or has something to say: then PyAV decides."""
    try:
        frames, printed = decord_frames(data, facts, size, indices)
    except MediaError:
        return None
    return None if printed else frames


def _pyav_frames(data: bytes, facts: VideoFacts, size: tuple[int, int], indices: np.ndarray) -> Frames:
    frames: Frames = np.empty((len(indices), *size, 3), np.uint8)
    wanted, places = np.unique(indices, return_inverse=True)
    try:
        for place, picture in enumerate(stream_frames(data, facts, size, wanted.tolist())):
            frames[places == place] = picture
    except MediaError:
        if not facts.keys:
            raise
        # some key frames are none to a decoder that starts there: only a pass from the beginning tells of damage
        return _pyav_frames(data, replace(facts, keys=()), size, indices)
    return frames


def _require_room(num_frames: int, size: tuple[int, int], stored: tuple[int, int], rule: DecodeRule) -> None:
    """Stop before memory is gone.

    Raises:
        DecodeError: the frames of a clip, and those that a decoder holds, would take more than `rule.max_bytes`.
    """
    # the frames, and their bytes on the way to who asked
    needed = 2 * num_frames * size[0] * size[1] * 3 + stored_bytes(stored)
    if needed > rule.max_bytes:
        raise DecodeError(
            f"{num_frames} frames of {size[0]} x {size[1]}, resized from {stored[0]} x {stored[1]}, may take "
            f"{needed / 2**30:.2f} GiB, more than precompute.max_decode_gib={rule.max_bytes / 2**30:g}"
        )


def printable(text: str) -> str:
    """One line of printable characters, without what differs from run to run.

    decord's messages carry the time of day and its build's source path, and end in raw bytes of the file; FFmpeg's
    carry addresses.
    """
    line = _ADDRESS.sub("", _SOURCE_LINE.sub("", " ".join(text.split())))
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in line)
