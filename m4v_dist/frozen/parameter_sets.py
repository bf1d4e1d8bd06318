"""Whether an H.264 or HEVC stream stays with the parameters that its header names, told without decoding.

Sizes and formats stand in sequence parameter sets: in the stream's header (avcC or hvcC), and perhaps again among its
packets. One that is not the header's may change the size of frames in mid-stream, which some decoders scale away.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class _Layout:
    """Where avcC or hvcC keeps the width of lengths, and how a NAL unit tells its type.

    Args:
        length_at: byte of the header whose two lowest bits are that width less one.
        shift, mask: from a unit's first byte to its type.
        sequence_set: the type of a sequence parameter set.
    """

    length_at: int
    shift: int
    mask: int
    sequence_set: int


_LAYOUTS = {"h264": _Layout(4, 0, 0x1F, 7), "hevc": _Layout(21, 1, 0x3F, 33)}


def keeps_its_parameters(codec: str, header: bytes, packets: Iterable[bytes]) -> bool:
    """Whether every sequence parameter set among the packets is one of the header's.

    Args:
        codec: FFmpeg's name.
        header: the stream's avcC or hvcC box.
        packets: in any order.

    Returns:
        False also where it cannot be known: another codec, another form of header, or lengths that do not add up.
    """
    layout = _LAYOUTS.get(codec)
    if layout is None or len(header) <= layout.length_at or header[0] != 1:
        return False
    width = (header[layout.length_at] & 3) + 1
    return all(_is_kept(packet, header, width, layout) for packet in packets)


def _is_kept(packet: bytes, header: bytes, width: int, layout: _Layout) -> bool:
    start, end = 0, len(packet)
    while start + width < end:
        length = int.from_bytes(packet[start : start + width], "big")
        start += width
        if length == 0 or start + length > end:
            return False
        if packet[start] >> layout.shift & layout.mask == layout.sequence_set:
            unit = packet[start : start + length]
            if unit not in header:
                return False
        start += length
    return start == end
