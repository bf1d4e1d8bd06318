"""What a video file in memory says of itself, through PyAV: which stream, of which size, when each frame is shown.

`probe_video` reads headers and packets and decodes one frame. Sizes are of upright frames in square pixels.
The largest video stream by area is taken; attached pictures are none. `video_stream.py` decodes. No torch is imported.

Legend: `h` `w` pixels, `c` colours.
"""

import io
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from m4v_dist.frozen.container_checks import require_whole
from m4v_dist.frozen.parameter_sets import is_plain_stream
from m4v_dist.frozen.video_file import Frames, MediaError

_MAX_FPS = 1000.0
_WITHOUT_TIMES = frozenset({"avi"})
"""Containers that store frames in the order of decoding, and no times: FFmpeg's are guesses."""
_NUM_HELD = 20
"""Frames that a decoder may hold: 16 that later ones refer to, and a few on the way out."""
_STORED_PIXEL_BYTES = 6
"""At most: 16 bits in three planes."""
_WITH_UNITS = frozenset({"h264", "hevc"})
"""Codecs whose key frames are looked at before anybody starts there; the other decoders tell."""
_SEEKABLE = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})
_ONE = 1 << 16
"""1 in the fixed point numbers of a display matrix."""


@dataclass(frozen=True)
class Turn:
    """How a stored picture becomes upright: first transposed, then mirrored."""

    is_transposed: bool = False
    is_mirrored_left_right: bool = False
    is_mirrored_up_down: bool = False

    @property
    def is_mirror_image(self) -> bool:
        """Whether it is no rotation."""
        return (self.is_transposed + self.is_mirrored_left_right + self.is_mirrored_up_down) % 2 == 1

    def of_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the upright picture of a stored size, and the other way round."""
        return (size[1], size[0]) if self.is_transposed else size

    def of_picture(self, picture: Frames) -> Frames:
        """The upright picture h w c."""
        upright = picture.swapaxes(0, 1) if self.is_transposed else picture
        rows = slice(None, None, -1 if self.is_mirrored_up_down else 1)
        columns = slice(None, None, -1 if self.is_mirrored_left_right else 1)
        return np.ascontiguousarray(upright[rows, columns])


@dataclass(frozen=True)
class VideoFacts:
    """What a file says of its largest video stream.

    Args:
        container: FFmpeg's names of the format, joined by commas: "mov,mp4,m4a,3gp,3g2,mj2".
        codec: FFmpeg's name of the codec: "h264".
        stream: index of the stream in the file.
        size: (height, width) as shown: upright, in square pixels.
        coded_size: (height, width) as stored.
        turn: from stored to upright.
        stamps: when each frame is shown, in units of `time_base`, ascending; empty where the file has no times, and its
            frames are taken to follow at `fps`.
        time_base: seconds.
        num_frames: packets to be shown.
        fps: the container's rate, where all frames lie at it; else the mean rate.
        is_constant_rate: whether all frames lie at `fps`, to half a frame.
        num_frames_in_header: 0 where the container names none.
        num_outside_edit: packets that are decoded but not shown, because an edit list cuts them off.
        num_leading: packets that follow a key frame and are shown before it (an open group of pictures): whoever seeks
            to that key frame lacks what they refer to.
        keys: numbers of the key frames at which decoding may start; empty where that was not seen to be right.
        num_video_streams: in the file, attached pictures too.
        is_plain: whether it is known that sizes cannot change and key frames are such; see `parameter_sets.py`.
    """

    container: str
    codec: str
    stream: int
    size: tuple[int, int]
    coded_size: tuple[int, int]
    turn: Turn
    stamps: tuple[int, ...]
    time_base: Fraction
    num_frames: int
    fps: float
    is_constant_rate: bool
    num_frames_in_header: int
    num_outside_edit: int
    num_leading: int
    keys: tuple[int, ...]
    num_video_streams: int
    is_plain: bool

    def times_s(self) -> np.ndarray:
        """When each frame is shown, from the first one's 0; float64."""
        if self.is_constant_rate:
            return np.arange(self.num_frames) / self.fps
        return _seconds(self.stamps, self.time_base)


def stored_bytes(size: tuple[int, int]) -> int:
    """Most memory that a decoder may take for frames stored at (height, width)."""
    return _NUM_HELD * size[0] * size[1] * _STORED_PIXEL_BYTES


