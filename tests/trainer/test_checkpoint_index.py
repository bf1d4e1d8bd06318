"""The index by a rule against the index written out, and its size on many ranks."""

import json
from typing import Any

import pytest

from m4v_dist.trainer.checkpoint_index import merge_index, read_index, sizes_digest
from m4v_dist.trainer.ranges import BYTES_A_VALUE

SIZES = {"weights/a": 10, "weights/b": 7, "weights/c": 3, "weights/d": 1, "ema/a": 10}
HEADERS = (104, 96, 120)


def _shares(owned: dict[str, list[list[tuple[int, int]]]], headers: tuple[int, ...] = HEADERS) -> list[dict[str, Any]]:
    """What each rank writes: ranges of each tensor on each rank, one after the other behind the file's header."""
    shares = []
    for rank, at in enumerate(headers):
        parts: dict[str, list[tuple[int, int, int]]] = {}
        for key, by_rank in owned.items():
            for start, length in by_rank[rank]:
                parts.setdefault(key, []).append((start, length, at))
                at += length * BYTES_A_VALUE
        shares.append({"num_elements": SIZES if rank == 0 else sizes_digest(SIZES), "parts": parts})
    return shares


EVEN: dict[str, list[list[tuple[int, int]]]] = {
    "weights/a": [[(0, 4)], [(4, 4)], [(8, 2)]],
    "weights/b": [[(0, 3)], [(3, 3)], [(6, 1)]],
    "weights/c": [[(0, 1)], [(1, 1)], [(2, 1)]],
    "weights/d": [[(0, 1)], [], []],
    "ema/a": [[(0, 4)], [(4, 4)], [(8, 2)]],
}
"""As ZeRO 3 holds them."""
UNEVEN = {
    **EVEN,
    # as ZeRO 1 and 2: the end of a flat buffer's share goes through a parameter, or a later rank has all of it
    "weights/a": [[(0, 9)], [(9, 1)], []],
    "weights/b": [[], [(0, 7)], []],
    # not in the order of the ranks, and in two pieces
    "weights/c": [[(0, 1), (2, 1)], [], [(1, 1)]],
}


@pytest.mark.parametrize("owned", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_what_is_read_is_what_the_ranks_wrote(owned: dict[str, list[list[tuple[int, int]]]]) -> None:
    shares = _shares(owned)
    entries = read_index(json.loads(json.dumps(merge_index(shares))))
    assert list(entries) == list(SIZES)
    for key, entry in entries.items():
        written = [
            (start, length, rank, at)
            for rank, share in enumerate(shares)
            for start, length, at in share["parts"].get(key, ())
        ]
        assert [tuple(part) for part in entry.parts] == sorted(written), key
        assert entry.num_elements == SIZES[key]


def test_even_shares_are_a_number_and_a_slice_of_them_works() -> None:
    index = merge_index(_shares(EVEN))
    assert [held for _, held in index["tensors"].values()] == [4, 3, 1, 1, 4]
    parts = read_index(index)["weights/b"].parts
    assert parts[1:] == [parts[1], parts[2]] and len(parts) == 3
    with pytest.raises(IndexError):
        parts[3]
    assert [type(held) for _, held in merge_index(_shares(UNEVEN))["tensors"].values()] == [int, list, list, int, int]


def test_a_file_with_a_gap_is_written_out() -> None:
    """The rule says where a part is from what is before it in the file; where that fails the index says it in full."""
    shares = _shares(EVEN)
    shares[1]["parts"]["weights/c"] = [(1, 1, 4000)]
    entries = read_index(merge_index(shares))
    assert [part[3] for part in entries["weights/c"].parts] == [104 + 28, 4000, 120 + 12]
    assert [part[3] for part in entries["ema/a"].parts] == [share["parts"]["ema/a"][0][2] for share in shares]


def test_the_index_of_format_2_is_read() -> None:
    parts = [[0, 3, 0, 8], [3, 2, 1, 8]]
    entries = read_index({"tensors": {"weights/a": {"num_elements": 5, "parts": parts}}})
    assert entries["weights/a"].num_elements == 5 and entries["weights/a"].parts == parts


def test_an_index_of_1024_ranks_is_small() -> None:
    """Written out each range has some twenty bytes."""
    num_ranks, size, keys = 1024, 1_000_000, [f"weights/single_blocks.{number}.proj_out.weight" for number in range(40)]
    share = -(-size // num_ranks)

    def parts(rank: int) -> dict[str, list[tuple[int, int, int]]]:
        length = min(share, size - rank * share)
        return {key: [(rank * share, length, 96 + 4 * length * number)] for number, key in enumerate(keys)}

    text = json.dumps(
        merge_index([{"num_elements": dict.fromkeys(keys, size), "parts": parts(rank)} for rank in range(num_ranks)])
    )
    assert len(text) < 5 * num_ranks + 70 * len(keys)
    entry = read_index(json.loads(text))[keys[7]]
    for rank in (0, 1000, 1023):
        start, length, at = parts(rank)[keys[7]][0]
        assert entry.parts[rank] == (start, length, rank, at)
