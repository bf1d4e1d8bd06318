"""The eight zigzag scan paths as index tensors: pure integers, cached by (height, width, path).

Path k starts in corner k // 2 (top left, top right, bottom left, bottom right) and snakes along whole rows (k even) or
whole columns (k odd), away from that corner; each step goes to a neighbour. Block l uses path l mod 8.

Source: ZigMa (Hu et al. 2024); CompVis/zigma utils/utils_zigzag.py at 37d837b, restricted to rectangles.
"""

from functools import lru_cache

import torch
from torch import Tensor

NUM_PATHS = 8


@lru_cache(maxsize=512)
def zigzag_order(height: int, width: int, path: int) -> Tensor:
    """Raster indices in visiting order: scanned = tokens[order].

    Args:
        height, width: grid, in tokens.
        path: 0 .. 7.

    Returns:
        height * width, int64, CPU. Cached: do not write to it.

    Raises:
        ValueError: no such path, or an empty grid.
    """
    if not 0 <= path < NUM_PATHS or height < 1 or width < 1:
        raise ValueError(f"zigzag_order: needs 0 <= path < {NUM_PATHS} and a grid, got {path=}, {height=}, {width=}.")
    is_bottom, is_right, by_column = path // 4 == 1, path // 2 % 2 == 1, path % 2 == 1
    grid = torch.arange(height * width).view(height, width)
    if is_bottom:
        grid = grid.flip(0)
    if is_right:
        grid = grid.flip(1)
    if by_column:
        grid = grid.T
    snake = grid.clone()
    snake[1::2] = snake[1::2].flip(1)
    return snake.flatten()


@lru_cache(maxsize=512)
def zigzag_inverse(height: int, width: int, path: int) -> Tensor:
    """The inverse of `zigzag_order`: tokens = scanned[inverse]. int64, CPU, cached."""
    return torch.argsort(zigzag_order(height, width, path))
