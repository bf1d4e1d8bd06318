"""Video files in memory, asked for their facts and read once from front to back, every frame verified; through PyAV.

`probe_video` reads a file's packets and decodes nothing (about 2 ms for a short clip): what stream, of which size, and
when each frame is to be shown. `stream_frames` decodes in one pass and holds what comes to that. Frames are upright
and in square pixels. The largest video stream by area is taken; attached pictures are none. No torch is imported.

Legend: `h` `w` pixels, `c` red, green, blue.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from m4v_dist.frozen.video_file import Frames, MediaError

MAX_FPS = 1000.0


@dataclass(frozen=True)
class VideoFacts:
    """What a file says of its largest video stream, before anything is decoded.

    Args:
        container: FFmpeg's names of the format, joined by commas: "mov,mp4,m4a,3gp,3g2,mj2".
        codec: FFmpeg's name of the codec: "h264".
        stream: which stream of the file.
        size: (height, width) as shown: upright, in square pixels.
        coded_size: (height, width) as stored.
        num_quarter_turns: how often the stored picture is turned counter-clockwise to stand upright, 0 to 3.
        times_s: when each frame is shown, ascending, from the first frame's 0.
        fps: mean rate of `times_s`, as the container says it where there is one frame.
        num_frames_in_header: 0 where the container names none.
        num_outside_edit: packets that are decoded but not shown, because an edit list cuts them off.
        has_timestamps: False for raw streams, whose `times_s` follow from the rate.
    """

    container: str
    codec: str
    stream: int
    size: tuple[int, int]
    coded_size: tuple[int, int]
    num_quarter_turns: int
    times_s: tuple[float, ...]
    fps: float
    num_frames_in_header: int
    num_outside_edit: int
    has_timestamps: bool


def probe_video(data: bytes) -> VideoFacts:
    """Read a file's headers and packets.

    Raises:
        MediaError: no video that could be decoded; the message names what is missing.
    """
    with _opened(data) as container:
        stream = _largest_stream(container)
        packets = [packet for packet in container.demux(stream) if packet.size]
        shown = [packet for packet in packets if not packet.is_discard]
        if not shown:
            raise MediaError("holds no frame")
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        pts = [packet.pts for packet in shown if packet.pts is not None]
        has_timestamps = len(pts) == len(shown)
        if has_timestamps:
            times = [float(stamp * stream.time_base) for stamp in sorted(pts)]
            times_s = tuple(time - times[0] for time in times)
        else:
            times_s = tuple(number / fps for number in range(len(shown))) if fps else ()
        if len(times_s) > 1 and times_s[-1] > 0:
            fps = (len(times_s) - 1) / times_s[-1]
        if not 0 < fps < MAX_FPS:
            raise MediaError(f"{len(shown)} frames at {fps:g} frames per second")
        height, width = stream.codec_context.height, stream.codec_context.width
        turns = 0
        return VideoFacts(
            container=container.format.name,
            codec=stream.codec_context.codec.canonical_name,
            stream=stream.index,
            size=(width, height) if turns % 2 else (height, width),
            coded_size=(height, width),
            num_quarter_turns=turns,
            times_s=times_s,
            fps=fps,
            num_frames_in_header=stream.frames,
            num_outside_edit=len(packets) - len(shown),
            has_timestamps=has_timestamps,
        )


def stream_frames(
    data: bytes, facts: VideoFacts, size: tuple[int, int] | None = None
) -> Iterator[tuple[float, Frames]]:
    """Decode a file once, front to back, in the order of presentation; one frame is held at a time.

    Args:
        data: the file.
        facts: what `probe_video` said of it.
        size: (height, width) that frames are scaled to inside the decoder (bicubic); None is `facts.size`.

    Yields:
        seconds from the first frame, and the picture h w c, uint8.

    Raises:
        MediaError: while iterating: damaged data, or other frames than the packets announced.
    """
    height, width = size or facts.size
    if facts.num_quarter_turns % 2:
        height, width = width, height
    number = -1
    with _opened(data) as container:
        stream = container.streams[facts.stream]
        stream.codec_context.thread_count = 1
        from av.video.reformatter import Interpolation

        for number, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise MediaError(f"frame {number} is damaged")
            if number >= len(facts.times_s):
                break
            picture = frame.to_ndarray(
                format="rgb24", width=width, height=height, interpolation=Interpolation.BICUBIC, threads=1
            )
            yield facts.times_s[number], np.rot90(picture, k=facts.num_quarter_turns)
    if number + 1 != len(facts.times_s):
        raise MediaError(f"{len(facts.times_s)} packets gave {number + 1} frames or more")


@contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    import av

    try:
        with av.open(io.BytesIO(data)) as container:
            yield container
    except (av.FFmpegError, OSError) as error:
        raise MediaError(str(error)) from error


def _largest_stream(container: Any) -> Any:
    """The video stream of the largest area, the first of equals.

    Raises:
        MediaError: there is none.
    """
    from av.stream import Disposition

    streams = [stream for stream in container.streams.video if Disposition.attached_pic not in stream.disposition]
    if not streams:
        raise MediaError("holds no video stream")
    return max(streams, key=lambda stream: stream.codec_context.width * stream.codec_context.height)
