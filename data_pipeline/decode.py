"""Media bytes to frames: decord (or Pillow for stills and GIF) in child processes that may hang or die alone.

The only file that imports decord. `DecoderPool` belongs to the caller's process; each of its children runs this file
as `python -m data_pipeline.decode` and speaks length-prefixed messages over its pipes. A plain subprocess, because
multiprocessing's spawn would import a Ray worker's main module again; it starts in about 0.3 s, without torch.

Rules: frames from the start at the asked rate, cut to 8k+1; resized inside the decoder so that they cover the bucket of
the nearest aspect ratio, then cropped at the centre. Slower clips keep their rate.

Legend: `t` frames, `h` `w` pixels, `c` colours.
"""

import contextlib
import json
import math
import os
import queue
import re
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import IO, Any

import numpy as np

from m4v_dist.errors import ConfigError
from m4v_dist.frozen.video_file import (
    Frames,
    MediaError,
    centre_crop,
    cover_size,
    decode_animation,
    decode_image,
    resize_cover,
)

VIDEO_KINDS = frozenset({"mp4", "webm", "mkv", "mov", "avi", "gif"})
IMAGE_KINDS = frozenset({"jpg", "jpeg", "png", "webp"})
_TEMPORAL_STRIDE = 8
_WRONG_FRAME_MAGIC = {b"\x00\x00\x01\xba": "MPEG program stream", b"\x30\x26\xb2\x75": "ASF (WMV)"}
_SOURCE_LINE = re.compile(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ")
_ADDRESS = re.compile(r" ?@? ?\b0x[0-9a-f]{6,}")
_MAX_REASON_CHARS = 300
_MAX_TAIL_CHARS = 500
_REPLY_GRACE_S = 5.0
_EXIT_GRACE_S = 5.0
"""How long a child that closed its pipe may take to end by itself."""


@dataclass(frozen=True)
class DecodeRule:
    """How clips are cut: frame rate, length and sizes.

    Args:
        buckets: allowed (height, width) in pixels.
        num_frames: longest clip, 8k+1.
        fps: highest frame rate.
    """

    buckets: tuple[tuple[int, int], ...]
    num_frames: int
    fps: float


@dataclass(frozen=True)
class DecodedClip:
    """Frames t h w c uint8 of one bucket, with what they came from.

    Args:
        frames: t h w c, uint8, t = 8k+1.
        fps: frames per second of `frames`; 0 for a still.
        bucket: (height, width) in pixels.
        source_size: (height, width) of the file, in pixels.
        source_num_frames: frames that the file holds.
        source_fps: its frame rate; 0 for a still.
    """

    frames: Frames
    fps: float
    bucket: tuple[int, int]
    source_size: tuple[int, int]
    source_num_frames: int
    source_fps: float


class DecodeError(Exception):
    """One clip cannot be decoded; the message is printable and holds the reason, not the key."""


def choose_bucket(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Bucket whose aspect ratio is nearest (in logarithm), the first of equals; sizes are (height, width)."""
    return min(buckets, key=lambda bucket: abs(math.log(size[0] / size[1]) - math.log(bucket[0] / bucket[1])))


def choose_frames(num_frames: int, source_fps: float, rule: DecodeRule) -> tuple[np.ndarray, float]:
    """Which frames of a file make the clip.

    Args:
        num_frames: frames in the file, > 0.
        source_fps: its mean rate, > 0.
        rule: length and rate.

    Returns:
        ascending indices from 0, int64, their count 8k+1; and the clip's frame rate.
    """
    fps = min(source_fps, rule.fps)
    step = source_fps / fps
    available = int((num_frames - 1) / step + 1e-6) + 1
    count = (min(available, rule.num_frames) - 1) // _TEMPORAL_STRIDE * _TEMPORAL_STRIDE + 1
    return np.minimum(np.floor(np.arange(count) * step + 0.5).astype(np.int64), num_frames - 1), fps


def decode_clip(data: bytes, kind: str, rule: DecodeRule) -> DecodedClip:
    """Decode one file in this process; callers with unknown files go through `DecoderPool`.

    Args:
        data: the whole file.
        kind: its extension in lower case, without the dot.
        rule: frame rate, length, sizes.

    Raises:
        DecodeError: it cannot be decoded, or fewer frames came than were asked for.
        ConfigError: decord is missing or broken.
    """
    try:
        if kind in IMAGE_KINDS:
            return _decode_still(data, kind, rule)
        if kind == "gif":
            return _decode_pictures(*decode_animation(data), rule)
    except MediaError as error:
        raise DecodeError(str(error)) from error
    if kind not in VIDEO_KINDS:
        raise DecodeError(f"kind {kind!r} is not among {sorted(VIDEO_KINDS | IMAGE_KINDS)}")
    return _decode_video(data, rule)


def _decode_still(data: bytes, kind: str, rule: DecodeRule) -> DecodedClip:
    if kind == "webp":
        frames, fps = decode_animation(data)
        if len(frames) > 1:
            return _decode_pictures(frames, fps, rule)
    else:
        frames = decode_image(data)
    return _decode_pictures(frames, 0.0, rule)


def _decode_pictures(frames: Frames, source_fps: float, rule: DecodeRule) -> DecodedClip:
    """Cut whole decoded pictures to the rule."""
    indices, fps = choose_frames(len(frames), source_fps, rule) if source_fps else (np.zeros(1, np.int64), 0.0)
    size = (frames.shape[1], frames.shape[2])
    bucket = choose_bucket(size, rule.buckets)
    clip = centre_crop(resize_cover(frames[indices], *bucket), *bucket)
    return DecodedClip(clip, fps, bucket, size, len(frames), source_fps)


def _decode_video(data: bytes, rule: DecodeRule) -> DecodedClip:
    import io

    decord = _import_decord()
    _refuse_wrong_frame_containers(data)
    try:
        probe = decord.VideoReader(io.BytesIO(data), num_threads=1)
        num_frames, source_fps = len(probe), float(probe.get_avg_fps())
        if num_frames == 0 or not 0 < source_fps < 1000:
            raise DecodeError(f"header says {num_frames} frames at {source_fps} frames per second")
        # the first frame, not the header, knows about rotation
        height, width = probe[0].shape[:2]
        del probe
        bucket = choose_bucket((height, width), rule.buckets)
        cover_height, cover_width = cover_size((height, width), bucket)
        indices, fps = choose_frames(num_frames, source_fps, rule)
        reader = decord.VideoReader(io.BytesIO(data), width=cover_width, height=cover_height, num_threads=1)
        frames = reader.get_batch(indices).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError, ValueError) as error:
        raise DecodeError(f"decord: {_printable(str(error))[:_MAX_REASON_CHARS]}") from error
    if frames.shape != (len(indices), cover_height, cover_width, 3):
        raise DecodeError(
            f"decord gave frames {frames.shape} where {(len(indices), cover_height, cover_width, 3)} were asked for"
        )
    return DecodedClip(centre_crop(frames, *bucket), fps, bucket, (height, width), num_frames, source_fps)


def _import_decord() -> ModuleType:
    """Load decord.

    Raises:
        ConfigError: it is missing, or a library of it is; that is no fault of the clip at hand.
    """
    try:
        import decord
    # ctypes raises OSError, and decord itself RuntimeError, for a library that is not there
    except (ImportError, OSError, RuntimeError) as error:
        raise _broken_decord(f"{type(error).__name__}: {error}") from error
    module: ModuleType = decord
    return module


def require_decord() -> None:
    """Check, in a process of its own, that decord can be imported: a broken library may kill who loads it.

    Raises:
        ConfigError: it cannot, with what the process said.
    """
    command = [sys.executable, "-c", "import decord"]
    found = subprocess.run(command, env=_child_environment(), capture_output=True, check=False)
    if found.returncode:
        raise _broken_decord(_with_tail(_exit_reason(found.returncode), found.stderr))


def _broken_decord(reason: str) -> ConfigError:
    return ConfigError(
        f"decord cannot be imported ({reason}), and it decodes all video; install it on every node, as pyproject.toml "
        "names it."
    )


def _refuse_wrong_frame_containers(data: bytes) -> None:
    """Stop at containers from which decord 0.6 was seen to return other frames than asked, with no error."""
    name = _WRONG_FRAME_MAGIC.get(data[:4])
    if len(data) > 188 and data[0] == 0x47 and data[188] == 0x47:
        name = "MPEG transport stream"
    if name:
        raise DecodeError(f"container is {name}, from which decord returns wrong frames; remux it to mp4 or mkv")


def _printable(text: str) -> str:
    """One line of printable characters, without what differs from run to run.

    decord's messages carry the time of day and its build's source path, and end in raw bytes of the file; FFmpeg's
    carry addresses.
    """
    line = _ADDRESS.sub("", _SOURCE_LINE.sub("", " ".join(text.split())))
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in line)


class DecoderPool:
    """Child processes that decode; a child that hangs or dies costs its own clip and is replaced.

    Constructing starts nothing; children start with the first clips. Use as a context manager, or call `close()`.

    Args:
        num_processes: children.
        timeout_s: a clip that takes longer has its child killed.
        rule: how clips are cut.
    """

    def __init__(self, num_processes: int, timeout_s: float, rule: DecodeRule) -> None:
        self._num_processes = num_processes
        self._timeout_s = timeout_s
        self._rule = rule
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        self._executor: ThreadPoolExecutor | None = None

    def __enter__(self) -> "DecoderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode_all(self, clips: Iterable[tuple[bytes, str]]) -> Iterator[DecodedClip | DecodeError]:
        """Decode (bytes, kind) pairs in order, a few ahead of the reader; yields a clip, or its error, for each.

        Raises:
            ConfigError: decord is missing or broken on this machine.
        """
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self._num_processes, thread_name_prefix="decode")
            for _ in range(self._num_processes):
                self._idle.put(_Child(self._timeout_s, self._rule))
        ahead: list[Future[DecodedClip | DecodeError]] = []
        for data, kind in clips:
            ahead.append(self._executor.submit(self._decode_one, data, kind))
            if len(ahead) > self._num_processes:
                yield ahead.pop(0).result()
        for future in ahead:
            yield future.result()

    def decode(self, data: bytes, kind: str) -> DecodedClip:
        """Decode one clip alone.

        Raises:
            DecodeError: it failed, was too slow, or killed its child.
            ConfigError: decord is missing or broken on this machine.
        """
        (result,) = self.decode_all([(data, kind)])
        if isinstance(result, DecodeError):
            raise result
        return result

    def close(self) -> None:
        """End the children."""
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            while not self._idle.empty():
                self._idle.get().stop()
            self._executor = None

    def _decode_one(self, data: bytes, kind: str) -> DecodedClip | DecodeError:
        child = self._idle.get()
        try:
            return child.decode(data, kind)
        except DecodeError as error:
            return error
        finally:
            self._idle.put(child)


class _Child:
    """One decoder process, the parent's end of its pipes, and a file that takes what it prints.

    A file, because nobody need drain it while a clip is decoded; it is emptied before each clip.
    """

    def __init__(self, timeout_s: float, rule: DecodeRule) -> None:
        self._timeout_s = timeout_s
        self._rule = rule
        self._process: subprocess.Popen[bytes] | None = None
        self._printed: IO[bytes] | None = None

    def decode(self, data: bytes, kind: str) -> DecodedClip:
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        self._forget_printed()
        was_killed = threading.Event()

        def kill() -> None:
            was_killed.set()
            process.kill()

        timer = threading.Timer(self._timeout_s, kill)
        timer.start()
        try:
            _send(process.stdin, {"kind": kind, "size": len(data), "timeout_s": self._timeout_s}, data)
            reply, payload = _receive(process.stdout)
        except (BrokenPipeError, EOFError) as error:
            timer.cancel()
            reason = self._await_end(process)
            if was_killed.is_set():
                raise DecodeError(f"decoder was killed after timeout_s={self._timeout_s:g}") from error
            raise DecodeError(f"decoder died: {reason}") from error
        finally:
            timer.cancel()
        if was_killed.is_set():
            self.stop()
        if "broken_install" in reply:
            raise ConfigError(reply["broken_install"])
        if "error" in reply:
            raise DecodeError(reply["error"])
        return DecodedClip(
            frames=np.frombuffer(payload, dtype=np.uint8).reshape(reply["shape"]),
            fps=reply["fps"],
            bucket=tuple(reply["bucket"]),
            source_size=tuple(reply["source_size"]),
            source_num_frames=reply["source_num_frames"],
            source_fps=reply["source_fps"],
        )

    def _start(self) -> "subprocess.Popen[bytes]":
        self._printed = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (lives as long as the child)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "data_pipeline.decode", json.dumps(asdict(self._rule))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._printed, env=_child_environment(),
        )  # fmt: skip
        return self._process

    def _forget_printed(self) -> None:
        """Empty the file; the child shares its offset, so that what it prints next stands at the start."""
        assert self._printed is not None
        self._printed.seek(0)
        self._printed.truncate()

    def _await_end(self, process: "subprocess.Popen[bytes]") -> str:
        """Let a process that closed its pipe end, and say how it did and what it printed last.

        To kill it at once would make every death a SIGKILL: the pipe closes before the process has its exit code.
        """
        assert self._printed is not None
        try:
            reason = _exit_reason(process.wait(_EXIT_GRACE_S))
        except subprocess.TimeoutExpired:
            reason = f"it closed its pipe, ran on for {_EXIT_GRACE_S:g} s, and was killed"
        size, most = os.fstat(self._printed.fileno()).st_size, 8 * _MAX_TAIL_CHARS
        tail = os.pread(self._printed.fileno(), most, max(0, size - most))
        self.stop()
        return _with_tail(reason, tail)

    def stop(self) -> None:
        """Kill the process, if any, and wait for it; the next clip starts a fresh one."""
        if self._process is None:
            return
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout, self._printed):
            if pipe is not None:
                # what was still unsent belonged to the clip that is given up
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()
        self._process = self._printed = None


def _child_environment() -> dict[str, str]:
    # a Ray worker's path is set inside the process, so the child is told it
    path = os.pathsep.join(filter(None, sys.path))
    # tracebacks without underlines: their room is scarce
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONNODEBUGRANGES": "1"}


def _with_tail(reason: str, printed: bytes) -> str:
    """A reason with the end of what the process printed, if it printed anything."""
    tail = _printable(printed.decode("utf-8", "replace"))[-_MAX_TAIL_CHARS:]
    return f"{reason}: {tail}" if tail else reason


def _exit_reason(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code} ({signal.Signals(-code).name})"
    return f"exit code {code}"


def _send(pipe: IO[bytes], header: dict[str, Any], payload: bytes) -> None:
    text = json.dumps(header).encode()
    pipe.write(struct.pack(">QQ", len(text), len(payload)) + text)
    pipe.write(payload)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    text_size, payload_size = struct.unpack(">QQ", _read_exactly(pipe, 16))
    return json.loads(_read_exactly(pipe, text_size)), _read_exactly(pipe, payload_size)


def _read_exactly(pipe: IO[bytes], size: int) -> bytes:
    data = pipe.read(size)
    if len(data) != size:
        raise EOFError(f"pipe closed after {len(data)} of {size} bytes")
    return data


def serve(rule: DecodeRule, requests: IO[bytes], replies: IO[bytes]) -> None:
    """Child side: answer decode requests until the pipe closes."""
    while True:
        try:
            header, data = _receive(requests)
        except EOFError:
            return
        # the kernel ends a hung decoder even when the parent is gone: SIGALRM's default action needs no Python
        signal.setitimer(signal.ITIMER_REAL, header["timeout_s"] + _REPLY_GRACE_S)
        try:
            clip = decode_clip(data, header["kind"], rule)
        except DecodeError as error:
            reply, payload = {"error": str(error)}, b""
        except ConfigError as error:
            reply, payload = {"broken_install": str(error)}, b""
        else:
            reply, payload = _describe(clip), clip.frames.tobytes()
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(replies, reply, payload)


def _describe(clip: DecodedClip) -> dict[str, Any]:
    return {
        "shape": clip.frames.shape,
        "fps": clip.fps,
        "bucket": clip.bucket,
        "source_size": clip.source_size,
        "source_num_frames": clip.source_num_frames,
        "source_fps": clip.source_fps,
    }


def _child_main() -> None:
    # decoders print to stdout too: the replies get a private descriptor, and theirs goes where stderr goes
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    values = json.loads(sys.argv[1])
    rule = DecodeRule(tuple(tuple(size) for size in values["buckets"]), values["num_frames"], values["fps"])
    serve(rule, sys.stdin.buffer, replies)


if __name__ == "__main__":
    _child_main()
