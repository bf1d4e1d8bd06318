"""Decoding in child processes that may hang or die alone.

`DecoderPool` belongs to the caller's process; each of its children runs this file as `python -m
data_pipeline.decoder_pool` and speaks length-prefixed messages over its pipes. A plain subprocess, because
multiprocessing's spawn would import a Ray worker's main module again; it starts in about 0.3 s, without torch.
"""

import contextlib
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import IO, Any

import numpy as np

from data_pipeline.decode import DecodedClip, DecodeError, DecodeRule, broken_decord, decode_clip, printable
from m4v_dist.errors import ConfigError

_MAX_TAIL_CHARS = 500
_REPLY_GRACE_S = 5.0
_EXIT_GRACE_S = 5.0
"""How long a child that closed its pipe may take to end by itself."""


def require_decord() -> None:
    """Check, in a process of its own, that decord can be imported: a broken library may kill who loads it.

    Raises:
        ConfigError: it cannot, with what the process said.
    """
    command = [sys.executable, "-c", "import decord"]
    found = subprocess.run(command, env=_child_environment(), capture_output=True, check=False)
    if found.returncode:
        raise broken_decord(_with_tail(_exit_reason(found.returncode), found.stderr))


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
        self._busy_s: list[float] = []

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
        started = time.monotonic()
        try:
            return child.decode(data, kind)
        except DecodeError as error:
            return error
        finally:
            # append is atomic, += of several threads is not
            self._busy_s.append(time.monotonic() - started)
            self._idle.put(child)

    def take_busy_s(self) -> float:
        """Seconds that the children worked since the last call, summed over them."""
        busy, self._busy_s = self._busy_s, []
        return sum(busy)


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
            [sys.executable, "-m", "data_pipeline.decoder_pool", json.dumps(asdict(self._rule))],
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
    tail = printable(printed.decode("utf-8", "replace"))[-_MAX_TAIL_CHARS:]
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
