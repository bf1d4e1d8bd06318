"""Where a batch is cut over ranks: between frames, evenly, everything once."""

import itertools

import pytest

from m4v_dist.blocks.cut import cut_evenly, imbalance
from m4v_dist.blocks.layout import ColumnShape, FrameShape, cut_columns, cut_imbalance
from tests.blocks.layouts import column, mixed_layout


def _largest(weights: list[int], bounds: tuple[int, ...]) -> int:
    return max(sum(weights[a:b]) for a, b in itertools.pairwise(bounds))


@pytest.mark.parametrize("weights", [[1], [3, 1, 1], [1, 1, 9], [2, 2, 2, 2, 2], [5, 1, 4, 2, 8, 1, 1, 3]])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 4])
def test_no_other_cut_has_a_smaller_largest_share(weights: list[int], num_parts: int) -> None:
    bounds = cut_evenly(weights, num_parts)
    assert bounds[0] == 0 and bounds[-1] == len(weights) and list(bounds) == sorted(bounds)
    inner = itertools.combinations_with_replacement(range(len(weights) + 1), num_parts - 1)
    assert _largest(weights, bounds) == min(_largest(weights, (0, *cuts, len(weights))) for cuts in inner)
    num_empty = sum(a == b for a, b in itertools.pairwise(bounds))
    assert num_empty == max(0, num_parts - len(weights))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 20])
def test_the_ranks_hold_every_frame_once_and_in_order(num_ranks: int) -> None:
    columns = mixed_layout().columns
    ranks = cut_columns(columns, num_ranks)
    held = [(piece.number, frame) for pieces in ranks for piece in pieces for frame in range(piece.start, piece.stop)]
    assert held == [(number, frame) for number, shape in enumerate(columns) for frame in range(len(shape.frames))]
    assert sum(piece.num_text for pieces in ranks for piece in pieces) == sum(shape.num_text for shape in columns)
    noisy = sum(piece.num_noisy_tokens for pieces in ranks for piece in pieces)
    assert noisy == sum(shape.num_noisy_tokens for shape in columns)


def test_the_longest_column_of_241_frames_is_even_on_two_ranks_and_nearly_on_three() -> None:
    """31 latents at 768p: 28 of 240 tokens, one of 960, two of 3,840."""
    long = column(2, 31, 128, height=12, width=20)
    assert long.num_video == 15_360
    assert cut_imbalance((long,), 2) == 1.0
    assert cut_imbalance((long,), 3) == pytest.approx(5_888 * 3 / (15_360 + 256))


def test_a_sequence_of_like_frames_is_nearly_even() -> None:
    """Wan's form: 31 full frames, all noisy."""
    frames = tuple(FrameShape(48, 80, 2, time) for time in range(31))
    assert cut_imbalance((ColumnShape(128, frames, num_noisy=31),), 2) < 1.04


def test_imbalance_counts_empty_shares() -> None:
    assert imbalance([4, 4], (0, 1, 2)) == 1.0
    assert imbalance([8], (0, 1, 1)) == 2.0
