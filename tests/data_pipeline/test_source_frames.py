"""Every frame of a video once: as many as `decode_clip` counts, and those."""

import numpy as np
import pytest

from data_pipeline.decode import DecodeError, DecodeRule, decode_clip
from data_pipeline.source_frames import read_frames
from m4v_dist.frozen.video_file import encode_mp4
from tests.data_pipeline.made_cache import moving_blocks


def test_frames_come_once_in_order_and_small() -> None:
    info, frames = read_frames(encode_mp4(moving_blocks(1, 20, 96, 128), 24.0), "mp4", short_side_px=48)
    assert (info.height_px, info.width_px, info.num_frames_in_header, info.codec) == (96, 128, 20, "h264")
    assert info.fps == pytest.approx(24.0, abs=1e-6)
    found = list(frames)
    assert [time for time, _ in found] == pytest.approx([number / 24 for number in range(20)])
    assert {picture.shape for _, picture in found} == {(48, 64, 3)}


def test_a_span_found_here_is_cut_there() -> None:
    media = encode_mp4(moving_blocks(1, 40, 96, 128), 24.0)
    _, frames = read_frames(media, "mp4", short_side_px=96)
    all_frames = np.stack([picture for _, picture in frames])
    clip = decode_clip(media, "mp4", DecodeRule(((96, 128),), 17, 24.0), (13, 20))
    assert clip.source_num_frames == 20 and len(clip.frames) == 17
    assert np.abs(clip.frames.astype(int) - all_frames[13:30]).mean() < 1


@pytest.mark.parametrize("span", [(0, 41), (40, 1), (-1, 5), (3, 0)])
def test_a_span_outside_the_video_is_refused(span: tuple[int, int]) -> None:
    media = encode_mp4(moving_blocks(1, 40), 24.0)
    with pytest.raises(DecodeError, match="of a video of 40 frames"):
        decode_clip(media, "mp4", DecodeRule(((96, 128),), 17, 24.0), span)


def test_what_is_no_video_is_refused() -> None:
    with pytest.raises(DecodeError, match="kind 'jpg'"):
        read_frames(b"x", "jpg", short_side_px=48)
    with pytest.raises(DecodeError, match="Invalid data"):
        read_frames(b"x" * 1000, "mp4", short_side_px=48)
