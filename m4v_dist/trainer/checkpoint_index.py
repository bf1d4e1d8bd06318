"""A checkpoint's index: where the ranks' files hold each tensor; made from all ranks' shares, and read back.

Of a tensor that the ranks hold in even shares, rank 0 the first, as under ZeRO 3 all are, the index has the size of a
share alone: which rank holds what follows from it, and where in its file from the order of the tensors, since a file
holds one after the other without gaps. What is held in another way, as ZeRO 1 and 2 hold a parameter on one or two
ranks, is written out. Written out, the 640 parameters of the 2B model on 1,024 ranks have 2.6 million ranges: 61 MB of
JSON, which every rank of a resume would read.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from m4v_dist.trainer.ranges import BYTES_A_VALUE

Part = tuple[int, int, int, int]
"""First element, length, rank, byte in the rank's file."""


@dataclass(frozen=True)
class IndexEntry:
    """Where one tensor is.

    Args:
        num_elements: of the whole tensor.
        parts: by first element, without gaps or overlaps.
    """

    num_elements: int
    parts: Sequence[Part]


class EvenParts(Sequence[Part]):
    """Parts of equal length, the last one shorter, on ranks 0, 1, ...; worked out as they are asked for.

    Args:
        num_elements: of the tensor.
        share: elements of each part.
        at: byte of each part in its rank's file, int64.
    """

    def __init__(self, num_elements: int, share: int, at: Tensor) -> None:
        self._num_elements, self._share, self._at = num_elements, share, at

    def __len__(self) -> int:
        return len(self._at)

    @overload
    def __getitem__(self, number: int) -> Part: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Part]: ...
    def __getitem__(self, number: int | slice) -> Part | Sequence[Part]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        start = number * self._share
        return start, min(self._share, self._num_elements - start), number, int(self._at[number])


def merge_index(shares: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ranges of all ranks as `index.json` has them; `read_index` reads it.

    Args:
        shares: `num_elements` and `parts` of each rank, in rank order; of all but rank 0 `sizes_digest` will do.

    Raises:
        ValueError: they do not cover each tensor exactly once.
    """
    sizes: Mapping[str, int] = shares[0]["num_elements"]
    digest = sizes_digest(sizes)
    different = [rank for rank, share in enumerate(shares) if share["num_elements"] not in (sizes, digest)]
    if different:
        raise ValueError(f"ranks {different[:8]} save other tensors than rank 0.")
    firsts = [min((at for parts in share["parts"].values() for _, _, at in parts), default=0) for share in shares]
    at, tensors = torch.tensor(firsts, dtype=torch.int64), {}
    for key, size in sizes.items():
        parts = _covering_parts(key, size, shares)
        held = _even_share(parts, at) or parts
        tensors[key] = [size, held]
        _advance(at, size, held)
    return {"first_bytes": firsts, "tensors": tensors}


def sizes_digest(sizes: Mapping[str, int]) -> str:
    """What stands for the sizes of all tensors in a rank's file, so that rank 0 need not read them from each."""
    return hashlib.blake2b(json.dumps(dict(sizes)).encode(), digest_size=16).hexdigest()


def _covering_parts(key: str, size: int, shares: Sequence[Mapping[str, Any]]) -> list[Part]:
    parts: list[Part] = sorted(
        (start, length, rank, at)
        for rank, share in enumerate(shares)
        for start, length, at in share["parts"].get(key, ())
        if length
    )
    end = 0
    for start, length, rank, _ in parts:
        if start != end:
            raise ValueError(f"{key}: rank {rank} holds elements from {start}, the ranks before it up to {end}.")
        end = start + length
    if end != size:
        raise ValueError(f"{key}: the ranks hold {end} of {size} elements.")
    return parts


def _even_share(parts: Sequence[Part], at: Tensor) -> int:
    """Elements of each part, if they are as `EvenParts` says; else 0."""
    if not parts:
        return 0
    share, expected = parts[0][1], at[: len(parts)].tolist()
    is_even = all(
        rank == number and at == expected[number] and (length == share or (number == len(parts) - 1 and length < share))
        for number, (_, length, rank, at) in enumerate(parts)
    )
    return share if is_even else 0


def _advance(at: Tensor, size: int, held: int | Sequence[Sequence[int]]) -> None:
    """Move each rank's next byte past a tensor's parts."""
    if isinstance(held, int):
        count = -(-size // held)
        at[: count - 1] += held * BYTES_A_VALUE
        at[count - 1] += (size - (count - 1) * held) * BYTES_A_VALUE
        return
    for _, length, rank, first in held:
        at[rank] = first + length * BYTES_A_VALUE


def read_index(value: Mapping[str, Any]) -> dict[str, IndexEntry]:
    """What `merge_index` made, or an index of format 2, in which all parts are written out."""
    if "first_bytes" not in value:
        return {key: IndexEntry(entry["num_elements"], entry["parts"]) for key, entry in value["tensors"].items()}
    at, entries = torch.tensor(value["first_bytes"], dtype=torch.int64), {}
    for key, (size, held) in value["tensors"].items():
        is_even = isinstance(held, int)
        parts = EvenParts(size, held, at[: -(-size // held)].clone()) if is_even else held
        entries[key] = IndexEntry(size, parts)
        _advance(at, size, held)
    return entries
