"""What each rank measures of a step, gathered by the sum over ranks that every step makes anyway.

Ranks wait for one another, so the time of a whole step is about the same on each and tells nothing of who was late.
What differs is a rank's own work: forward and backward until it hands in its gradients. Under ZeRO 3 a forward gathers
weights and so waits too; there the spread shows less than there is.
"""

import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m4v_dist.config.gpus import peak_of
from m4v_dist.trainer.memory import GIB, host_rss_gib
from m4v_dist.trainer.seams import BatchFlops, StepBatch

logger = logging.getLogger(__name__)


class Measured(NamedTuple):
    """One rank's numbers of one step.

    Args:
        data_s: waiting for its data.
        work_s: its own forward and backward.
        reserved_gib: the most that torch has reserved on the GPU so far; 0 on the CPU.
        host_rss_gib: resident memory of the process.
        model_flops: of its slots, or its part of those that it shares, forward and backward without what is computed
            again.
        hardware_flops: the same with recompute, and with the filler slots.
    """

    data_s: float
    work_s: float
    reserved_gib: float
    host_rss_gib: float
    model_flops: float
    hardware_flops: float

    def placed(self, rank: int, world_size: int) -> Tensor:
        """[world_size * fields] float64, zero but for this rank's: summed over ranks they are all ranks' numbers."""
        whole = torch.zeros(world_size, len(self), dtype=torch.float64)
        whole[rank] = torch.tensor(self, dtype=torch.float64)
        return whole.view(-1)

    @classmethod
    def of_sum(cls, values: Sequence[float]) -> "tuple[Measured, ...]":
        """Each rank's numbers, from that sum."""
        size = len(cls._fields)
        return tuple(cls(*values[start : start + size]) for start in range(0, len(values), size))


def spread_row(ranks: Sequence[Measured]) -> dict[str, float]:
    """Slowest and fastest rank, and the largest memory, as metrics; that of a GPU is absent where there is none."""
    row = {
        "timing/step_s_max": max(rank.work_s for rank in ranks),
        "timing/step_s_min": min(rank.work_s for rank in ranks),
        "timing/data_s_max": max(rank.data_s for rank in ranks),
        "memory/host_rss_gib": max(rank.host_rss_gib for rank in ranks),
    }
    reserved = max(rank.reserved_gib for rank in ranks)
    return row | ({"memory/max_reserved_gib": reserved} if reserved else {})


def utilization_row(ranks: Sequence[Measured], *, seconds: float, peak_tflops: float | None) -> dict[str, float]:
    """Share of the GPUs' peak: `perf/mfu` of what the model needs, `perf/hfu` of all that was computed.

    Args:
        ranks: of the step.
        seconds: that it took, waiting for data included.
        peak_tflops: of one GPU; None (no GPU, or its peak is not known) leaves both out.
    """
    model, hardware = sum(rank.model_flops for rank in ranks), sum(rank.hardware_flops for rank in ranks)
    if peak_tflops is None or not hardware:
        return {}
    capacity = seconds * len(ranks) * peak_tflops * 1e12
    return {"perf/mfu": model / capacity, "perf/hfu": hardware / capacity}


def gpu_peak_tflops(device: torch.device, given: float | None) -> float | None:
    """Peak of this rank's GPU in 1e12 FLOP/s; None on the CPU, and for a GPU that is neither listed nor given.

    Args:
        device: of the rank.
        given: launch.gpu_peak_tflops.
    """
    if device.type != "cuda":
        return None
    if given is not None:
        return given
    name = torch.cuda.get_device_name(device)
    found = peak_of(name)
    if found is None:
        logger.warning("%s: peak not known, so no perf/mfu; set launch.gpu_peak_tflops to have it.", name)
    return found


class StepMeter:
    """Takes one rank's numbers of each step in turn.

    Args:
        device: where the rank computes.
        batch_flops: counts a micro-batch.
        sequence_size: ranks that compute it together, each as much of it as the others.
    """

    def __init__(self, device: torch.device, batch_flops: BatchFlops, sequence_size: int = 1) -> None:
        self._device, self._batch_flops, self._sequence_size = device, batch_flops, sequence_size
        self._marks: list[torch.cuda.Event | float] = []

    def begin(self) -> None:
        """The rank's own work begins."""
        self._marks = [self._mark()]

    def end(self) -> None:
        """It is all handed to the device; nothing waits for it."""
        self._marks.append(self._mark())

    def measured(self, batch: StepBatch, freeze: tuple[str, ...], *, data_s: float) -> Measured:
        """The numbers of the step; waits until the device has done the work.

        Args:
            batch: that was trained on.
            freeze: what did not train.
            data_s: seconds until the batch was there.
        """
        flops = [self._batch_flops(micro_batch, freeze) for micro_batch in batch.micro_batches]
        cuda = self._device.type == "cuda"
        return Measured(
            data_s=data_s,
            work_s=self._work_s(),
            reserved_gib=torch.cuda.max_memory_reserved(self._device) / GIB if cuda else 0.0,
            host_rss_gib=host_rss_gib(),
            model_flops=sum(needed for needed, _ in flops) / self._sequence_size,
            hardware_flops=sum(computed for _, computed in flops) / self._sequence_size,
        )

    def _mark(self) -> "torch.cuda.Event | float":
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _work_s(self) -> float:
        first, last = self._marks
        if isinstance(first, float) or isinstance(last, float):
            return float(last) - float(first)  # type: ignore[arg-type]
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3
