"""Video and image files: what is written is read back, upright, and odd input is refused with a reason."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m4v_dist.frozen.video_file import (
    MediaError,
    centre_crop,
    cover_size,
    decode_animation,
    decode_image,
    encode_mp4,
    encode_png,
    read_video,
    resize_cover,
    write_mp4,
)


def gradient(num_frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    frames = [np.stack([rows * 4 % 256, columns * 3 % 256, np.full_like(rows, 8 * t)], -1) for t in range(num_frames)]
    return np.stack(frames).astype(np.uint8)


def test_an_mp4_reads_back_with_its_rate(tmp_path: Path) -> None:
    frames = gradient(12)
    write_mp4(f"{tmp_path}/x.mp4", frames, 12.5)
    found, fps = read_video(f"{tmp_path}/x.mp4")
    assert fps == pytest.approx(12.5) and found.shape == frames.shape
    assert np.abs(found.astype(int) - frames).mean() < 4


def test_an_mp4_starts_with_its_index_and_is_repeatable() -> None:
    data = encode_mp4(gradient(5), 24.0)
    assert data == encode_mp4(gradient(5), 24.0)
    assert 0 < data.find(b"moov") < data.find(b"mdat")


@pytest.mark.parametrize("frames", [gradient(2)[:, :47], gradient(2).astype(np.float32), gradient(2)[0]])
def test_frames_that_cannot_be_encoded_are_refused(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="frames|even"):
        encode_mp4(frames, 24.0)


@pytest.mark.parametrize("data", [b"", b"no video", encode_png(gradient(1)[0])[:60]])
def test_a_file_that_is_no_video_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.mp4").write_bytes(data)
    with pytest.raises(MediaError, match="x.mp4"):
        read_video(f"{tmp_path}/x.mp4")


def test_a_picture_is_turned_as_its_camera_says() -> None:
    picture = Image.fromarray(gradient(1)[0])
    exif = picture.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees to the right
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", exif=exif)
    assert np.array_equal(decode_image(buffer.getvalue())[0], np.rot90(gradient(1)[0], k=-1))


@pytest.mark.parametrize("data", [b"", b"\x89PNG broken", b"<html></html>"])
def test_a_broken_picture_gives_a_printable_reason(data: bytes) -> None:
    with pytest.raises(MediaError) as caught:
        decode_image(data)
    assert str(caught.value).isprintable()


def test_a_video_or_an_unknown_kind_given_for_a_picture_is_told_in_our_words() -> None:
    with pytest.raises(MediaError, match="it is a video; cut a frame"):
        decode_image(encode_mp4(gradient(2), 24.0))
    with pytest.raises(MediaError, match=r"^picture cannot be read .of no kind that is known here.$"):
        decode_image(b"<html></html>")


def test_an_animated_webp_gives_all_frames_and_its_rate() -> None:
    pictures = [Image.fromarray(frame) for frame in gradient(6)]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "WEBP", save_all=True, append_images=pictures[1:], duration=50, lossless=True)
    frames, fps = decode_animation(buffer.getvalue())
    assert np.array_equal(frames, gradient(6)) and fps == pytest.approx(20.0)


def test_a_resized_clip_covers_the_bucket_and_is_cropped_at_its_centre() -> None:
    assert cover_size((350, 350), (96, 160)) == (160, 160)
    assert cover_size((720, 1280), (96, 160)) == (96, 171)
    assert resize_cover(gradient(2), 96, 160).shape == (2, 120, 160, 3)
    cropped = centre_crop(gradient(1), 16, 16)
    assert np.array_equal(cropped, gradient(1)[:, 16:32, 24:40])
