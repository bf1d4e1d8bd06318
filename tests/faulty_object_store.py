"""S3 servers for tests that fail as real ones do: errors, silence, bodies that break off, a front that is killed."""

import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from m4v_dist import object_store as client
from m4v_dist import storage
from tests.object_store_server import Application, object_store, store_environment
from tests.trainer.ranks import ROOT


class Faults:
    """Lets some requests fail, drawn by their number: 500, half a body, or no answer for a while.

    `num` counts what was done.

    Args:
        application: what answers the others.
        error_fraction, cut_fraction: of all requests; of all reads of objects.
        silent: numbers of the requests that are answered late.
        silence_s: how late.
    """

    def __init__(
        self,
        application: Application,
        *,
        error_fraction: float = 0.0,
        cut_fraction: float = 0.0,
        silent: tuple[int, ...] = (),
        silence_s: float = 0.0,
    ) -> None:
        self._application = application
        self._error_fraction, self._cut_fraction = error_fraction, cut_fraction
        self._silent, self._silence_s = silent, silence_s
        self._lock = threading.Lock()
        self.num: Counter[str] = Counter()

    def __call__(self, environment: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        with self._lock:
            self.num["requests"] += 1
            number = self.num["requests"]
        draw = random.Random(number).random()
        if number in self._silent:
            self.num["silences"] += 1
            time.sleep(self._silence_s)
        if draw < self._error_fraction:
            self.num["errors"] += 1
            start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
            return [b"injected"]
        answer = self._application(environment, start_response)
        if environment["REQUEST_METHOD"] == "GET" and draw > 1 - self._cut_fraction:
            self.num["cuts"] += 1
            return _half(b"".join(answer))
        return answer


def _half(body: bytes) -> Iterator[bytes]:
    """Half of what the headers announced, then a connection that is gone."""
    yield body[: len(body) // 2]
    raise ConnectionAbortedError


@contextmanager
def faulty_object_store(monkeypatch: pytest.MonkeyPatch, **faults: Any) -> Iterator[tuple[str, Faults]]:
    """A bucket of a server with `Faults`, which begin once the bucket is there; pauses are short."""
    with object_store(monkeypatch) as (bucket, outage):
        with_faults = Faults(outage._application, **faults)
        outage._application = with_faults
        with short_pauses(monkeypatch):
            yield bucket, with_faults


@contextmanager
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A client that waits a second for an answer, and little between two tries."""
    with monkeypatch.context() as patched:
        patched.setattr(client, "READ_TIMEOUT_S", 1.0)
        patched.setattr("m4v_dist.retries.FIRST_PAUSE_S", 0.05)
        storage._s3().clear_instance_cache()
        yield
    storage._s3().clear_instance_cache()


class Front:
    """A process that stands before a server, on a port of its own, and can be killed and started again there."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._process: subprocess.Popen[str] | None = None
        self.port = 0
        self.num_kills = 0

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.faulty_object_store", str(self.port), str(self._server_port)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def kill(self) -> None:
        """kill -9: connections break off where they are, new ones are refused."""
        assert self._process is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self.num_kills += 1


@contextmanager
def killable_object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Front]]:
    """A bucket behind a `Front`; what the server holds outlives the front, as a disk outlives its server."""
    with object_store(monkeypatch) as (bucket, _):
        front = Front(int(bucket.rsplit("-", 1)[-1]))
        front.start()
        for name, value in store_environment(front.port).items():
            monkeypatch.setenv(name, value)
        try:
            with short_pauses(monkeypatch):
                yield bucket, front
        finally:
            front.kill()


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        source.close()
        target.close()


def main() -> None:
    """`PORT SERVER_PORT`: hand bytes on; prints the port, which 0 leaves to the system."""
    port, server_port = int(sys.argv[1]), int(sys.argv[2])
    with socket.create_server(("127.0.0.1", port)) as listening:
        print(listening.getsockname()[1], flush=True)
        while True:
            client_side, _ = listening.accept()
            server_side = socket.create_connection(("127.0.0.1", server_port))
            for pair in ((client_side, server_side), (server_side, client_side)):
                threading.Thread(target=_pump, args=pair, daemon=True).start()


if __name__ == "__main__":
    main()
