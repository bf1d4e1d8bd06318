"""Whether a media file is whole by what its container says of itself, told without decoding.

Downloads that end early cut files; disks and networks flip bits. Sizes: the boxes of MP4 and QuickTime, the elements of
Matroska and WebM, the header of ASF (WMV), the packets of program and transport streams, the last page of Ogg.
Checksums: those of Matroska. A stream that is cut between two packets, or a raw one, does not tell; AVI and MP4 also
count their frames, which `video_stream.py` compares.
"""

import struct
import zlib
from collections.abc import Iterator

from m4v_dist.frozen.video_file import MediaError

_EBML, _SEGMENT, _CRC_32 = 0x1A45DFA3, 0x18538067, 0xBF
_BOX_NAMES = frozenset({b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"styp", b"sidx", b"pnot"})
_ASF = bytes.fromhex("3026b2758e66cf11")
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_PACK = b"\x00\x00\x01\xba"
_OGG_LAST_PAGE = 4
_END_CODE = 0xB9
_TS_SYNC = 0x47


def require_whole(data: bytes) -> None:
    """Check a file's own statements.

    Raises:
        MediaError: it is empty, cut, or damaged where it holds a checksum.
    """
    if not data:
        raise MediaError("the file is empty")
    missing = 0
    if data[4:8] in _BOX_NAMES:
        missing = _missing_of_boxes(data)
    elif data[:4] == struct.pack(">I", _EBML):
        missing = _missing_of_elements(data)
    elif data.startswith(_ASF):
        missing = _missing_of_asf(data)
    elif data.startswith(b"OggS"):
        last = data[data.rindex(b"OggS") :]
        if len(last) < 6 or not last[5] & _OGG_LAST_PAGE:
            raise MediaError("the file is cut: its last page does not end a stream")
    elif data.startswith(_PACK):
        missing = _missing_of_program_stream(data)
    else:
        missing = _missing_of_transport_stream(data)
    if missing > 0:
        raise MediaError(f"the file is cut: {missing} of {len(data) + missing} bytes that it announces are missing")


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
    return start - len(data)


def _missing_of_elements(data: bytes) -> int:
    """Missing bytes of a Matroska file, whose checksums are compared on the way."""
    end = 0
    for name, start, end in _elements(data, 0):  # noqa: B007 (the last end is what is asked for)
        if name != _SEGMENT:
            continue
        for _, inner, inner_end in _elements(data, start):
            # the checksum is of all that follows it in the element
            if data[inner : inner + 2] == bytes((_CRC_32, 0x84)) and inner_end <= len(data):
                (stated,) = struct.unpack_from("<I", data, inner + 2)
                if zlib.crc32(memoryview(data)[inner + 6 : inner_end]) != stated:
                    raise MediaError(f"the file is damaged: a checksum is wrong between bytes {inner} and {inner_end}")
    return end - len(data)


def _elements(data: bytes, start: int) -> Iterator[tuple[int, int, int]]:
    """Name, first byte and end of each EBML element; one of unknown size ends the walk, where the file ends."""
    while start < len(data):
        length = _num_bytes(data, start)
        size_at = start + length
        if not length or size_at >= len(data):
            return
        num = _num_bytes(data, size_at)
        if not num or size_at + num > len(data):
            return
        name = int.from_bytes(data[start:size_at], "big")
        size = int.from_bytes(data[size_at : size_at + num], "big") & ((1 << 7 * num) - 1)
        is_unknown = size == (1 << 7 * num) - 1
        start = len(data) if is_unknown else size_at + num + size
        yield name, size_at + num, start


def _num_bytes(data: bytes, at: int) -> int:
    """Length of the number that starts here, told by its leading zeros; 0 where none starts."""
    return 9 - data[at].bit_length() if data[at] else 0


def _missing_of_asf(data: bytes) -> int:
    at = data.find(_ASF_FILE_PROPERTIES, 0, 1 << 16)
    if at < 0 or at + 48 > len(data):
        return 0
    # 0 where it was written to a pipe
    (size,) = struct.unpack_from("<Q", data, at + 40)
    return int(size) - len(data)


def _missing_of_program_stream(data: bytes) -> int:
    """Packs have a size of their own, all other units state theirs."""
    start = 0
    while start + 14 <= len(data) and data[start : start + 3] == _PACK[:3]:
        if data[start + 3] == _PACK[3]:
            # MPEG-2 stuffs its packs, MPEG-1's are of one size
            start += 14 + (data[start + 13] & 7) if data[start + 4] >> 6 == 1 else 12
        elif data[start + 3] == _END_CODE:
            return 0
        else:
            start += 6 + int.from_bytes(data[start + 4 : start + 6], "big")
    return start - len(data)


def _missing_of_transport_stream(data: bytes) -> int:
    """0 also for what is no transport stream."""
    for length, first in ((188, 0), (192, 4)):
        if len(data) > 3 * length and all(data[first + number * length] == _TS_SYNC for number in range(3)):
            return -len(data) % length
    return 0
