"""Videos in memory, decoded in one verified pass through PyAV.

`stream_frames` decodes front to back, or from a true key frame on, and holds each to what `video_facts.py` found.
Not done: deinterlacing, tone mapping of HDR, blending of an alpha channel (its colours are taken as they are).

Legend: `h` `w` pixels, `c` red, green, blue.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

from m4v_dist.frozen.video_facts import VideoFacts, opened, set_up, turn_of
from m4v_dist.frozen.video_file import Frames, MediaError


def check_stream(data: bytes, facts: VideoFacts) -> None:
    """Decode a whole file for its errors alone.

    Raises:
        MediaError: damaged data, or other frames than the packets announced.
    """
    for _ in _decoded(data, facts):
        pass


def stream_frames(
    data: bytes, facts: VideoFacts, size: tuple[int, int], wanted: Sequence[int] | None = None
) -> Iterator[Frames]:
    """Decode a file once, front to back, in the order of presentation; one frame is held at a time.

    Args:
        data: the file.
        facts: what `probe_video` said of it.
        size: (height, width) that upright frames are scaled to inside the decoder (bilinear, as decord does).
        wanted: numbers of the frames to give, ascending, none twice; None is all. Decoding starts at the last key frame
            before the first, where `facts.keys` has one, and nothing behind the last is decoded.

    Yields:
        pictures h w c, uint8.

    Raises:
        MediaError: while iterating: damaged data, or other frames than the packets announced.
    """
    from av.video.reformatter import Interpolation

    last = facts.num_frames - 1 if wanted is None else wanted[-1]
    asked = None if wanted is None else frozenset(wanted)
    height, width = facts.turn.of_size(size)
    for number, frame in _decoded(data, facts, 0 if wanted is None else wanted[0]):
        if asked is None or number in asked:
            if frame.interlaced_frame:
                # swscale would scale its two fields apart, and keep the comb; decord's does not
                frame = _progressive(frame)
            picture = frame.to_ndarray(
                format="rgb24", width=width, height=height, interpolation=Interpolation.BILINEAR, threads=1
            )
            yield facts.turn.of_picture(picture)
        # where all are wanted, one frame too many should be seen
        if number == last and wanted is not None:
            return


def _progressive(frame: Any) -> Any:
    """The same picture without the mark that its lines are of two fields."""
    from av.filter import Graph

    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1)
    )
    graph.link_nodes(source, graph.add("setparams", "field_mode=prog"), graph.add("buffersink")).configure()
    graph.push(frame)
    return graph.pull()


def _decoded(data: bytes, facts: VideoFacts, first: int = 0) -> Iterator[tuple[int, Any]]:
    """PyAV's frames and their numbers, each held to the facts, from the last key frame before `first` on."""
    start = max((key for key in facts.keys if key <= first), default=0)
    number = start - 1
    with opened(data) as (container, errors):
        stream = container.streams[facts.stream]
        set_up(stream)
        if start:
            container.seek(facts.stamps[start], stream=stream)
        for number, frame in enumerate(container.decode(stream), start):
            if number == start and start and frame.pts != facts.stamps[start]:
                # the index led elsewhere: from the beginning, then
                yield from _decoded(data, facts)
                return
            errors.require_none(stream)
            _require_frame(frame, number, facts)
            yield number, frame
        errors.require_none(stream)
    if number + 1 < facts.num_frames:
        raise MediaError(f"{facts.num_frames} packets gave {number + 1} frames; the data are damaged or cut")


def _require_frame(frame: Any, number: int, facts: VideoFacts) -> None:
    """Hold one frame to the file's facts.

    Raises:
        MediaError: it is damaged, of another size or turn, of another time, or one too many.
    """
    if number >= facts.num_frames:
        raise MediaError(f"{facts.num_frames} packets gave more frames; the data are damaged")
    if frame.is_corrupt:
        raise MediaError(f"frame {number} of {facts.num_frames} is damaged")
    if (frame.height, frame.width) != facts.coded_size:
        raise MediaError(
            f"size changes from {facts.coded_size[0]} x {facts.coded_size[1]} to {frame.height} x {frame.width} at "
            f"frame {number}"
        )
    if turn_of(frame) != facts.turn:
        raise MediaError(f"rotation changes at frame {number}")
    if facts.stamps and frame.pts != facts.stamps[number]:
        raise MediaError(
            f"frame {number} comes with the timestamp {frame.pts}, where packets say {facts.stamps[number]}; frames "
            "are lost or out of order"
        )
