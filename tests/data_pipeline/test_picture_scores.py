"""Scores of small pictures against what they mean, written plainly in numpy."""

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline.picture_scores import (
    BLACK_LEVEL,
    FLOW_SIDE_PX,
    FlowMeter,
    bars_share,
    change,
    score_picture,
    sharpness,
    small_luma,
)
from tests.data_pipeline.made_scenes import blurred, plain, texture

Picture = NDArray[np.uint8]


def slow_luma(picture: Picture) -> NDArray[np.float64]:
    """BT.601 weights."""
    return picture.astype(np.float64) @ np.array([0.299, 0.587, 0.114])


def slow_halved(luma: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of each block of 2 x 2."""
    return luma.reshape(luma.shape[0] // 2, 2, luma.shape[1] // 2, 2).mean(axis=(1, 3))


def slow_sharpness(luma: Picture) -> float:
    """Variance of 4 times a pixel less than the sum of its four neighbours, the picture reflected at its edges."""
    padded = np.pad(luma.astype(np.float64), 1, mode="reflect")
    sides = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
    return float((sides - 4 * padded[1:-1, 1:-1]).var())


def slow_shift(before: Picture, after: Picture, most: int) -> int:
    """By how many pixels to the right the whole picture moved: the shift that leaves the least change."""
    left = [np.abs(np.roll(before, shift, axis=1).astype(int) - after).mean() for shift in range(most)]
    return int(np.argmin(left))


def luma_of(frames: Picture, side_px: int = FLOW_SIDE_PX) -> list[Picture]:
    return [small_luma(picture, side_px) for picture in frames]


def test_luma_is_the_weighted_sum_of_colours_and_is_shrunk_by_areas() -> None:
    picture = texture(1, 1, side_px=256)[0]
    assert np.abs(small_luma(picture, 256) - slow_luma(picture)).max() <= 0.51
    assert np.abs(small_luma(picture, 128) - slow_halved(slow_luma(picture))).max() <= 1.01


@pytest.mark.parametrize(
    ("size", "expected"),
    [((720, 1280), (128, 228)), ((32, 64), (128, 256)), ((16, 18), (128, 144)), ((16, 8192), (128, 512))],
)
def test_any_size_is_brought_to_one_short_side(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert small_luma(np.zeros((*size, 3), np.uint8), 128).shape == expected
    assert small_luma(np.zeros((size[1], size[0], 3), np.uint8), 128).shape == expected[::-1]


def test_brightness_contrast_and_change_are_those_of_numpy() -> None:
    first, second = luma_of(texture(2, 2, shift_px=3))
    scores = score_picture(first)
    assert scores.brightness == pytest.approx(first.astype(float).mean() / 255, abs=1e-6)
    assert scores.contrast == pytest.approx(first.astype(float).std() / 255, abs=1e-6)
    assert not scores.is_black
    assert change(first, second) == pytest.approx(np.abs(first.astype(int) - second).mean(), abs=1e-6)
    assert change(first, first) == 0


@pytest.mark.parametrize(("num_lit", "is_black"), [(0, True), (200, True), (400, False)])
def test_a_frame_is_black_while_two_in_a_hundred_pixels_are_lit(num_lit: int, is_black: bool) -> None:
    luma = np.full((128, 128), BLACK_LEVEL, np.uint8)
    luma.reshape(-1)[:num_lit] = 255
    assert score_picture(luma).is_black == is_black


def test_sharpness_is_the_variance_of_the_laplacian_and_falls_with_blur() -> None:
    sharp = small_luma(texture(3, 1, side_px=256)[0], 256)
    assert sharpness(sharp) == pytest.approx(slow_sharpness(sharp), rel=1e-5)
    blurs = [sharpness(small_luma(blurred(texture(3, 1, side_px=256), radius)[0], 256)) for radius in (1, 3, 8)]
    assert sharpness(sharp) > 2 * blurs[0] > 8 * blurs[1] > 8 * blurs[2]
    assert sharpness(small_luma(plain(90, 1)[0], 256)) == 0


@pytest.mark.parametrize("shift_px", [0, 1, 2, 5])
def test_flow_of_a_shifted_texture_is_its_shift(shift_px: int) -> None:
    before, after = luma_of(texture(4, 2, shift_px=shift_px, side_px=128))
    assert slow_shift(before, after, 8) == shift_px
    # what is rolled in at the left edge is new, so that the mean is not exact
    assert FlowMeter().mean_length(before, after) * 128 == pytest.approx(shift_px, rel=0.03, abs=1e-9)


def test_flow_is_none_where_nothing_changes_to_the_eye() -> None:
    generator = np.random.default_rng(5)
    # noise of a dark camera, from which DIS alone makes up motion
    dark = generator.integers(0, 3, (2, 128, 128)).astype(np.uint8)
    assert FlowMeter().mean_length(dark[0], dark[1]) == 0


@pytest.mark.parametrize(
    ("top", "bottom", "left", "share"), [(0, 0, 0, 0.0), (10, 22, 0, 0.25), (16, 16, 64, 0.625), (128, 0, 0, 1.0)]
)
def test_bars_are_rows_and_columns_at_the_edges_that_never_light_up(
    top: int, bottom: int, left: int, share: float
) -> None:
    brightest = np.full((128, 128), 120, np.uint8)
    brightest[60, 5:] = 0  # a dark row inside is no bar
    brightest[:top], brightest[128 - bottom :], brightest[:, :left] = 0, 0, 0
    assert bars_share(brightest) == pytest.approx(share)
