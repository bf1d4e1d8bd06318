"""Where a packed batch of columns is cut over sequence ranks: between frames, its largest share as small as it gets.

The packed sequence is cut, not every column over all ranks: a cut then goes through one column at most, so that states
and tails are handed on once a cut instead of once a column, columns that lie on one rank need no traffic, and the
shares can be more even, since they are made of the frames of all columns. At 768p and 31 latents, drawn units, the
fullest of two ranks holds 1.01 times the mean of a row of four columns (at worst 1.06; three ranks: 1.03, 1.22), and
1.11 times that of one column (a first unit, one frame, cannot be shared: 2). A column's text stands with its first
frame (and once more, in the scan, behind its last). A batch of fewer frames than ranks leaves ranks without tokens;
they still take part in attention, with their heads.

Legend: `f` frames of all columns, `s` sequence ranks.
"""

from collections.abc import Sequence


def cut_evenly(weights: Sequence[int], num_parts: int) -> tuple[int, ...]:
    """Cut a row of weights into runs whose largest sum is as small as it can be.

    Args:
        weights: f, each at least 1.
        num_parts: s; with f >= s no run is empty.

    Returns:
        s + 1 bounds: run i is weights[bounds[i] : bounds[i + 1]].
    """
    low, high = max(weights), sum(weights)
    while low < high:
        middle = (low + high) // 2
        if len(_fill(weights, middle)) <= num_parts:
            high = middle
        else:
            low = middle + 1
    starts = _fill(weights, low)
    # Fewer runs than parts: the last ones stay empty, unless a run can give a frame away, which makes none larger.
    while len(starts) < num_parts and len(starts) < len(weights):
        starts = sorted({*starts, _split_of_longest(starts, len(weights))})
    return (*starts, *[len(weights)] * (num_parts + 1 - len(starts)))


def _fill(weights: Sequence[int], capacity: int) -> list[int]:
    """First weight of each run, when each takes as many as the capacity holds."""
    starts, held = [0], 0
    for number, weight in enumerate(weights):
        if held + weight > capacity:
            starts.append(number)
            held = 0
        held += weight
    return starts


def _split_of_longest(starts: list[int], end: int) -> int:
    """Middle of the run with the most members."""
    first, last = max(zip(starts, [*starts[1:], end], strict=True), key=lambda run: run[1] - run[0])
    return (first + last) // 2


def imbalance(weights: Sequence[int], bounds: Sequence[int]) -> float:
    """The largest share over the mean share: 1 is even, s is all on one rank."""
    shares = [sum(weights[start:stop]) for start, stop in zip(bounds, bounds[1:], strict=False)]
    return max(shares) * len(shares) / sum(shares)
