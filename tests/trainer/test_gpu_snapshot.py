"""The snapshot of what is on a GPU: pinned, no larger than it must be, done before the weights move on."""

import time

import pytest
import torch

from m4v_dist.trainer.memory import host_rss_gib
from m4v_dist.trainer.ranges import Ranges
from m4v_dist.trainer.snapshot import SnapshotBuffer

pytestmark = pytest.mark.gpu


def test_a_snapshot_of_gpu_memory_is_pinned_kept_and_not_what_comes_after_it() -> None:
    values = torch.arange(2.0**24, device="cuda")
    buffer = SnapshotBuffer()
    for turn in range(3):
        expected = values.cpu()
        snapshot = buffer.take({"weights/a": Ranges(len(values), ((0, values[:-5]), (len(values) - 5, values[-5:])))})
        values += 1
        assert snapshot.values.is_pinned() and torch.equal(snapshot.values, expected), turn
        assert snapshot.values.data_ptr() == buffer.take({"weights/a": Ranges(5, ((0, values[:5]),))}).values.data_ptr()


def test_a_larger_snapshot_takes_a_larger_buffer() -> None:
    buffer, values = SnapshotBuffer(), torch.arange(2.0**20, device="cuda")
    for size in (2**10, 2**20, 2**12):
        snapshot = buffer.take({"weights/a": Ranges(size, ((0, values[:size]),))})
        assert snapshot.values.is_pinned() and torch.equal(snapshot.values, values[:size].cpu())


def test_memory_is_not_rounded_up_and_comes_beside_training() -> None:
    """A little over 16 GiB: torch's allocator would take 32."""
    many = [torch.ones(2**26, device="cuda") for _ in range(65)]
    tensors = {f"weights/{number}": Ranges(len(values), ((0, values),)) for number, values in enumerate(many)}
    torch.cuda.synchronize()
    before, begun = host_rss_gib(), time.perf_counter()
    buffer = SnapshotBuffer()
    buffer.reserve(tensors)
    asked = time.perf_counter() - begun
    assert asked < 0.5
    product = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    longest, thread = 0.0, buffer._touching
    assert thread is not None
    while thread.is_alive():
        start = time.perf_counter()
        _ = product @ product
        torch.cuda.synchronize()
        longest = max(longest, time.perf_counter() - start)
    touched = time.perf_counter() - begun
    times = []
    for _ in range(3):
        start = time.perf_counter()
        snapshot = buffer.take(tensors)
        times.append(time.perf_counter() - start)
    assert snapshot.values.is_pinned() and bool((snapshot.values[-8:] == 1).all())
    print(f"\n16.25 GiB: touched in {touched:.2f} s, longest kernel beside it {longest * 1e3:.1f} ms, snapshots "
          f"{', '.join(f'{seconds:.2f}' for seconds in times)} s")  # fmt: skip
    assert host_rss_gib() - before < 18
