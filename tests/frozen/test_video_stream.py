"""A video's facts and its verified pass, in this process; data_pipeline/test_odd_media.py has files of many kinds."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from m4v_dist.frozen.parameter_sets import is_plain_stream
from m4v_dist.frozen.video_facts import Turn, probe_video
from m4v_dist.frozen.video_file import Frames, MediaError
from m4v_dist.frozen.video_stream import check_stream, stream_frames
from tests.data_pipeline.made_media import Made, make_size_change, make_video, pictures

FRAMES = pictures(12)
H264 = Made("mp4", "libx264")


def test_a_probe_tells_when_each_frame_is_shown() -> None:
    facts = probe_video(make_video(H264, FRAMES, rate=Fraction(24000, 1001)))
    assert facts.is_constant_rate and facts.fps == pytest.approx(24000 / 1001)
    assert facts.times_s() == pytest.approx(np.arange(12) * 1001 / 24000, abs=1e-9)
    facts = probe_video(make_video(H264, FRAMES, stamps=[*range(6), *range(20, 26)]))
    assert not facts.is_constant_rate and facts.fps == pytest.approx(11 / (25 / 24), rel=1e-3)
    assert facts.times_s() == pytest.approx(np.array([*range(6), *range(20, 26)]) / 24, abs=1e-3)


def test_wanted_frames_are_those_of_a_whole_pass() -> None:
    media = make_video(H264, FRAMES)
    facts = probe_video(media)
    whole = list(stream_frames(media, facts, (48, 64)))
    some = list(stream_frames(media, facts, (48, 64), [0, 3, 11]))
    assert len(whole) == 12 and [frame.shape for frame in some] == [(48, 64, 3)] * 3
    assert all(np.array_equal(whole[number], frame) for number, frame in zip([0, 3, 11], some, strict=True))


@pytest.mark.parametrize(
    ("made", "has_keys"),
    [
        (Made("webm", "libvpx-vp9", options=(("g", "8"),)), True),
        (Made("webm", "libvpx", options=(("g", "8"),)), True),
        (Made("mp4", "libsvtav1", options=(("g", "8"),)), True),
        (Made("mp4", "mpeg4", options=(("g", "8"),)), True),
        (Made("matroska", "libx264", options=(("x264-params", "keyint=8:bframes=3"),)), True),
        (Made("matroska", "libx264", options=(("x264-params", "keyint=8:bframes=3:open-gop=1"),)), False),
        (Made("mpegts", "libx264", options=(("g", "8"),)), False),
        (Made("avi", "mpeg4", options=(("g", "8"),)), False),
    ],
)
def test_a_start_in_the_middle_gives_the_frames_of_a_whole_pass(made: Made, has_keys: bool) -> None:
    media = make_video(made, pictures(30))
    facts = probe_video(media)
    assert (len(facts.keys) > 2) == has_keys
    whole = list(stream_frames(media, facts, (96, 128)))
    for wanted in ([29], [8, 9], [7, 8, 23], [16, 17, 18, 25], [0, 24], list(range(13, 30))):
        found = list(stream_frames(media, facts, (96, 128), wanted))
        assert len(found) == len(wanted)
        assert all(np.array_equal(whole[number], frame) for number, frame in zip(wanted, found, strict=True))


def test_an_index_that_leads_elsewhere_costs_time_and_no_frame() -> None:
    media = make_video(Made("webm", "libvpx-vp9", options=(("g", "15"),)), pictures(30))
    facts = probe_video(media)
    whole = list(stream_frames(media, facts, (96, 128)))
    lied_to = replace(facts, keys=(0, 11))
    assert np.array_equal(next(iter(stream_frames(media, lied_to, (96, 128), [12]))), whole[12])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_frames": 13}, "13 packets gave 12 frames"),
        ({"num_frames": 11}, "11 packets gave more frames"),
        ({"coded_size": (96, 126)}, "size changes from 96 x 126 to 96 x 128 at frame 0"),
        ({"turn": Turn(True)}, "rotation changes at frame 0"),
        ({"stamps": tuple(range(12))}, "frame 1 comes with the timestamp"),
    ],
)
def test_a_pass_holds_a_file_to_its_facts(change: dict[str, object], reason: str) -> None:
    media = make_video(H264, FRAMES)
    facts = replace(probe_video(media), **change)  # type: ignore[arg-type]
    with pytest.raises(MediaError, match=reason):
        check_stream(media, facts)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("left_right", [False, True])
@pytest.mark.parametrize("up_down", [False, True])
def test_a_turn_moves_pixels_and_sizes_alike(transposed: bool, left_right: bool, up_down: bool) -> None:
    turn = Turn(transposed, left_right, up_down)
    picture: Frames = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    upright = turn.of_picture(picture)
    assert upright.shape[:2] == turn.of_size((2, 3))
    rotations = [np.rot90(picture, k) for k in range(4)]
    is_rotation = any(r.shape == upright.shape and np.array_equal(r, upright) for r in rotations)
    assert turn.is_mirror_image != is_rotation


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_parameter_sets_that_come_again_are_told_from_new_ones(codec: str) -> None:
    assert probe_video(make_video(Made("mp4", codec), FRAMES)).is_plain
    # a key frame each fourth, with its parameters in front of it
    again = {"libx264": "x264-params", "libx265": "x265-params"}[codec]
    repeated = Made("matroska", codec, options=((again, "keyint=4:repeat-headers=1:log-level=none"),))
    assert probe_video(make_video(repeated, FRAMES)).is_plain


def test_what_is_no_avcc_is_not_vouched_for() -> None:
    header = bytes([1, 0x64, 0, 0x1F, 0xFF, 0xE1, 0, 3, 0x67, 1, 2, 1, 0, 1, 0x68])
    kept, changed, other = (
        bytes([0, 0, 0, 3, 0x67, 1, 2]),
        bytes([0, 0, 0, 3, 0x67, 9, 9]),
        bytes([0, 0, 0, 2, 0x65, 7]),
    )
    assert is_plain_stream("h264", header, [(other, True), (kept, False)])
    assert not is_plain_stream("h264", header, [(other, True), (changed, False)])
    assert not is_plain_stream("h264", header, [(kept, True)])
    assert not is_plain_stream("h264", header, [(other[:-1], True)])
    assert not is_plain_stream("h264", bytes([0, 0, 0, 1, 0x67, 1, 2]), [(other, True)])
    assert not is_plain_stream("vp9", header, [(other, True)])


def test_a_size_change_is_found_without_a_header_that_tells() -> None:
    media = make_size_change(Made("mpegts", "libx264"), FRAMES, pictures(6, 64, 80))
    facts = probe_video(media)
    assert not facts.is_plain and facts.num_frames == 18
    with pytest.raises(MediaError, match="size changes from 96 x 128 to 64 x 80 at frame 12"):
        list(stream_frames(media, facts, (96, 128)))
    # frames before it are what they are
    assert len(list(stream_frames(media, facts, (96, 128), [0, 11]))) == 2
