"""Files with a checksum for each block of a megabyte: a reader of some ranges verifies what it reads, and no more.

CRC-32 (zlib) of the bytes as they are written: it finds every cut and, but for one case in 4 billion, every flipped
bit; it is in the standard library, faster than a disk or a store, and lets go of the interpreter's lock. It is no
protection against somebody who means harm, and need not be.
"""

import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m4v_dist import storage
from m4v_dist.errors import DamagedCheckpointError

logger = logging.getLogger(__name__)

BLOCK_BYTES = 2**20
_BLOCKS_A_READ = 64
_CHUNK_BYTES = 2**24

Piece = bytes | memoryview


@dataclass(frozen=True)
class FileSums:
    """What a file must be.

    Args:
        size_bytes: its size.
        block_bytes: of each block but the last.
        crc32: of each block.
    """

    size_bytes: int
    block_bytes: int
    crc32: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {"size_bytes": self.size_bytes, "block_bytes": self.block_bytes, "crc32": list(self.crc32)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "FileSums":
        """Read back what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: other JSON.
        """
        return cls(int(values["size_bytes"]), int(values["block_bytes"]), tuple(map(int, values["crc32"])))


def sums_of(pieces: Iterable[Piece], block_bytes: int = BLOCK_BYTES) -> FileSums:
    """Sums of a file that holds `pieces` one after the other."""
    sums: list[int] = []
    size, crc, room = 0, 0, block_bytes
    for piece in pieces:
        view, at = memoryview(piece), 0
        while at < len(view):
            part = view[at : at + room]
            crc = zlib.crc32(part, crc)
            at, room = at + len(part), room - len(part)
            if room == 0:
                sums.append(crc)
                crc, room = 0, block_bytes
        size += len(view)
    if room < block_bytes:
        sums.append(crc)
    return FileSums(size, block_bytes, tuple(sums))


def write_file(path: str, pieces: Sequence[Piece], block_bytes: int = BLOCK_BYTES) -> FileSums:
    """Write a whole file, atomically, and return its sums.

    Raises:
        NoSpaceError: the disk is full.
    """
    sums = sums_of(pieces, block_bytes)

    def chunks() -> Iterator[memoryview]:
        for piece in pieces:
            view = memoryview(piece)
            yield from (view[at : at + _CHUNK_BYTES] for at in range(0, len(view), _CHUNK_BYTES))

    storage.write_chunks(path, chunks, sums.size_bytes)
    return sums


def read_file(path: str, sums: FileSums) -> bytes:
    """A whole small file.

    Raises:
        DamagedCheckpointError: it is not what was written.
    """
    return b"".join(data for _, data in read_runs(path, sums, [(0, sums.size_bytes)]))


def read_runs(path: str, sums: FileSums, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
    """The verified blocks that hold some spans of a file, each block once, neighbours in one ranged read.

    Args:
        path: the file.
        sums: what was committed.
        spans: (first byte, number of bytes), in any order.

    Yields:
        (first byte, data), by growing first byte; at most 64 blocks at once.

    Raises:
        DamagedCheckpointError: a block is not what was written, read twice.
    """
    size = sums.block_bytes
    wanted = sorted({b for at, length in spans if length for b in range(at // size, (at + length - 1) // size + 1)})
    run: list[int] = []
    for block in wanted:
        if run and (block != run[-1] + 1 or len(run) == _BLOCKS_A_READ):
            yield run[0] * size, _read_blocks(path, sums, run[0], len(run))
            run = []
        run.append(block)
    if run:
        yield run[0] * size, _read_blocks(path, sums, run[0], len(run))


def _read_blocks(path: str, sums: FileSums, first: int, num_blocks: int) -> bytes:
    start = first * sums.block_bytes
    length = min(num_blocks * sums.block_bytes, sums.size_bytes - start)
    # A second look, since a transfer can be spoilt on its way and the file be whole.
    for is_last_look in (False, True):
        try:
            data = storage.read_bytes(path, start, length)
        except (FileNotFoundError, EOFError) as error:
            raise DamagedCheckpointError(
                f"{path}: {error}; the checkpoint is damaged: training goes on from the one before it."
            ) from error
        found = sums_of([data], sums.block_bytes).crc32
        wrong = [first + at for at, crc in enumerate(found) if crc != sums.crc32[first + at]]
        if not wrong:
            return data
        if not is_last_look:
            logger.warning("%s: blocks %s have another checksum; reading them again.", path, wrong[:8])
    raise DamagedCheckpointError(
        f"{path}: {len(wrong)} blocks of {sums.block_bytes} bytes have another checksum than was committed, the first "
        f"at byte {wrong[0] * sums.block_bytes}; the checkpoint is damaged: training goes on from the one before it."
    )
