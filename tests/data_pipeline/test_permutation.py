"""The order of an epoch: every number once for any size, and no statistic tells it from a drawn order."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.permutation import NUM_ROUNDS, Permutation
from m4v_dist.batch import derive_seed


def make(size: int, *key: int | str) -> Permutation:
    return Permutation(size, [derive_seed("test", *key, number) for number in range(NUM_ROUNDS)])


@given(size=st.integers(1, 3000), key=st.integers(0, 2**62))
def test_every_number_stands_at_one_position(size: int, key: int) -> None:
    order = make(size, key).places(np.arange(size))
    assert sorted(order.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2**16 - 1, 2**16, 2**16 + 1, 1_000_003])
def test_every_number_stands_at_one_position_of_a_large_size(size: int) -> None:
    seen = np.zeros(size, dtype=bool)
    seen[make(size).places(np.arange(size))] = True
    assert seen.all()


@given(size=st.integers(1, 2**40), key=st.integers(0, 2**62), draws=st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_many_at_once_are_what_each_is_alone(size: int, key: int, draws: list[float]) -> None:
    permutation = make(size, key)
    positions = [min(int(draw * size), size - 1) for draw in draws]
    assert permutation.places(np.array(positions)).tolist() == [permutation.place(position) for position in positions]


def chi_square(counts: list[int]) -> float:
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)


def order_of(size: int, key: int) -> list[int]:
    """One by one, which is quicker for a few."""
    permutation = make(size, key)
    return [permutation.place(position) for position in range(size)]


@pytest.mark.parametrize("size", [2, 3, 7, 16, 33])
def test_over_many_keys_each_number_comes_first_and_last_equally_often(size: int) -> None:
    permutations = [make(size, key) for key in range(1500)]
    for position in (0, size - 1):
        counts = Counter(permutation.place(position) for permutation in permutations)
        # mean size - 1, standard deviation sqrt(2 (size - 1)): five of them, for keys that never change
        assert chi_square([counts[n] for n in range(size)]) < size - 1 + 5 * (2 * (size - 1)) ** 0.5


@pytest.mark.parametrize("size", [4, 8, 31])
def test_over_many_keys_each_number_follows_each_other_equally_often(size: int) -> None:
    """That what lies side by side in the cache does not stay side by side."""
    steps: Counter[int] = Counter()
    for key in range(500):
        steps.update(np.mod(np.diff(order_of(size, key)), size).tolist())
    cells = size - 1
    # steps of one order are not independent, so the bound is twice as wide
    assert chi_square([steps[step] for step in range(1, size)]) < cells + 10 * (2 * cells) ** 0.5


def test_all_orders_of_a_few_numbers_come_up() -> None:
    assert len({tuple(order_of(4, key)) for key in range(500)}) == 24


def test_a_large_order_keeps_no_trace_of_the_old_one() -> None:
    size = 100_000
    order = make(size).places(np.arange(size))
    # a drawn order: correlation with the old one, and of neighbours, within 5 / sqrt(n) of 0; 1 fixed point on average
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 5 / size**0.5
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / size**0.5
    assert (order == np.arange(size)).sum() < 10
    # and every tenth of the epoch takes from every tenth of the cache
    cells = np.histogram2d(np.arange(size), order, bins=10)[0].ravel()
    assert chi_square(cells.tolist()) < 99 + 5 * (2 * 99) ** 0.5
