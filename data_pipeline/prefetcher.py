"""A thread that is a few items ahead of whoever takes them."""

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

_POLL_S = 0.2

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """A thread that runs an iterator a few items ahead and hands over its items, or its error."""

    def __init__(self, items: Iterator[Item], num_ahead: int) -> None:
        self._items = items
        self._queue: queue.Queue[Item | BaseException] = queue.Queue(num_ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loader-prefetch", daemon=True)
        self._thread.start()

    def get(self) -> Item:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self) -> None:
        """End the thread; waits for the read that is under way."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    return
        # not swallowed: whatever it is, the consumer's get() raises it
        except BaseException as error:
            self._put(error)

    def _put(self, item: Item | BaseException) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False
