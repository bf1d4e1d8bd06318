"""Codec figures stand for each split and size; what was not measured is None and never NaN."""

import json

import pytest

from jobs.check_codec import Measured, _describe, mean_psnr


def test_each_size_has_its_own_means() -> None:
    measured = [
        Measured("train", 64, 64, 30.0, 20.0),
        Measured("train", 64, 64, 40.0, None),
        Measured("train", 64, 128, 25.0, 15.0),
    ]
    small, wide = mean_psnr(measured, ["train", "train"])
    assert (small["height_px"], small["width_px"], small["num_clips"]) == (64, 64, 2)
    assert small["first_db"] == pytest.approx(35.0) and small["later_db"] == pytest.approx(20.0)
    assert (wide["width_px"], wide["first_db"], wide["num_clips"]) == (128, 25.0, 1)
    assert _describe(wide) == "train, 64 x 128 px: 25.0 dB first, 15.0 dB later frames, 1 clips"


def test_no_later_frames_are_not_measured() -> None:
    (mean,) = mean_psnr([Measured("train", 64, 64, 30.0, None)], ["train"])
    assert mean["later_db"] is None and "not measured later frames" in _describe(mean)


def test_a_split_without_clips_says_so_and_is_json() -> None:
    means = mean_psnr([], ["held_out"])
    assert "NaN" not in json.dumps(means)
    assert [_describe(mean) for mean in means] == ["held_out: no clips"]
