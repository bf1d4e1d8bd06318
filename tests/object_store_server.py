"""A local S3 server for tests, that can be made to fail for a while."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from m4v_dist import storage

Application = Callable[[dict[str, Any], Callable[..., Any]], Any]


class Outage:
    """Answers 503 while `is_down`, or for a while from the first request whose path has a word in it.

    `began` is the UNIX time of that request, `num_refused` counts since then.
    """

    def __init__(self, application: Application) -> None:
        self._application = application
        self.is_down = False
        self.num_refused = 0
        self.began: float | None = None
        self._trigger: tuple[str, float] | None = None
        self._until = 0.0
        self._min_refused = 0

    def begin_at(self, word: str, seconds: float, min_refused: int) -> None:
        """Fail from the next request on whose path holds `word`, for that time and as many requests at least."""
        self._trigger, self._min_refused = (word, seconds), min_refused
        self.num_refused, self.began = 0, None

    def __call__(self, environment: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if self._trigger is not None and self._trigger[0] in environment["PATH_INFO"]:
            self._until, self._trigger = time.monotonic() + self._trigger[1], None
            self.began = time.time()
        is_over = time.monotonic() > self._until and not 0 < self.num_refused < self._min_refused
        if not self.is_down and is_over:
            return self._application(environment, start_response)
        self.num_refused += 1
        start_response("503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"down"]


@contextmanager
def object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Outage]]:
    """A bucket of a server on the loopback, in this process's environment, and the switch of its outage."""
    outage = Outage(_moto())
    with _serving(outage, monkeypatch) as bucket:
        try:
            yield bucket, outage
        finally:
            outage.is_down = False


def _moto() -> Application:
    # Here, not above: a GPU host that runs the gpu tests alone has no moto to collect the tests with.
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

    return DomainDispatcherApplication(create_backend_app)  # type: ignore[no-any-return]


@contextmanager
def _serving(application: Application, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in store_environment(server.server_port).items():
        monkeypatch.setenv(name, value)
    storage._s3().clear_instance_cache()
    # moto keeps its buckets in the process, from one server to the next
    storage._s3().mkdir(f"bucket-{server.server_port}")
    try:
        yield f"s3://bucket-{server.server_port}"
    finally:
        storage._s3().clear_instance_cache()
        server.shutdown()
        thread.join()
        server.server_close()


class Faults:
    """Spoils the answers to some reads; `requests` are the methods and paths of all that came.

    A fault is what an application is wrapped in: `fail`, `stall`, `cut`, `cut_honestly`, or a function of the same
    kind.
    """

    def __init__(self, application: Application) -> None:
        self._application = application
        self._lock = threading.Lock()
        self._word, self._planned = "", list[Callable[[Application], Application]]()
        self.requests: list[str] = []
        self.num_spoilt = 0

    def plan(self, word: str, faults: Iterable[Callable[[Application], Application]]) -> None:
        """Spoil as many of the next reads whose path holds `word`, one fault each."""
        self._word, self._planned = word, list(faults)

    def __call__(self, environment: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        application = self._application
        with self._lock:
            self.requests.append(f"{environment['REQUEST_METHOD']} {environment['PATH_INFO']}")
            if self._planned and environment["REQUEST_METHOD"] == "GET" and self._word in environment["PATH_INFO"]:
                application = self._planned.pop(0)(application)
                self.num_spoilt += 1
        return application(environment, start_response)


def fail(application: Application) -> Application:
    """Answer 500."""

    def answer(environment: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
        return [b"a bad moment"]

    return answer


def stall(seconds: float) -> Callable[[Application], Application]:
    """Answer late."""

    def wrap(application: Application) -> Application:
        def answer(environment: dict[str, Any], start_response: Callable[..., Any]) -> Any:
            time.sleep(seconds)
            return application(environment, start_response)

        return answer

    return wrap


def cut(application: Application) -> Application:
    """Break off in the middle of the body, as when a connection is lost."""
    return _cut(application, is_honest=False)


def cut_honestly(application: Application) -> Application:
    """Give half of the body and call it the whole, as a broken proxy may."""
    return _cut(application, is_honest=True)


def _cut(application: Application, *, is_honest: bool) -> Application:
    def answer(environment: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        answered: list[Any] = []
        body = b"".join(application(environment, lambda *values: answered.extend(values)))
        status, headers = answered[0], list(answered[1])
        half = body[: len(body) // 2]
        if is_honest:
            headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
            headers.append(("Content-Length", str(len(half))))
        start_response(status, headers)
        return [half]

    return answer


@contextmanager
def faulty_object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Faults]]:
    """As `object_store`, with faults to be planned."""
    faults = Faults(_moto())
    with _serving(faults, monkeypatch) as bucket:
        yield bucket, faults


_STORE_PROCESS = """
import sys
from pathlib import Path
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import make_server
folder, port = Path(sys.argv[1]), int(sys.argv[2])
backend = s3_backends["123456789012"]["aws"]
backend.create_bucket("bucket", "us-east-1")
for path in folder.rglob("*"):
    if path.is_file():
        backend.put_object("bucket", str(path.relative_to(folder)), path.read_bytes())
server = make_server("127.0.0.1", port, DomainDispatcherApplication(create_backend_app), threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""


class StoreProcess:
    """A server in a process of its own whose bucket, `s3://bucket`, holds the files of a folder from the start.

    Args:
        folder: the files.

    Attributes:
        port: that it listens at, the same after each restart.
    """

    def __init__(self, folder: str) -> None:
        self._folder, self.port = folder, 0
        self.start()

    def start(self) -> None:
        """Start it; returns once it listens."""
        command = [sys.executable, "-c", _STORE_PROCESS, self._folder, str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def kill(self) -> None:
        """Kill it as a crash would."""
        self._process.kill()
        self._process.communicate()


def store_environment(port: int) -> dict[str, str]:
    """What a process needs to ask the server."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "an-access-key-id",
        "AWS_SECRET_ACCESS_KEY": "a-secret-access-key",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
