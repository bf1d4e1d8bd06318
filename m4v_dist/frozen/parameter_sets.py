"""What the units of an H.264 or HEVC stream tell without decoding: whether sizes may change, and where one may start.

Sizes and formats stand in sequence parameter sets: in the stream's header (avcC or hvcC), and perhaps again among its
packets. One that is not the header's may change the size of frames in mid-stream, which some decoders scale away. And
a container may call a packet a key frame to which later ones do not keep: a decoder that starts there lacks frames.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class _Layout:
    """Where avcC or hvcC keeps the width of lengths, and how a NAL unit tells its type.

    Args:
        length_at: byte of the header whose two lowest bits are that width less one.
        shift, mask: from a unit's first byte to its type.
        sequence_set: the type of a sequence parameter set.
        starts: the types of pictures that a decoder can start at.
    """

    length_at: int
    shift: int
    mask: int
    sequence_set: int
    starts: frozenset[int]


_LAYOUTS = {
    "h264": _Layout(4, 0, 0x1F, 7, frozenset({5})),
    "hevc": _Layout(21, 1, 0x3F, 33, frozenset(range(16, 22))),
}


def is_plain_stream(codec: str, header: bytes, packets: Iterable[tuple[bytes, bool]]) -> bool:
    """Whether sizes cannot change, and key frames are what they are called.

    Args:
        codec: FFmpeg's name.
        header: the stream's avcC or hvcC box.
        packets: their bytes, and whether the container calls them key frames; in any order.

    Returns:
        False also where it cannot be known: another codec, another form of header, or lengths that do not add up.
    """
    layout = _LAYOUTS.get(codec)
    if layout is None or len(header) <= layout.length_at or header[0] != 1:
        return False
    width = (header[layout.length_at] & 3) + 1
    return all(_is_plain(packet, is_key, header, width, layout) for packet, is_key in packets)


def _is_plain(packet: bytes, is_key: bool, header: bytes, width: int, layout: _Layout) -> bool:
    types = set()
    for unit in _units(packet, width):
        if not unit:
            return False
        kind = unit[0] >> layout.shift & layout.mask
        if kind == layout.sequence_set and unit not in header:
            return False
        types.add(kind)
    return not is_key or bool(types & layout.starts)


def _units(packet: bytes, width: int) -> Iterator[bytes]:
    """The units of a packet, and an empty one where their lengths do not add up."""
    start, end = 0, len(packet)
    while start < end:
        length = int.from_bytes(packet[start : start + width], "big")
        start += width
        yield packet[start : start + length] if start + length <= end else b""
        start += length
