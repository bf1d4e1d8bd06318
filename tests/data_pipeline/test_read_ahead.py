"""Reading ahead: in order, within its bytes, a huge item alone, errors in their place, and an end when unwanted."""

import threading
from collections.abc import Iterator

import pytest

from data_pipeline.read_ahead import ReadAhead

WAIT_S = 60.0


def test_items_come_in_order_and_never_more_bytes_are_out_than_allowed() -> None:
    sizes = [3, 4, 2, 9, 30, 1, 1, 8, 10, 10, 2] * 20
    taken: list[bytes] = []
    with ReadAhead(iter([bytes(size) for size in sizes]), len, max_bytes=10) as ahead:
        for item in ahead:
            with ahead._changed:
                # the item that is larger than the budget is out alone
                assert ahead._out_bytes <= 10 or ahead._out_bytes == len(item) == 30
            taken.append(item)
            ahead.release(item)
    assert [len(item) for item in taken] == sizes


def test_the_reader_stops_at_its_budget_until_something_is_released() -> None:
    num_read, has_read_two = 0, threading.Event()

    def items() -> Iterator[bytes]:
        nonlocal num_read
        for _ in range(5):
            num_read += 1
            if num_read == 3:
                has_read_two.set()
            yield bytes(6)

    with ReadAhead(items(), len, max_bytes=12) as ahead:
        assert has_read_two.wait(WAIT_S)
        taken = iter(ahead)
        held = [next(taken), next(taken)]
        # two are out, the third was read and waits; the fourth is not asked for
        assert num_read == 3 and not ahead._ready
        ahead.release(held[0])
        assert len(next(taken)) == 6


def test_an_error_comes_after_what_was_read_before_it() -> None:
    def items() -> Iterator[bytes]:
        yield b"one"
        raise OSError("read timed out")

    with ReadAhead(items(), len, max_bytes=100) as ahead:
        taken = iter(ahead)
        assert next(taken) == b"one"
        with pytest.raises(OSError, match="read timed out"):
            next(taken)


def test_a_reader_that_nobody_wants_any_more_ends() -> None:
    with pytest.raises(ValueError, match="gave up"), ReadAhead(iter([b"x"] * 1000), len, max_bytes=2) as ahead:
        next(iter(ahead))
        raise ValueError("gave up")
    assert not ahead._thread.is_alive()
