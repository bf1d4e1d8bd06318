"""The snapshot that a save is made from: a rank's ranges at one moment, in host memory that is kept for the next one.

Copies from a GPU run at full speed into pinned memory only (51 GiB/s, seen on an H200's host). torch's own allocator
of it rounds up to a power of two, so 33 GiB would take 64, and while it asks the driver for pages no kernel starts: a
2B model's first save held training up for 35 s, seen. So the pages are touched by threads beside training, which ask no
driver, and only then registered with it, in one piece, since a copy must not cross two.
"""

import logging
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m4v_dist.trainer.random_state import random_state
from m4v_dist.trainer.ranges import Ranges

logger = logging.getLogger(__name__)

TOUCH_THREADS = 4


@dataclass(frozen=True)
class Snapshot:
    """A rank's ranges at one moment, in host memory.

    Args:
        parts: key to its (first element, length), in the order of `values`.
        num_elements: key to the size of the whole tensor, also of those that this rank owns nothing of.
        values: all of them, 1-d float32.
        random: the rank's random state.
    """

    parts: Mapping[str, list[tuple[int, int]]]
    num_elements: Mapping[str, int]
    values: Tensor
    random: Mapping[str, str]


class SnapshotBuffer:
    """Host memory for one snapshot, kept from one to the next; pinned where the ranges are on a GPU."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)
        self._touching: threading.Thread | None = None
        self._unpin: weakref.finalize[..., Any] | None = None
        self._is_asked = False

    def reserve(self, tensors: Mapping[str, Ranges]) -> None:
        """Get the memory that a snapshot of `tensors` will take; on a GPU host most of it comes in threads, meanwhile.

        Args:
            tensors: see `take`.
        """
        size = sum(len(values) for ranges in tensors.values() for _, values in ranges.parts)
        if self._buffer.numel() >= size:
            return
        self._give_back()
        self._buffer = torch.empty(size)
        if _has_gpu(tensors):
            self._touching = threading.Thread(target=_touch, args=(self._buffer,), name="snapshot", daemon=True)
            self._touching.start()

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Ranges]) -> Snapshot:
        """Copy `tensors`; the snapshot before this one is overwritten.

        Args:
            tensors: keyed `<kind>/<parameter>`, the same keys on every rank; float32.
        """
        self.reserve(tensors)
        has_gpu = _has_gpu(tensors)
        if has_gpu:
            self._pin()
        parts: dict[str, list[tuple[int, int]]] = {}
        at = 0
        for key, ranges in tensors.items():
            for start, values in ranges.parts:
                assert values.dtype == torch.float32, f"{key}: {values.dtype} in a checkpoint of float32"
                self._buffer[at : at + len(values)].copy_(values, non_blocking=has_gpu)
                parts.setdefault(key, []).append((start, len(values)))
                at += len(values)
        if has_gpu:
            # Before the next step moves the weights.
            torch.cuda.synchronize()
        num_elements = {key: ranges.num_elements for key, ranges in tensors.items()}
        return Snapshot(parts, num_elements, self._buffer[:at], random_state())

    def _pin(self) -> None:
        """Register the pages with the driver, once."""
        if self._touching is not None:
            self._touching.join()
            self._touching = None
        if self._is_asked or not self._buffer.numel():
            return
        self._is_asked = True
        runtime = torch.cuda.cudart()
        answer = int(runtime.cudaHostRegister(self._buffer.data_ptr(), self._buffer.nbytes, 0))
        if answer != 0:
            logger.warning(
                "%.2f GiB of host memory for snapshots could not be pinned (CUDA error %d), so each save will hold "
                "training up for longer; raise the limit of locked memory (ulimit -l).",
                self._buffer.nbytes / 2**30, answer,
            )  # fmt: skip
            return
        # It holds the tensor: memory must not go before the driver has let go of it.
        self._unpin = weakref.finalize(self, _unregister, self._buffer)

    def _give_back(self) -> None:
        """First, where more is needed: a machine may hold one snapshot and not two."""
        if self._touching is not None:
            self._touching.join()
            self._touching = None
        if self._unpin is not None:
            self._unpin()
        self._unpin, self._is_asked = None, False
        self._buffer = torch.empty(0)


def _has_gpu(tensors: Mapping[str, Ranges]) -> bool:
    return any(values.is_cuda for ranges in tensors.values() for _, values in ranges.parts)


def _touch(buffer: Tensor) -> None:
    with ThreadPoolExecutor(TOUCH_THREADS, thread_name_prefix="touch") as pool:
        list(pool.map(Tensor.zero_, buffer.chunk(TOUCH_THREADS)))


def _unregister(buffer: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
