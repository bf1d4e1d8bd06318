"""Every frame of a video once, small, in order: what a survey of clips looks at.

The frames are those that `decode.decode_clip` counts: a span found here is cut there.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.decode import VIDEO_KINDS, DecodeError, decode_frames, printable
from m4v_dist.frozen.video_facts import probe_video
from m4v_dist.frozen.video_file import Frames, MediaError, decode_animation, resize_cover
from m4v_dist.frozen.video_stream import stream_frames


@dataclass(frozen=True)
class SourceInfo:
    """What a video is, as it is shown: upright, in square pixels.

    Args:
        height_px: of a frame.
        width_px: of a frame.
        fps: mean rate.
        num_frames_in_header: 0 where the container names none.
        container: FFmpeg's names of the format.
        codec: FFmpeg's name of the codec.
        decoder: what decodes it: "decord", "pyav", "torchcodec" or "pillow".
    """

    height_px: int
    width_px: int
    fps: float
    num_frames_in_header: int
    container: str
    codec: str
    decoder: str


def read_frames(
    data: bytes, kind: str, *, short_side_px: int, decoder: str = "auto"
) -> tuple[SourceInfo, Iterator[tuple[float, Frames]]]:
    """All frames of a video, in the order of presentation, one held at a time.

    Args:
        data: the whole file.
        kind: its extension in lower case, without the dot.
        short_side_px: the shorter side that frames are scaled to; smaller videos keep their size.
        decoder: as `precompute.decoder`; "auto" is PyAV here, which reads front to back anyway. "decord" and
            "torchcodec" hold all frames, small, at once.

    Returns:
        what the video is; and an iterator of (seconds from the first frame, picture h w c uint8).

    Raises:
        DecodeError: it cannot be decoded; also while iterating, where the data are damaged further on.
        ConfigError: while iterating: a decoder that is asked for is missing or broken.
    """
    if kind not in VIDEO_KINDS:
        raise DecodeError(f"kind {kind!r} is not among {sorted(VIDEO_KINDS)}")
    try:
        if kind == "gif":
            return _read_animation(data, short_side_px)
        facts = probe_video(data)
    except MediaError as error:
        raise DecodeError(printable(str(error))) from error
    name = "pyav" if decoder == "auto" else decoder
    info = SourceInfo(*facts.size, facts.fps, facts.num_frames_in_header, facts.container, facts.codec, name)
    small = _small(facts.size, short_side_px)

    def frames() -> Iterator[tuple[float, Frames]]:
        try:
            if name == "pyav":
                pictures: Iterable[Frames] = stream_frames(data, facts, small)
            else:
                pictures = decode_frames(data, facts, small, np.arange(facts.num_frames), name)[0]
            yield from zip(facts.times_s().tolist(), pictures, strict=True)
        except MediaError as error:
            raise DecodeError(printable(str(error))) from error

    return info, frames()


def _read_animation(data: bytes, short_side_px: int) -> tuple[SourceInfo, Iterator[tuple[float, Frames]]]:
    pictures, fps = decode_animation(data)
    size = (pictures.shape[1], pictures.shape[2])
    small = resize_cover(pictures, *_small(size, short_side_px))
    info = SourceInfo(*size, fps, len(pictures), "gif", "gif", "pillow")
    return info, ((number / fps, picture) for number, picture in enumerate(small))


def _small(size: tuple[int, int], short_side_px: int) -> tuple[int, int]:
    """(height, width) of the same shape whose shorter side is as asked, never enlarged."""
    scale = min(1.0, short_side_px / min(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
