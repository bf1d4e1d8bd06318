"""Frames by decord, and where it may be asked for them: the one door of decord. No torch.

decord 0.6 carries an FFmpeg of 2019. It is quick where frames are resized and few are wanted, and it was seen to return
other frames than those asked for, without an error, from containers and streams outside of `TRUSTED_CONTAINERS`, from
cut edit lists, and from open groups of pictures, where it counts wrong after it has sought (x265 writes such groups
unless told otherwise). It also says nothing to its caller of damaged data; FFmpeg inside it does, on stderr.

Legend: `t` frames, `h` `w` pixels, `c` colours.
"""

import fcntl
import io
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np

from m4v_dist.errors import ConfigError
from m4v_dist.frozen.video_facts import Turn, VideoFacts
from m4v_dist.frozen.video_file import Frames, MediaError

TRUSTED_CONTAINERS = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})
TRUSTED_CODECS = frozenset({"h264", "hevc"})
"""Whose size cannot change unseen: see `VideoFacts.is_plain`."""
KNOWN_CODECS = TRUSTED_CODECS | {"mpeg4", "vp8", "vp9", "mjpeg", "prores", "ffv1"}
"""Those that decord was seen to decode rightly."""
_STDERR = 2
_STAMP_TOLERANCE_S = 1e-3
"""decord keeps times as float32 from the container's origin: 0.25 ms at an hour."""


def why_not_decord(facts: VideoFacts) -> str | None:
    """Why decord would give wrong frames of a file, or none; None where it should be right."""
    if facts.container not in TRUSTED_CONTAINERS:
        return f"container {facts.container.split(',')[0]}"
    if facts.codec not in KNOWN_CODECS:
        return f"codec {facts.codec}"
    if facts.num_outside_edit:
        return f"an edit list that cuts {facts.num_outside_edit} frames off"
    if facts.num_leading:
        return "open groups of pictures"
    if facts.num_video_streams > 1:
        return f"{facts.num_video_streams} video streams or pictures"
    if not facts.stamps:
        return "frames without timestamps"
    if facts.turn != Turn():
        return "frames that are to be turned"
    return None


def is_trusted(facts: VideoFacts) -> bool:
    """Whether decord needs no second look: it should be right, and the size of frames cannot change unseen."""
    return why_not_decord(facts) is None and facts.codec in TRUSTED_CODECS and facts.is_plain


def decord_frames(data: bytes, facts: VideoFacts, size: tuple[int, int], indices: np.ndarray) -> tuple[Frames, str]:
    """Frames of a file by decord, upright, resized inside it (bilinear).

    Args:
        data: the file.
        facts: what `probe_video` said of it.
        size: (height, width) of the frames.
        indices: of frames in the order they are shown; int64, ascending.

    Returns:
        t h w c uint8; and what FFmpeg printed meanwhile: where it is not empty, the data may be damaged.

    Raises:
        MediaError: decord fails, or counts or times frames otherwise than the file's packets do.
        ConfigError: decord is missing or broken.
    """
    decord = _import_decord()
    # it tells of what it conceals at this level only, and of a sound file nothing
    decord.logging.set_level(decord.logging.INFO)
    height, width = size
    with _printed() as printed:
        try:
            reader = decord.VideoReader(io.BytesIO(data), width=width, height=height, num_threads=1)
            _require_same_frames(reader, facts)
            frames: Frames = reader.get_batch(indices).asnumpy()
        except (decord.DECORDError, RuntimeError, IndexError, ValueError) as error:
            raise MediaError(f"decord: {error}") from error
    if frames.shape != (len(indices), height, width, 3):
        raise MediaError(f"decord gave frames {frames.shape} where {(len(indices), height, width, 3)} were asked for")
    return frames, "".join(printed)


def _require_same_frames(reader: object, facts: VideoFacts) -> None:
    """Compare decord's count and times with the packets'.

    Raises:
        MediaError: they differ.
    """
    num_frames = len(reader)  # type: ignore[arg-type]
    if num_frames != facts.num_frames:
        raise MediaError(f"decord counts {num_frames} frames, the packets are {facts.num_frames}")
    stamps = reader.get_frame_timestamp(np.arange(num_frames))[:, 0]  # type: ignore[attr-defined]
    wanted = np.asarray(facts.stamps, dtype=np.int64) * float(facts.time_base)
    # one origin for both: decord counts from the container's, which may be another stream's start
    difference = np.abs((stamps - stamps[0]) - (wanted - wanted[0]))
    if difference.max() > _STAMP_TOLERANCE_S:
        worst = int(difference.argmax())
        raise MediaError(f"decord shows frame {worst} {difference[worst]:.3f} s off the time that its packet says")


@contextmanager
def _printed() -> Iterator[list[str]]:
    """Collect what is printed to stderr inside; it is still printed.

    In a decoder child stderr is a file already, and must stay that file, for the parent reads it if the child dies.
    """
    found: list[str] = []
    is_readable = fcntl.fcntl(_STDERR, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    if is_readable and stat.S_ISREG(os.fstat(_STDERR).st_mode):
        start = os.fstat(_STDERR).st_size
        yield found
        found.append(_read(_STDERR, start))
        return
    with tempfile.TemporaryFile() as file:
        before = os.dup(_STDERR)
        os.dup2(file.fileno(), _STDERR)
        try:
            yield found
        finally:
            os.dup2(before, _STDERR)
            found.append(_read(file.fileno(), 0))
            os.write(_STDERR, found[-1].encode())
            os.close(before)


def _read(descriptor: int, start: int) -> str:
    size = os.fstat(descriptor).st_size - start
    return os.pread(descriptor, max(0, size), start).decode("utf-8", "replace")


def _import_decord() -> ModuleType:
    """Load decord.

    Raises:
        ConfigError: it is missing, or a library of it is; that is no fault of the clip at hand.
    """
    try:
        import decord
    # ctypes raises OSError, and decord itself RuntimeError, for a library that is not there
    except (ImportError, OSError, RuntimeError) as error:
        raise broken_decord(f"{type(error).__name__}: {error}") from error
    module: ModuleType = decord
    return module


def broken_decord(reason: str) -> ConfigError:
    """The error of a machine that cannot load decord."""
    return ConfigError(
        f"decord cannot be imported ({reason}), and it decodes most video; install it on every node, as pyproject.toml "
        "names it, or set precompute.decoder='pyav'."
    )
