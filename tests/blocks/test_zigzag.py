"""The scan paths: equal to ZigMa's, permutations, and walks over neighbours."""

import pytest
import torch

from m4v_dist.blocks.zigzag import NUM_PATHS, zigzag_inverse, zigzag_order
from tests.conftest import load_golden


def test_orders_and_inverses_equal_zigma() -> None:
    description, tensors = load_golden("zigzag_paths")
    for height, width in description["config"]["grids"]:
        for path in range(NUM_PATHS):
            order, inverse = zigzag_order(height, width, path), zigzag_inverse(height, width, path)
            expected = f"out.grid_{height}x{width}"
            assert torch.equal(order, tensors[f"{expected}.order"][path].long())
            assert torch.equal(inverse, tensors[f"{expected}.inverse"][path].long())


@pytest.mark.parametrize("path", range(NUM_PATHS))
@pytest.mark.parametrize("grid", [(1, 7), (5, 1), (5, 4), (2, 9)])
def test_a_path_visits_each_token_once_and_steps_to_neighbours(grid: tuple[int, int], path: int) -> None:
    order = zigzag_order(*grid, path)
    assert sorted(order.tolist()) == list(range(grid[0] * grid[1]))
    rows, columns = order // grid[1], order % grid[1]
    assert torch.all(rows.diff().abs() + columns.diff().abs() == 1)


def test_paths_of_a_grid_differ() -> None:
    assert len({tuple(zigzag_order(3, 4, path).tolist()) for path in range(NUM_PATHS)}) == NUM_PATHS


def test_a_ninth_path_is_refused() -> None:
    with pytest.raises(ValueError, match="path=8"):
        zigzag_order(3, 4, 8)
