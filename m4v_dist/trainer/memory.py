"""What a process holds of memory, in GiB: of the host, and of its GPU where it has one."""

import os
from pathlib import Path

import torch

GIB = 2**30


def host_rss_gib() -> float:
    """Resident memory of this process, in GiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB


def memory_facts(device: torch.device) -> dict[str, float]:
    """Memory of host and device; the device's own are absent on the CPU, not zero.

    Args:
        device: where this rank computes.
    """
    facts = {"host_rss_gib": host_rss_gib()}
    if device.type == "cuda":
        facts |= {
            "allocated_gib": torch.cuda.memory_allocated(device) / GIB,
            "max_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
            "max_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        }
    return facts
