"""decord, PyAV and, where it is installed, torchcodec give the same frames of the same files.

Tolerance, of 255: a clip's mean absolute difference, and that of its worst frame; from what was seen. decord and PyAV
both scale bilinearly with FFmpeg's swscale, of 2019 and of 2026, which round differently and place chroma of half size
a little apart: 0.0 to 1.0 here, 0.0 to 0.8 on 94 sample files but one, which has noise in its chroma of 10 bits and
differs by 2.2. torchcodec scales in RGB: 0.2 to 2.6 here. A frame that is one off differs by 20 and more here.
"""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.decode import DecodedClip, DecodeError, DecodeRule, decode_clip
from m4v_dist.errors import ConfigError
from m4v_dist.frozen.video_file import encode_mp4
from tests.data_pipeline.made_media import Made, make_video, smooth_pictures

TOLERANCE = {"decord": (2.5, 3.0), "torchcodec": (3.0, 3.5)}
"""Against PyAV: mean of the clip, and of its worst frame."""
FRAMES = smooth_pictures(33)
RULE = DecodeRule(buckets=((48, 64), (64, 48)), num_frames=33, fps=24.0)
FILES = {
    "H.264 in MP4": Made("mp4", "libx264"),
    "H.264 in Matroska": Made("matroska", "libx264"),
    "H.264 of 10 bits": Made("mp4", "libx264", "yuv420p10le"),
    "H.264 4:4:4": Made("mp4", "libx264", "yuv444p"),
    "H.264 4:2:2": Made("mp4", "libx264", "yuv422p"),
    "H.264 of full range": Made("mp4", "libx264", "yuvj420p"),
    "gray H.264": Made("mp4", "libx264", "gray"),
    "interlaced H.264": Made("mp4", "libx264", options=(("x264-params", "interlaced=1"),)),
    "H.264 with many key frames": Made("mp4", "libx264", options=(("x264-params", "keyint=8:bframes=3"),)),
    "HEVC": Made("mp4", "libx265"),
    "HEVC of 10 bits": Made("matroska", "libx265", "yuv420p10le"),
    "VP8": Made("webm", "libvpx"),
    "VP9": Made("webm", "libvpx-vp9"),
    "MPEG-4": Made("mp4", "mpeg4"),
    "motion JPEG": Made("mov", "mjpeg", "yuvj420p"),
    "ProRes": Made("mov", "prores_ks", "yuv422p10le"),
    "FFV1": Made("matroska", "ffv1"),
}
"""What both decode."""


def require_near(found: DecodedClip, wanted: DecodedClip) -> None:
    facts = [(c.fps, c.bucket, c.source_size, c.source_num_frames, c.source_fps) for c in (found, wanted)]
    assert facts[0] == facts[1] and found.frames.shape == wanted.frames.shape
    per_frame = np.abs(found.frames.astype(np.int16) - wanted.frames).mean((1, 2, 3))
    of_clip, of_frame = TOLERANCE[found.decoder]
    assert per_frame.mean() <= of_clip and per_frame.max() <= of_frame, per_frame


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fps", [24.0, 9.0])
def test_decord_and_pyav_agree(name: str, fps: float) -> None:
    media, rule = make_video(FILES[name], FRAMES), replace(RULE, fps=fps)
    by_decord = decode_clip(media, "mp4", replace(rule, decoder="decord"))
    by_pyav = decode_clip(media, "mp4", replace(rule, decoder="pyav"))
    assert (by_decord.decoder, by_pyav.decoder) == ("decord", "pyav")
    require_near(by_decord, by_pyav)


def test_they_agree_on_a_variable_rate_and_on_a_span() -> None:
    media = make_video(FILES["H.264 in MP4"], FRAMES, stamps=[*range(13), *range(20, 60, 2)])
    for span in (None, (5, 20)):
        clips = [decode_clip(media, "mp4", replace(RULE, decoder=decoder), span) for decoder in ("decord", "pyav")]
        require_near(*clips)


def test_frames_one_apart_do_not_pass_for_each_other() -> None:
    clip = decode_clip(encode_mp4(FRAMES, 24.0), "mp4", RULE)
    with pytest.raises(AssertionError):
        require_near(replace(clip, frames=np.roll(clip.frames, 1, axis=0)), clip)


@pytest.mark.parametrize(
    ("made", "rotation", "reason"),
    [
        (Made("mpeg", "mpeg2video"), None, "container mpeg"),
        (Made("mp4", "libsvtav1"), None, "codec av1"),
        (Made("mp4", "libx265", options=(("x265-params", "keyint=8:log-level=none"),)), None, "open groups"),
        (Made("mp4", "libx264"), 90.0, "frames that are to be turned"),
    ],
)
def test_what_decord_gets_wrong_it_is_not_asked_for(made: Made, rotation: float | None, reason: str) -> None:
    media = make_video(made, FRAMES, rotation=rotation)
    with pytest.raises(DecodeError, match=f"decord gives wrong frames for {reason}"):
        decode_clip(media, "mp4", replace(RULE, decoder="decord"))
    assert decode_clip(media, "mp4", RULE).decoder == "pyav"


def test_a_torchcodec_that_is_missing_is_named() -> None:
    if importlib.util.find_spec("torchcodec"):
        pytest.skip("torchcodec is installed here")
    with pytest.raises(ConfigError, match="precompute.decoder='torchcodec', but it cannot be imported"):
        decode_clip(make_video(FILES["VP9"], FRAMES), "webm", replace(RULE, decoder="torchcodec"))


@pytest.mark.skipif(importlib.util.find_spec("torchcodec") is None, reason="torchcodec is optional, not installed here")
@pytest.mark.parametrize("name", FILES)
def test_torchcodec_and_pyav_agree(name: str) -> None:
    media = make_video(FILES[name], FRAMES)
    require_near(*(decode_clip(media, "mp4", replace(RULE, decoder=decoder)) for decoder in ("torchcodec", "pyav")))
