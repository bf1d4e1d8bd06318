"""How long a call takes: medians of whole calls, waited for; on a GPU also as a replayed graph, and its memory."""

import statistics
import time
from collections.abc import Callable

import torch

NUM_WARM_UP, NUM_TIMED = 3, 7


def median_ms(call: Callable[[], object], device: torch.device) -> float:
    """Median of `NUM_TIMED` calls after `NUM_WARM_UP`, each from an idle device to an idle device, in ms."""

    def once() -> float:
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        return (time.perf_counter() - started) * 1e3

    return statistics.median([once() for _ in range(NUM_WARM_UP + NUM_TIMED)][NUM_WARM_UP:])


def median_graph_ms(call: Callable[[], object], device: torch.device) -> float:
    """The same of a call captured as a CUDA graph: what is left without Python and launches."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(NUM_WARM_UP):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return median_ms(graph.replay, device)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device, *, reset: bool = False) -> int:
    """The peak so far, or what is held now after the peak was reset; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return torch.cuda.max_memory_allocated(device)


def bytes_per_second(device: torch.device) -> float:
    """Bytes that a large copy reads and writes in a second on this device: what a kernel can be near to."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (median_ms(lambda: target.copy_(source), device) / 1e3)
