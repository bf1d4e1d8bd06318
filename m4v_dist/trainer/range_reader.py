"""From the ranges that other ranks wrote to the ranges that this rank wants, by verified ranged reads."""

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor

from m4v_dist.trainer.block_file import FileSums, read_runs
from m4v_dist.trainer.ranges import BYTES_A_VALUE

Span = tuple[int, Tensor]
"""First byte in a file, and the 1-d float32 values to fill from there on."""


def spans_of(parts: Sequence[Sequence[int]], start: int, values: Tensor) -> list[tuple[int, Span]]:
    """Where the elements of a tensor from `start` on are, with the rank that wrote them.

    Args:
        parts: (first element, length, rank, byte in its file), by first element, without gaps or overlaps.
        start: first element of `values`.
        values: what to fill.
    """
    found = []
    first = max(0, bisect.bisect_right(parts, start, key=lambda p: p[0]) - 1)
    for part_start, length, rank, at in (parts[number] for number in range(first, len(parts))):
        if part_start >= start + len(values):
            break
        low, high = max(start, part_start), min(start + len(values), part_start + length)
        if low < high:
            found.append((rank, (at + (low - part_start) * BYTES_A_VALUE, values[low - start : high - start])))
    return found


@torch.no_grad()
def fill(file: str, sums: FileSums, spans: Sequence[Span]) -> None:
    """Fill the values of `spans` from one file; each block of it is read and verified at most once.

    Raises:
        DamagedCheckpointError: a block is not what was written.
    """
    spans = sorted(spans, key=lambda span: span[0])
    ends = [at + values.numel() * BYTES_A_VALUE for at, values in spans]
    first = 0
    for run_start, data in read_runs(file, sums, [(at, end - at) for (at, _), end in zip(spans, ends, strict=True)]):
        run_end, run = run_start + len(data), torch.frombuffer(bytearray(data), dtype=torch.uint8)
        while first < len(spans) and ends[first] <= run_start:
            first += 1
        for (at, values), end in zip(spans[first:], ends[first:], strict=True):
            if at >= run_end:
                break
            low, high = max(at, run_start), min(end, run_end)
            if low < high:
                # Values never straddle blocks: both are multiples of four bytes.
                piece = run[low - run_start : high - run_start].view(torch.float32)
                values[(low - at) // BYTES_A_VALUE : (high - at) // BYTES_A_VALUE].copy_(piece)
