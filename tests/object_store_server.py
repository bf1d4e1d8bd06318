"""A local S3 server for tests, that can be made to fail for a while."""

import threading
import time
from collections.abc import Callable, Iterator
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
    # Here, not above: a GPU host that runs the gpu tests alone has no moto to collect the tests with.
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    outage = Outage(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, outage, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in store_environment(server.server_port).items():
        monkeypatch.setenv(name, value)
    storage._s3().clear_instance_cache()
    # moto keeps its buckets in the process, from one server to the next
    storage._s3().mkdir(f"bucket-{server.server_port}")
    try:
        yield f"s3://bucket-{server.server_port}", outage
    finally:
        outage.is_down = False
        storage._s3().clear_instance_cache()
        server.shutdown()
        thread.join()
        server.server_close()


def store_environment(port: int) -> dict[str, str]:
    """What a process needs to ask the server."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "an-access-key-id",
        "AWS_SECRET_ACCESS_KEY": "a-secret-access-key",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