def probe_video(data: bytes, max_bytes: int | None = None) -> VideoFacts:
    """Read a file's headers, packets and first frame.

    Args:
        data: the file.
        max_bytes: most that a decoder may take for its own frames; None: no limit.

    Raises:
        MediaError: no video that can be decoded, one that is too large, or a file that is cut; the message names what
            is wrong.
    """
    require_whole(data)
    with opened(data) as (container, errors):
        streams = _video_streams(container)
        stream = max(streams, key=lambda one: one.codec_context.width * one.codec_context.height)
        announced = (stream.codec_context.height, stream.codec_context.width)
        if max_bytes is not None and stored_bytes(announced) > max_bytes:
            raise MediaError(
                f"frames of {announced[0]} x {announced[1]} may take {stored_bytes(announced) / 2**30:.2f} GiB in a "
                f"decoder, more than {max_bytes / 2**30:g} GiB"
            )
        set_up(stream)
        packets, first = _read_packets(container, stream)
        errors.require_none(stream)
        shown = [packet for packet in packets if not packet.is_discard]
        if first is None:
            raise MediaError(f"none of {len(packets)} packets gives a frame")
        _require_whole(stream.frames, packets)
        turn = turn_of(first)
        coded_size = (first.height, first.width)
        ratio = _width_of_pixel(stream.sample_aspect_ratio)
        stamps = tuple(sorted(packet.pts for packet in shown if packet.pts is not None))
        if len(stamps) < len(shown) or container.format.name in _WITHOUT_TIMES:
            stamps = ()
        if any(earlier == later for earlier, later in zip(stamps, stamps[1:], strict=False)):
            raise MediaError("two frames are to be shown at one time; the timestamps are damaged")
        fps, is_constant = _rate(stamps, stream)
        codec, header = stream.codec_context.codec.canonical_name, bytes(stream.codec_context.extradata or b"")
        is_plain = is_plain_stream(codec, header, _with_key_marks(container.format.name, stream, packets))
        return VideoFacts(
            container=container.format.name,
            codec=codec,
            stream=stream.index,
            size=turn.of_size((coded_size[0], max(1, round(coded_size[1] * ratio)))),
            coded_size=coded_size,
            turn=turn,
            stamps=stamps,
            time_base=Fraction(stream.time_base),
            num_frames=len(shown),
            fps=fps,
            is_constant_rate=is_constant,
            num_frames_in_header=stream.frames,
            num_outside_edit=len(packets) - len(shown),
            num_leading=_num_leading(packets),
            keys=_keys(container.format.name, packets, stamps) if is_plain or codec not in _WITH_UNITS else (),
            num_video_streams=len(container.streams.video),
            is_plain=is_plain,
        )


def set_up(stream: Any) -> None:
    """One thread, and checksums compared where a stream holds them."""
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"err_detect": "crccheck"}


class Errors:
    """What FFmpeg logs as an error while a file is open: often all that tells of damage."""

    def __init__(self, lines: list[tuple[int, str, str]]) -> None:
        self._lines = lines

    def require_none(self, stream: Any) -> None:
        """Check that container and video decoder had none; those of audio are not ours.

        Raises:
            MediaError: they had.
        """
        codec = stream.codec_context.codec
        ours = {stream.container.format.name, codec.name, codec.canonical_name}
        for _, name, text in self._lines:
            if name in ours:
                raise MediaError(f"the data are damaged: {name.split(',')[0]}: {text.strip()}")


@contextmanager
def opened(data: bytes) -> Iterator[tuple[Any, Errors]]:
    """The container of a file in memory, and the errors that are logged; it can open no other file.

    Raises:
        MediaError: inside and at the start, for what FFmpeg cannot read.
    """
    import av

    av.logging.set_level(av.logging.ERROR)
    # else a repeated line is told when the next file is open
    av.logging.set_skip_repeated(False)
    try:
        # playlists would name files of this machine, or of others
        options = {"protocol_whitelist": "none"}
        with av.logging.Capture() as lines, av.open(io.BytesIO(data), options=options) as container:
            yield container, Errors(lines)
    except av.FFmpegError as error:
        log: Any = error.log
        detail = f" ({log[2].strip()})" if log else ""
        raise MediaError(f"{error.strerror}{detail}") from error


def _video_streams(container: Any) -> list[Any]:
    """Those that are videos.

    Raises:
        MediaError: there is none, and what there is instead.
    """
    from av.stream import Disposition

    streams = [stream for stream in container.streams.video if Disposition.attached_pic not in stream.disposition]
    if streams:
        return streams
    kinds = sorted({"picture" if stream.type == "video" else stream.type for stream in container.streams})
    raise MediaError(f"holds no video stream{', only ' + ' and '.join(kinds) if kinds else ''}")


