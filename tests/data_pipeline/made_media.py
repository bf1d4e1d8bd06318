"""Small odd videos, made with PyAV in some milliseconds each, and the ways to harm them."""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.stream import Disposition

from m4v_dist.frozen.video_file import Frames
from tests.data_pipeline.made_cache import moving_blocks

QUIET = {"libx265": {"x265-params": "log-level=none"}}


@dataclass(frozen=True)
class Made:
    """How a video is written; see `make_video`."""

    container: str
    codec: str
    pixels: str = "yuv420p"
    options: tuple[tuple[str, str], ...] = ()


def pictures(num_frames: int = 20, height_px: int = 96, width_px: int = 128, seed: int = 1) -> Frames:
    """Frames in which every one differs from its neighbours."""
    frames = moving_blocks(seed, num_frames, height_px, width_px)
    # a bar that counts: a frame that is lost or doubled shows
    for number, frame in enumerate(frames):
        column = number * 5 % (width_px - 16)
        frame[: height_px // 3, column : column + 16] = (230, 40, 40)
    return frames


def smooth_pictures(num_frames: int, height_px: int = 96, width_px: int = 128) -> Frames:
    """Waves of colour without an edge, to a scaler as good as natural; each frame differs by 20 of 255 and more."""
    rows, columns = np.mgrid[:height_px, :width_px]
    phase = 0.35 * np.arange(num_frames)[:, None, None]
    waves = [
        np.sin(columns / 17 + rows / 23 + phase),
        np.sin(rows / 13 - 1.7 * phase) + 0 * columns,
        np.cos(columns / 29 - rows / 19 + phase),
    ]  # fmt: skip
    frames: Frames = (127.5 + 90 * np.stack(waves, -1)).astype(np.uint8)
    return frames


def make_video(
    made: Made,
    frames: Frames,
    *,
    rate: Fraction | int = 24,
    stamps: Sequence[int] | None = None,
    rotation: float | None = None,
    aspect: Fraction | None = None,
) -> bytes:
    """Write frames as a video.

    Args:
        made: container, codec and pixel format, by FFmpeg's names.
        frames: t h w c, uint8.
        rate: frames per second.
        stamps: presentation times, in units of 1 / rate; None: 0, 1, 2, ...
        rotation: degrees of the display matrix.
        aspect: a pixel's width over its height.
    """
    file = io.BytesIO()
    with _usual_priority(), av.open(file, "w", format=made.container) as container:
        stream = _add(container, made, frames, rate)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for packet in _packets(stream, frames, stamps):
            container.mux(packet)
    return file.getvalue()


@contextmanager
def _usual_priority() -> Iterator[None]:
    """Undo what SVT-AV1 does to a process of root's: real time before all others, children that it starts later too."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def make_streams(made: Made, videos: Sequence[Frames]) -> bytes:
    """Several video streams in one file."""
    file = io.BytesIO()
    with av.open(file, "w", format=made.container) as container:
        streams = [_add(container, made, frames, 24) for frames in videos]
        for stream, frames in zip(streams, videos, strict=True):
            for packet in _packets(stream, frames, None):
                container.mux(packet)
    return file.getvalue()


def make_size_change(made: Made, first: Frames, then: Frames) -> bytes:
    """One stream whose frames change their size; the packets of a second encoder follow those of the first."""
    second = io.BytesIO()
    with av.open(second, "w", format=made.container) as container:
        stream = _add(container, made, then, 24)
        for packet in _packets(stream, then, range(len(first), len(first) + len(then))):
            container.mux(packet)
    file = io.BytesIO()
    with av.open(file, "w", format=made.container) as container, av.open(io.BytesIO(second.getvalue())) as source:
        stream = _add(container, made, first, 24)
        for packet in _packets(stream, first, None):
            container.mux(packet)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    return file.getvalue()


def make_cover_art(made: Made, frames: Frames, cover: Frames) -> bytes:
    """A video with a larger picture attached, as shops and phones add them."""
    file = io.BytesIO()
    with av.open(file, "w", format=made.container) as container:
        stream = _add(container, made, frames, 24)
        picture = _add(container, Made("", "mjpeg", "yuvj420p"), cover, 24)
        picture.disposition = Disposition.attached_pic
        for packet in [*_packets(stream, frames, None), *_packets(picture, cover[:1], None)]:
            container.mux(packet)
    return file.getvalue()


def make_audio(seconds: float = 1.0) -> bytes:
    """An MP4 that holds sound alone."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=16000)
        for start in range(0, int(seconds * 16000), 1024):
            wave = np.sin(np.arange(start, start + 1024) / 20).astype(np.float32)[None]
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()


def cut_by_edit_list(data: bytes, num_off: int) -> bytes:
    """An MP4 without B-frames whose edit list starts `num_off` frames late, as a cut by stream copy leaves it."""
    at = data.index(b"elst") + 4
    # version and flags, count, then duration and start of the first entry
    start = int.from_bytes(data[at + 12 : at + 16], "big", signed=True)
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        step = int(1 / stream.time_base / stream.average_rate)
    changed = (start + num_off * step).to_bytes(4, "big")
    return data[: at + 12] + changed + data[at + 16 :]


def flip_bits(data: bytes, num: int, seed: int = 0) -> bytes:
    """The file with bits turned over in its middle."""
    draw = np.random.default_rng(seed)
    harmed = bytearray(data)
    for place in draw.integers(len(data) // 3, 2 * len(data) // 3, num):
        harmed[place] ^= 1 << int(draw.integers(8))
    return bytes(harmed)


def _add(container: Any, made: Made, frames: Frames, rate: Fraction | int) -> Any:
    options = {**QUIET.get(made.codec, {}), "threads": "1", **dict(made.options)}
    stream = container.add_stream(made.codec, rate=rate, options=options)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = made.pixels
    stream.codec_context.time_base = 1 / Fraction(rate)
    return stream


def _packets(stream: Any, frames: Frames, stamps: Sequence[int] | None) -> list[Any]:
    packets = []
    for number, picture in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts = number if stamps is None else stamps[number]
        frame.time_base = stream.codec_context.time_base
        packets += stream.encode(frame)
    return [*packets, *stream.encode()]
