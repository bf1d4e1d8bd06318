"""Small made-up scenes with known scores, for the tests of curation."""

import numpy as np
from numpy.typing import NDArray

Pictures = NDArray[np.uint8]


def texture(seed: int, num_frames: int, shift_px: int = 1, side_px: int = 96) -> Pictures:
    """Frames t h w c of one scene: fine noise over coarse patches in colours of its own, moving right each frame."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(30, 200, (side_px // 8, side_px // 8, 3)).repeat(8, 0).repeat(8, 1)
    fine = generator.integers(0, 50, (side_px // 2, side_px // 2, 1)).repeat(2, 0).repeat(2, 1)
    picture = (coarse + fine).astype(np.uint8)
    return np.stack([np.roll(picture, shift_px * frame, axis=1) for frame in range(num_frames)])


def plain(value: int, num_frames: int, side_px: int = 96) -> Pictures:
    """Frames t h w c of one grey value."""
    return np.full((num_frames, side_px, side_px, 3), value, np.uint8)


def blurred(frames: Pictures, radius_px: int) -> Pictures:
    """A box blur of each frame, edges wrapped."""
    total = np.zeros(frames.shape, np.float64)
    shifts = range(-radius_px, radius_px + 1)
    for down in shifts:
        for right in shifts:
            total += np.roll(frames, (down, right), axis=(1, 2))
    return (total / len(shifts) ** 2).astype(np.uint8)
