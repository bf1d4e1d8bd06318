"""What small frames are measured by, one at a time or two at once: the only file that imports cv2.

Every score has a plain numpy twin in `tests/data_pipeline/test_picture_scores.py`. Sizes are stated, because sharpness
and motion hang on them: luma with a short side of `SHARPNESS_SIDE_PX` for sharpness, of `FLOW_SIDE_PX` for the rest. No
torch here: decoder child processes should start fast.

Legend: `h` `w` pixels, `c` red, green, blue.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

FLOW_SIDE_PX = 128
SHARPNESS_SIDE_PX = 256
MAX_ASPECT = 4
"""The long side is measured at no more than this many short sides: a longer picture is squeezed, not left out."""
BLACK_LEVEL = 16
"""Luma, of 255, up to which a pixel counts as black; noise of a camera and ringing of a codec lie under it."""
BLACK_SHARE = 0.98
"""Share of black pixels from which a frame is black."""
STATIC_CHANGE = 0.1
"""Mean change of luma, of 255, up to which a frame repeats the one before: what a codec leaves of a still."""
VISIBLE_CHANGE = 3
"""Change of luma, of 255, up to which a pixel has not moved: flow between two dark or flat places is made up."""


@dataclass(frozen=True)
class PictureScores:
    """One frame by itself; all in [0, 1].

    Args:
        brightness: mean of its luma.
        contrast: standard deviation of its luma.
        is_black: whether nearly all of it is black.
    """

    brightness: float
    contrast: float
    is_black: bool


def small_luma(picture: Picture, side_px: int) -> Picture:
    """Luma h w uint8 of a picture h w c, with a short side of `side_px`.

    Shrunk by averaging areas, enlarged linearly; a long side past `MAX_ASPECT` short sides is squeezed to that.
    """
    import cv2

    height, width = picture.shape[:2]
    scale = side_px / min(height, width)
    size = [min(max(side_px, round(length * scale)), MAX_ASPECT * side_px) for length in (width, height)]
    luma = np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), dtype=np.uint8)
    if (height, width) == (size[1], size[0]):
        return luma
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(luma, size, interpolation=method), dtype=np.uint8)


def score_picture(luma: Picture) -> PictureScores:
    """Measure one frame's luma h w."""
    is_black = bool(np.count_nonzero(luma <= BLACK_LEVEL) >= BLACK_SHARE * luma.size)
    return PictureScores(float(luma.mean()) / 255, float(luma.std()) / 255, is_black)


def bars_share(brightest: Picture) -> float:
    """Share of the area that black bars at the edges take.

    Args:
        brightest: h w, the largest luma of each pixel over all frames; wholly black, it counts as 1.
    """
    is_lit = brightest > BLACK_LEVEL
    area = 1
    for axis in (0, 1):
        lit = np.flatnonzero(is_lit.any(axis=axis))
        area *= int(lit[-1] - lit[0] + 1) if len(lit) else 0
    return 1.0 - area / brightest.size


def change(before: Picture, after: Picture) -> float:
    """Mean absolute change of luma, in [0, 255]."""
    import cv2

    return float(cv2.absdiff(before, after).mean())


def sharpness(luma: Picture) -> float:
    """Variance of the Laplacian (4, -1 to each side; edges reflected): grey levels squared, >= 0."""
    import cv2

    return float(cv2.Laplacian(luma, cv2.CV_32F).var())


class FlowMeter:
    """Dense optical flow between two frames, by OpenCV's DIS (arXiv 1603.03590), in one thread.

    At its medium preset: the faster ones find a third of a motion of a pixel and less.
    """

    def __init__(self) -> None:
        import cv2

        # the actor has as many children as it has CPUs for them
        cv2.setNumThreads(1)
        self._flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def mean_length(self, before: Picture, after: Picture) -> float:
        """Mean length of the flow, as a share of the short side; 0 wherever nothing has changed to the eye.

        Args:
            before, after: luma h w of one size.
        """
        import cv2

        nowhere = np.zeros((*before.shape, 2), np.float32)
        flow = np.asarray(self._flow.calc(before, after, nowhere))  # h w 2
        has_changed = (cv2.absdiff(before, after) > VISIBLE_CHANGE).astype(np.uint8)
        # a plain surface that moves changes at its edges alone
        moves = cv2.dilate(has_changed, np.ones((9, 9), np.uint8))
        return float((np.hypot(flow[..., 0], flow[..., 1]) * moves).mean()) / min(before.shape)
