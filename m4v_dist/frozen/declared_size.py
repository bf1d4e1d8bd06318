"""Whether a media file is as long as its outermost boxes say: files are cut by downloads that end early.

MP4 and QuickTime (boxes of a size and a name) and Matroska and WebM (EBML elements, of which the one that holds all
the frames states its size). What states no size (a live stream), and other containers, are taken as whole here.
"""

import struct

_EBML_HEADER = 0x1A45DFA3
_BOX_NAMES = frozenset({b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"styp", b"sidx", b"pnot"})


def missing_bytes(data: bytes) -> int:
    """How many bytes the last box or element lacks; 0 for a whole file, and where none says how long it is."""
    if data[4:8] in _BOX_NAMES:
        return _missing_of_boxes(data)
    if data[:4] == struct.pack(">I", _EBML_HEADER):
        return _missing_of_elements(data)
    return 0


def _missing_of_boxes(data: bytes) -> int:
    start = 0
    # what follows the boxes is not theirs: some programs append a few bytes of their own
    while start + 8 <= len(data) and data[start + 4 : start + 8] in _BOX_NAMES:
        (size,) = struct.unpack_from(">I", data, start)
        if size == 1 and start + 16 <= len(data):
            (size,) = struct.unpack_from(">Q", data, start + 8)
        # 0 is a box that ends with the file
        if size < 8:
            return 0
        start += size
    return max(0, start - len(data))


def _missing_of_elements(data: bytes) -> int:
    start = 0
    while start < len(data):
        length = _num_bytes(data, start)
        size_at = start + length
        if not length or size_at >= len(data):
            return 0
        num = _num_bytes(data, size_at)
        if not num or size_at + num > len(data):
            return 0
        size = int.from_bytes(data[size_at : size_at + num], "big") & ((1 << 7 * num) - 1)
        # all ones: not known when it was written
        if size == (1 << 7 * num) - 1:
            return 0
        start = size_at + num + size
    return start - len(data)


def _num_bytes(data: bytes, at: int) -> int:
    """Length of the number that starts here, told by its leading zeros; 0 where none starts."""
    return 9 - data[at].bit_length() if data[at] else 0
