"""Reading ahead of the work, in a thread of its own and within a budget of bytes."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class ReadAhead(Generic[Item]):
    """Items of an iterator that a thread runs, as far ahead as a budget of bytes lets it; a context manager.

    An item counts from when it was read until `release`. One that would pass the budget waits until there is room; one
    that is larger than all of it waits until nothing else is out, and passes alone. While it waits it is held too, so
    at most `max_bytes` and one item are in memory, or the two largest items if that is more.

    Args:
        items: run in the thread, from entering on.
        size_of: of an item, in bytes.
        max_bytes: of all items that are out together, > 0.

    Attributes:
        read_s: seconds that the iterator took so far.
    """

    def __init__(self, items: Iterator[Item], size_of: Callable[[Item], int], max_bytes: int) -> None:
        self._items, self._size_of, self._max_bytes = items, size_of, max_bytes
        self._ready: deque[Item] = deque()
        self._out_bytes = 0
        self._is_unwanted = False
        self._is_over = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, name="read-ahead", daemon=True)
        self.read_s = 0.0

    def __enter__(self) -> "ReadAhead[Item]":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_unwanted = True
            self._changed.notify_all()
        self._thread.join()

    def __iter__(self) -> Iterator[Item]:
        """The items in order, each owed a `release`.

        Raises:
            BaseException: what the iterator raised, once what it gave before is taken.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._is_over)
                if not self._ready:
                    if self._error is not None:
                        raise self._error
                    return
                item = self._ready.popleft()
            yield item

    def release(self, item: Item) -> None:
        """Make room: nobody holds this item any more."""
        with self._changed:
            self._out_bytes -= self._size_of(item)
            self._changed.notify_all()

    def _read(self) -> None:
        try:
            while self._read_one():
                pass
        except BaseException as error:  # handed to the thread that works, which raises it
            self._error = error
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    def _read_one(self) -> bool:
        """Read an item and hand it over; False where there is none, or nobody wants one."""
        started = time.monotonic()
        try:
            item = next(self._items)
        except StopIteration:
            return False
        finally:
            self.read_s += time.monotonic() - started
        size = self._size_of(item)
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_unwanted or not self._out_bytes or self._out_bytes + size <= self._max_bytes
            )
            self._out_bytes += size
            self._ready.append(item)
            self._changed.notify_all()
            return not self._is_unwanted
