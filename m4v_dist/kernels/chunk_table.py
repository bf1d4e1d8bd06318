"""Where the chunks of a packed sequence lie: made on the host, once for each layout, and kept on the device.

A chunk never crosses a segment's start, so no kernel masks by segment, and what stands in one segment (NaN included)
meets nothing of another.

Legend: `c` chunks, `s` segments.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkTable:
    """The chunks of a packed sequence, in order.

    Args:
        chunks: c 2, int32 on the device: first token, number of tokens.
        first_chunks: s + 1, int32 on the device: where each segment's chunks start, and their end.
        num_chunks: c.
        num_segments: s.
        chunk_size: tokens of a full chunk.
    """

    chunks: Tensor
    first_chunks: Tensor
    num_chunks: int
    num_segments: int
    chunk_size: int


def chunk_table(bounds: tuple[int, ...], chunk_size: int, device: torch.device) -> ChunkTable:
    """The table of segments `bounds[i] .. bounds[i + 1]`; kept, since every block of a model asks for the same one."""
    return _made(bounds, chunk_size, device)


@lru_cache(maxsize=256)
def _made(bounds: tuple[int, ...], chunk_size: int, device: torch.device) -> ChunkTable:
    chunks: list[tuple[int, int]] = []
    firsts = [0]
    for start, end in zip(bounds, bounds[1:], strict=False):
        chunks += [(at, min(chunk_size, end - at)) for at in range(start, end, chunk_size)]
        firsts.append(len(chunks))
    return ChunkTable(
        torch.tensor(chunks, dtype=torch.int32).to(device),
        torch.tensor(firsts, dtype=torch.int32).to(device),
        len(chunks),
        len(bounds) - 1,
        chunk_size,
    )
