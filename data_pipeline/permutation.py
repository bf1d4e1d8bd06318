"""The order of an epoch without a table: a keyed permutation of 0..n-1, one position at a time.

A Feistel network permutes the numbers of as many bits as n needs; its two halves differ by one bit at most. A number
that lands at n or above is sent through again until it lands below (cycle walking): less than twice on average, since
fewer than 2n numbers have these bits (a small n gets more than it needs, because halves of one bit mix badly). So the
record at a position costs no memory, and as much time in an epoch of ten as in one of ten million; any position can be
asked for alone: to resume in mid-epoch is to ask for the next one.

Nothing here is secret: what is wanted of the rounds is an order that no statistic of a training run tells from a drawn
one. Each round mixes by the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), keyed.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NUM_ROUNDS = 8
"""Twice the four that Luby and Rackoff ask for, since the halves of a small n are three bits."""
_MIN_BITS = 6

_MASK = (1 << 64) - 1
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


class Permutation:
    """A permutation of 0..size-1, chosen by its keys.

    Args:
        size: n, >= 1.
        keys: one of 64 bits for each of NUM_ROUNDS rounds.
    """

    def __init__(self, size: int, keys: Sequence[int]) -> None:
        assert size >= 1 and len(keys) == NUM_ROUNDS, "one number at least, and a key for each round"
        self.size = size
        self._keys = tuple(key & _MASK for key in keys)
        bits = max((size - 1).bit_length(), _MIN_BITS)
        self._right_bits = (bits + 1) // 2
        self._left_mask, self._right_mask = (1 << bits // 2) - 1, (1 << self._right_bits) - 1

    def place(self, position: int) -> int:
        """The number at one position: the definition."""
        while True:
            left, right = position >> self._right_bits, position & self._right_mask
            for number, key in enumerate(self._keys):
                if number % 2 == 0:
                    right ^= _mix(left ^ key) & self._right_mask
                else:
                    left ^= _mix(right ^ key) & self._left_mask
            position = left << self._right_bits | right
            if position < self.size:
                return position

    def places(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers at many positions at once: the same as `place`, without a Python loop over them.

        Args:
            positions: n, int64, each in 0..size-1.
        """
        values = positions.astype(np.uint64)
        waiting = np.arange(len(values))
        while len(waiting):
            values[waiting] = self._encrypted(values[waiting])
            waiting = waiting[values[waiting] >= self.size]
        return values.astype(np.int64)

    def _encrypted(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        shift, right_mask, left_mask = (np.uint64(v) for v in (self._right_bits, self._right_mask, self._left_mask))
        left, right = values >> shift, values & right_mask
        for number, key in enumerate(self._keys):
            if number % 2 == 0:
                right ^= _mix_many(left ^ np.uint64(key)) & right_mask
            else:
                left ^= _mix_many(right ^ np.uint64(key)) & left_mask
        return left << shift | right


def _mix(value: int) -> int:
    value = (value ^ value >> 30) * _MULTIPLIERS[0] & _MASK
    value = (value ^ value >> 27) * _MULTIPLIERS[1] & _MASK
    return value ^ value >> 31


def _mix_many(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """As `_mix`; products of uint64 arrays wrap round by themselves."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(_MULTIPLIERS[0])
    values = (values ^ values >> np.uint64(27)) * np.uint64(_MULTIPLIERS[1])
    return values ^ values >> np.uint64(31)
