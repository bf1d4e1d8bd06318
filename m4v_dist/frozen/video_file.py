"""Video and image files in and out: the one door of PyAV and Pillow.

For people and for packing: mp4 out, mp4 in, stills, animated WebP and GIF. Training data is decoded by
`data_pipeline/decode.py` instead, which resizes inside the decoder. This file imports no torch, because decoder child
processes import it and should start fast; frames are numpy arrays, and torch tensors are taken where they come in.

Legend: `t` frames, `h` `w` pixels, `c` red, green, blue.
"""

import io
import tempfile
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

CRF = 18
"""x264's constant rate factor: visually close to lossless, about 50 kB a second at 128 px."""

Frames = NDArray[np.uint8]


class MediaError(ValueError):
    """A media file cannot be read; the message says why."""


def encode_mp4(frames: ArrayLike, fps: float) -> bytes:
    """Encode frames as H.264 yuv420p with the index in front, so that a browser plays it while it loads.

    Args:
        frames: t h w c, uint8; array or CPU tensor. h and w must be even.
        fps: frames per second, > 0.

    Raises:
        ValueError: wrong dtype, shape or an odd size.
    """
    import av

    pixels = _checked_frames(frames)
    # A real file: to put the index in front, the muxer opens its output again by name.
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/clip.mp4"
        with av.open(path, mode="w", format="mp4", options={"movflags": "+faststart"}) as container:
            # av's stubs type the stream by codec name only; crf and preset are x264's own options.
            options = {"crf": str(CRF), "preset": "medium", "threads": "1"}
            stream: Any = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
            stream.height, stream.width = pixels.shape[1:3]
            stream.pix_fmt = "yuv420p"
            for picture in pixels:
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
        with open(path, "rb") as file:
            return file.read()


def write_mp4(path: str, frames: ArrayLike, fps: float) -> None:
    """Write frames t h w c uint8 as an mp4 (see `encode_mp4`), local or s3://, all at once."""
    # Imported here: storage brings torch, which a decoder child has no use for.
    from m4v_dist import storage

    storage.write_bytes(path, encode_mp4(frames, fps))


def read_video(path: str) -> tuple[Frames, float]:
    """Read a whole local video in one pass.

    Returns:
        frames t h w c uint8, upright; and the mean frame rate.

    Raises:
        MediaError: no video stream, or it cannot be decoded to the end.
    """
    import av

    frames: list[Frames] = []
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise MediaError(f"{path}: holds no video stream; give a video file.")
            stream = container.streams.video[0]
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            for frame in container.decode(stream):
                picture = np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
                frames.append(np.rot90(picture, k=frame.rotation // 90))
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"{path}: cannot be decoded ({error}); the file is damaged or no video.") from error
    if not frames or fps <= 0:
        raise MediaError(f"{path}: {len(frames)} frames at {fps} frames per second; the file is empty or damaged.")
    return np.stack(frames), fps


def decode_image(data: bytes) -> Frames:
    """Decode a still picture, turned upright by its EXIF orientation.

    Returns:
        1 h w c, uint8.

    Raises:
        MediaError: no readable picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image)
            return np.asarray(upright.convert("RGB"), dtype=np.uint8)[None].copy()
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow's own words for an unknown kind name an object in memory.
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "of no kind that is known here" if is_unknown else f"{type(error).__name__}: {_printable(error)}"
        if _is_video(data):
            reason = "it is a video; cut a frame out of it"
        raise MediaError(f"picture cannot be read ({reason})") from error


def decode_animation(data: bytes, default_fps: float = 15.0, max_bytes: int | None = None) -> tuple[Frames, float]:
    """Decode an animated WebP or GIF, or a still as one frame.

    Args:
        data: the file.
        default_fps: frame rate where the file stores no durations.
        max_bytes: most that the frames may take; None: no limit.

    Returns:
        frames t h w c uint8, and frames per second.

    Raises:
        MediaError: no readable picture, frames of several sizes, or more bytes than allowed.
    """
    from PIL import Image, ImageSequence, UnidentifiedImageError

    pictures: list[Frames] = []
    durations_ms: list[float] = []
    try:
        with Image.open(io.BytesIO(data)) as image:
            _require_room(getattr(image, "n_frames", 1), image.size, max_bytes)
            for picture in ImageSequence.Iterator(image):
                pictures.append(np.asarray(picture.convert("RGB"), dtype=np.uint8))
                durations_ms.append(float(picture.info.get("duration", 0)))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise MediaError(f"animation cannot be read ({type(error).__name__}: {_printable(error)})") from error
    if len({picture.shape for picture in pictures}) != 1:
        raise MediaError(f"animation has frames of sizes {sorted({picture.shape for picture in pictures})}")
    total_ms = sum(durations_ms)
    return np.stack(pictures), (1000.0 * len(pictures) / total_ms if total_ms > 0 else default_fps)


def encode_png(frame: ArrayLike) -> bytes:
    """Encode one picture h w c uint8 as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.asarray(frame, dtype=np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def resize_cover(frames: Frames, height_px: int, width_px: int) -> Frames:
    """Scale frames t h w c so that they cover height x width (bicubic), without the crop."""
    from PIL import Image

    height, width = cover_size((frames.shape[1], frames.shape[2]), (height_px, width_px))
    if (height, width) == frames.shape[1:3]:
        return frames
    scaled = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames]
    return np.stack([np.asarray(picture, dtype=np.uint8) for picture in scaled])


def cover_size(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int]:
    """Smallest (height, width) of the same shape as `size` that covers `bucket`, rounded to whole pixels."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale))


def centre_crop(frames: Frames, height_px: int, width_px: int) -> Frames:
    """Cut the centre height x width out of frames t h w c."""
    top, left = (frames.shape[1] - height_px) // 2, (frames.shape[2] - width_px) // 2
    return frames[:, top : top + height_px, left : left + width_px]


def _require_room(num_frames: int, size: tuple[int, int], max_bytes: int | None) -> None:
    needed = num_frames * size[0] * size[1] * 3
    if max_bytes is not None and needed > max_bytes:
        raise MediaError(
            f"{num_frames} pictures of {size[1]} x {size[0]} take {needed / 2**30:.2f} GiB, more than "
            f"{max_bytes / 2**30:g} GiB"
        )


def _checked_frames(frames: ArrayLike) -> Frames:
    pixels = np.asarray(frames)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or len(pixels) == 0:
        raise ValueError(
            f"frames must be uint8 t h w 3 with t > 0, got {pixels.dtype} {pixels.shape}; "
            "scale to 0..255 and put the colours last."
        )
    if pixels.shape[1] % 2 or pixels.shape[2] % 2:
        raise ValueError(f"H.264 yuv420p needs even sizes, got {pixels.shape[1]} x {pixels.shape[2]}; crop one pixel.")
    return np.ascontiguousarray(pixels)


def _is_video(data: bytes) -> bool:
    """Whether the first bytes are those of MP4 or QuickTime, Matroska or WebM, or AVI."""
    # AVIF and HEIF pictures lie in MP4's container too, under brands of their own.
    is_mp4 = data[4:8] == b"ftyp" and not data[8:12].startswith((b"avi", b"hei", b"hev", b"mif", b"msf"))
    return is_mp4 or data.startswith(b"\x1a\x45\xdf\xa3") or (data.startswith(b"RIFF") and data[8:12] == b"AVI ")


def _printable(error: BaseException) -> str:
    """First 200 printable characters of a message: decoders put raw bytes of the file into theirs."""
    return "".join(char if char.isprintable() else "?" for char in str(error))[:200]
