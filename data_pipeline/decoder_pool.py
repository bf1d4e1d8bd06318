"""Decoding in child processes that may hang or die alone.

`ChildPool` belongs to the caller's process; each of its children runs `decoder_child.py` as `python -m` and speaks
length-prefixed messages over its pipes. A plain subprocess, because multiprocessing's spawn would import a Ray worker's
main module again; it starts in about 0.3 s, without torch. `DecoderPool` is such a pool that cuts clips.
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import IO, Any, Self

import numpy as np

from data_pipeline.decode import DecodedClip, DecodeError, DecodeRule, Span, printable
from data_pipeline.decode_decord import broken_decord
from data_pipeline.decoder_child import Answer, receive, send
from m4v_dist.errors import ConfigError

_MAX_TAIL_CHARS = 500
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


class ChildPool:
    """Child processes that work on media; one that hangs or dies costs its own item and is replaced.

    Constructing starts nothing; children start with the first items. Use as a context manager, or call `close()`.

    Args:
        num_processes: children.
        timeout_s: an item that takes longer has its child killed.
    """

    def __init__(self, num_processes: int, timeout_s: float) -> None:
        self._num_processes = num_processes
        self._timeout_s = timeout_s
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        self._executor: ThreadPoolExecutor | None = None
        self._busy_s: list[float] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run_all(self, verb: str, items: Iterable[tuple[bytes, dict[str, Any]]]) -> Iterator[Answer | DecodeError]:
        """Have a verb of `decoder_child.VERBS` done, in order, a few items ahead of the reader.

        Args:
            verb: what to do.
            items: media bytes, and the settings that the verb takes (JSON).

        Yields:
            the reply and payload of each item, or its error.

        Raises:
            ConfigError: a decoder is missing or broken on this machine.
        """
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self._num_processes, thread_name_prefix="decode")
            for _ in range(self._num_processes):
                self._idle.put(_Child(self._timeout_s))
        ahead: list[Future[Answer | DecodeError]] = []
        for data, settings in items:
            ahead.append(self._executor.submit(self._run_one, verb, data, settings))
            if len(ahead) > self._num_processes:
                yield ahead.pop(0).result()
        for future in ahead:
            yield future.result()

    def close(self) -> None:
        """End the children."""
        if self._executor is not None:
            self._executor.shutdown(wait=True)
            while not self._idle.empty():
                self._idle.get().stop()
            self._executor = None

    def _run_one(self, verb: str, data: bytes, settings: dict[str, Any]) -> Answer | DecodeError:
        child = self._idle.get()
        started = time.monotonic()
        try:
            return child.run(verb, data, settings)
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


class DecoderPool(ChildPool):
    """A pool that decodes clips by one rule.

    Args:
        num_processes: children.
        timeout_s: a clip that takes longer has its child killed.
        rule: how clips are cut.
    """

    def __init__(self, num_processes: int, timeout_s: float, rule: DecodeRule) -> None:
        super().__init__(num_processes, timeout_s)
        self._rule = asdict(rule)

    def decode_all(self, clips: Iterable[tuple[bytes, str, Span | None]]) -> Iterator[DecodedClip | DecodeError]:
        """Decode (bytes, kind, span) in order, a few ahead of the reader; yields a clip, or its error, for each.

        Raises:
            ConfigError: decord is missing or broken on this machine.
        """
        items = ((data, {"kind": kind, "span": span, "rule": self._rule}) for data, kind, span in clips)
        for answer in self.run_all("decode", items):
            yield answer if isinstance(answer, DecodeError) else _clip(*answer)

    def decode(
        self, data: bytes, kind: str, span: Span | None = None, *, rule: DecodeRule | None = None
    ) -> DecodedClip:
        """Decode one clip alone, by another rule if one is given.

        Raises:
            DecodeError: it failed, was too slow, or killed its child.
            ConfigError: decord is missing or broken on this machine.
        """
        settings = {"kind": kind, "span": span, "rule": self._rule if rule is None else asdict(rule)}
        (answer,) = self.run_all("decode", [(data, settings)])
        if isinstance(answer, DecodeError):
            raise answer
        return _clip(*answer)


def _clip(reply: dict[str, Any], payload: bytes) -> DecodedClip:
    return DecodedClip(
        frames=np.frombuffer(payload, dtype=np.uint8).reshape(reply["shape"]),
        fps=reply["fps"],
        bucket=tuple(reply["bucket"]),
        source_size=tuple(reply["source_size"]),
        source_num_frames=reply["source_num_frames"],
        source_fps=reply["source_fps"],
        decoder=reply["decoder"],
    )


class _Child:
    """One decoder process, the parent's end of its pipes, and a file that takes what it prints.

    A file, because nobody need drain it while an item is worked on; it is emptied before each.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._printed: IO[bytes] | None = None

    def run(self, verb: str, data: bytes, settings: dict[str, Any]) -> Answer:
        """Have one item done.

        Raises:
            DecodeError: the verb failed, was too slow, or killed the process.
            ConfigError: a decoder is missing or broken on this machine.
        """
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
            send(process.stdin, {"verb": verb, "settings": settings, "timeout_s": self._timeout_s}, data)
            reply, payload = receive(process.stdout)
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
        return reply, payload

    def _start(self) -> "subprocess.Popen[bytes]":
        self._printed = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (lives as long as the child)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "data_pipeline.decoder_child"],
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
