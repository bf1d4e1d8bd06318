"""Decoding: the frame rule, buckets, and damaged files."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.decode import (
    DecodeError,
    DecodeRule,
    choose_bucket,
    choose_frames,
    decode_clip,
)
from m4v_dist.frozen.video_file import encode_mp4, encode_png, read_video
from tests.data_pipeline.made_cache import moving_blocks

RULE = DecodeRule(buckets=((64, 64), (48, 96)), num_frames=17, fps=24.0)


@pytest.mark.parametrize(
    ("num_frames", "source_fps", "limit", "fps", "expected"),
    [
        (1, 24.0, 57, 24.0, [0]),
        (8, 24.0, 57, 24.0, [0]),
        (9, 24.0, 57, 24.0, list(range(9))),
        (100, 24.0, 17, 24.0, list(range(17))),
        (40, 48.0, 57, 24.0, list(range(0, 34, 2))),
        (30, 15.0, 57, 24.0, list(range(25))),
        (20, 36.0, 57, 24.0, [0, 2, 3, 5, 6, 8, 9, 11, 12]),
    ],
)
def test_frames_are_8k_plus_1_from_the_start_at_the_rate(
    num_frames: int, source_fps: float, limit: int, fps: float, expected: list[int]
) -> None:
    times_s = np.arange(num_frames) / source_fps
    indices, rate = choose_frames(times_s, source_fps, DecodeRule(((64, 64),), limit, fps))
    assert indices.tolist() == expected
    assert rate == min(source_fps, fps)


def test_a_clip_goes_to_the_nearest_aspect_ratio() -> None:
    assert choose_bucket((720, 1280), ((64, 64), (48, 96))) == (48, 96)
    assert choose_bucket((300, 350), ((64, 64), (48, 96))) == (64, 64)


def test_a_video_covers_its_bucket_and_keeps_its_centre() -> None:
    frames = moving_blocks(1, 20, 96, 128)
    clip = decode_clip(encode_mp4(frames, 24.0), "mp4", RULE)
    assert clip.frames.shape == (17, 64, 64, 3) and clip.frames.dtype == np.uint8
    assert (clip.fps, clip.bucket, clip.source_size, clip.source_num_frames) == (24.0, (64, 64), (96, 128), 20)
    # the centre square is 96 of 128 columns; block averages at the same places, H.264 and resize aside
    expected = frames[:17, :, 16:112].reshape(17, 8, 12, 8, 12, 3).mean((2, 4))
    found = clip.frames.reshape(17, 8, 8, 8, 8, 3).mean((2, 4))
    assert np.abs(found - expected).mean() < 4


def test_a_still_is_one_frame_and_a_small_one_is_enlarged() -> None:
    clip = decode_clip(encode_png(moving_blocks(2, 1, 32, 32)[0]), "png", RULE)
    assert clip.frames.shape == (1, 64, 64, 3) and clip.fps == 0.0 and clip.source_size == (32, 32)


def bad_files() -> dict[str, bytes]:
    sound = encode_mp4(moving_blocks(3, 30), 24.0)
    noise = np.random.default_rng(0).integers(0, 256, 20000).astype(np.uint8).tobytes()
    return {
        "empty": b"",
        "random": noise,
        "html": b"<html><body>404 not found</body></html>",
        "half": sound[: len(sound) // 2],
        "head only": sound[:500],
        "no frames": sound[:32],
        "transport stream": (b"G" + bytes(187)) * 20,
    }


@pytest.mark.parametrize("name", ["empty", "random", "html", "half", "head only", "no frames", "transport stream"])
def test_a_bad_file_gives_a_printable_error(name: str) -> None:
    with pytest.raises(DecodeError) as caught:
        decode_clip(bad_files()[name], "mp4", RULE)
    message = str(caught.value)
    assert message.isascii() and message.isprintable() and 5 < len(message) < 400
    assert "Errno" not in message


def test_an_error_message_is_the_same_on_each_run() -> None:
    messages = []
    for _ in range(2):
        with pytest.raises(DecodeError) as caught:
            decode_clip(bad_files()["half"], "mp4", RULE)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and not any(part.count(":") == 2 for part in messages[0].split())


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(DecodeError, match="kind 'exe'"):
        decode_clip(b"x", "exe", RULE)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_mp4(moving_blocks(7, 11), 29.97))
    frames, fps = read_video(str(path))
    assert frames.shape == (11, 96, 128, 3) and fps == pytest.approx(29.97, abs=0.01)
