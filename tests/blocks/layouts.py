"""Layouts that several block tests share: mixed units, stages, grids and text lengths."""

import torch

from m4v_dist.blocks.layout import ColumnShape, FrameShape, PackedLayout


def column(stage: int, unit: int, num_text: int, height: int = 2, width: int = 3) -> ColumnShape:
    """A column as the objective makes it: coarser with age, the newest frame noisy."""
    levels = [max(0, stage - age) for age in range(unit - 1)][::-1] + [stage]
    frames = tuple(FrameShape(height * 2**level, width * 2**level, level, time) for time, level in enumerate(levels))
    return ColumnShape(num_text, frames)


def mixed_layout() -> PackedLayout:
    """Four columns: long history, quarter only, one frame, one image."""
    return PackedLayout((column(2, 4, 5), column(0, 3, 9), column(1, 2, 1), column(2, 1, 7)), torch.device("cpu"))