def _read_packets(container: Any, stream: Any) -> tuple[list[Any], Any]:
    """All packets of a stream, and its first frame, None where there is none."""
    packets, first = [], None
    for packet in container.demux(stream):
        if packet.size:
            packets.append(packet)
        if first is None:
            first = next(iter(packet.decode()), None)
    return packets, first


def _require_whole(num_in_header: int, packets: Sequence[Any]) -> None:
    """Hold the packets to the header.

    Raises:
        MediaError: some are missing, or damaged already.
    """
    if num_in_header and len(packets) < num_in_header:
        raise MediaError(
            f"the header says {num_in_header} frames, the file holds {len(packets)}; it is cut or its index is damaged"
        )
    for number, packet in enumerate(packets):
        if packet.is_corrupt:
            raise MediaError(f"packet {number} of {len(packets)} is cut or damaged")


def _num_leading(packets: Sequence[Any]) -> int:
    """How many packets, in the order of decoding, are shown before the key frame that they follow."""
    key, found = None, 0
    for packet in packets:
        if packet.is_keyframe:
            key = packet.pts
        elif key is not None and packet.pts is not None and packet.pts < key:
            found += 1
    return found


def _with_key_marks(container: str, stream: Any, packets: Sequence[Any]) -> Iterator[tuple[bytes, bool]]:
    """Packets' bytes, and whether mark or index calls them key frames: FFmpeg mends the mark, and older ones do not."""
    marked = {entry.timestamp for entry in stream.index_entries if entry.is_keyframe}
    for packet in packets:
        stamp = packet.pts if container.startswith("matroska") else packet.dts
        yield bytes(packet), packet.is_keyframe or stamp in marked


def _keys(container: str, packets: Sequence[Any], stamps: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of the key frames where a decoder can start, in a container with an index and closed groups."""
    if container not in _SEEKABLE or _num_leading(packets) or any(packet.is_discard for packet in packets):
        return ()
    numbers = {stamp: number for number, stamp in enumerate(stamps)}
    return tuple(sorted(numbers[packet.pts] for packet in packets if packet.is_keyframe and packet.pts in numbers))


def _width_of_pixel(ratio: Fraction | None) -> Fraction:
    """A pixel's width over its height; 1 where the file says nothing, or nonsense."""
    return ratio if ratio and ratio > 0 else Fraction(1)


def _rate(stamps: Sequence[int], stream: Any) -> tuple[float, bool]:
    """Frames per second, and whether they are evenly spaced.

    Raises:
        MediaError: no rate above 0 and up to `_MAX_FPS`.
    """
    stated = float(stream.average_rate or stream.guessed_rate or 0)
    times = _seconds(stamps, Fraction(stream.time_base))
    is_constant = 0 < stated <= _MAX_FPS
    if is_constant and len(times):
        is_constant = bool(np.abs(times - np.arange(len(times)) / stated).max() * stated < 0.5)
    fps = stated if is_constant or len(times) < 2 else float((len(times) - 1) / times[-1])
    if not 0 < fps <= _MAX_FPS:
        raise MediaError(f"{len(times)} frames at {fps:g} frames per second")
    return fps, is_constant


def _seconds(stamps: Sequence[int], time_base: Fraction) -> np.ndarray:
    ticks = np.asarray(stamps, dtype=np.int64)
    return (ticks - ticks[:1]) * float(time_base)


def turn_of(frame: Any) -> Turn:
    """What the display matrix of a frame says.

    Raises:
        MediaError: an angle that is no quarter turn.
    """
    from av.sidedata.sidedata import Type

    found = frame.side_data.get(Type.DISPLAYMATRIX)
    if found is None:
        return Turn()
    right, down_of_right, _, right_of_down, down, *_ = struct.unpack("=9i", bytes(found))
    entries = (right, down_of_right, right_of_down, down)
    is_transposed = right == down == 0 != down_of_right
    if not is_transposed and (down_of_right, right_of_down) != (0, 0):
        raise MediaError(f"is turned by the matrix {[round(entry / _ONE, 3) for entry in entries]}, no quarter turn")
    if is_transposed:
        return Turn(True, right_of_down < 0, down_of_right < 0)
    return Turn(False, right < 0, down < 0)
