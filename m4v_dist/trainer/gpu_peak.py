"""The peak of a GPU's matrix products, by the name that its driver gives it: what MFU is a share of.

Dense bfloat16, whatever trainer.precision is, so that figures compare. Source: NVIDIA's data sheets; those of Hopper
state it with sparsity, twice as much.
"""

import logging
import re

import torch

logger = logging.getLogger(__name__)

PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"\bA[18]00\b", 312.0),
    (r"\bH100 PCIe\b", 756.0),
    (r"\bH[12]00 NVL\b", 835.0),
    (r"\bH[128]00\b", 989.0),
    (r"\bH20\b", 148.0),
    (r"\bL40S\b", 362.0),
)
"""Pattern of the name, and 1e12 FLOP/s; the first that matches counts."""


def peak_of(name: str) -> float | None:
    """Peak of a GPU in 1e12 FLOP/s, or None for one that is not listed.

    Args:
        name: as `torch.cuda.get_device_name` gives it, such as "NVIDIA A100-SXM4-80GB".
    """
    return next((peak for pattern, peak in PEAK_TFLOPS if re.search(pattern, name)), None)


def gpu_peak_tflops(device: torch.device, given: float | None) -> float | None:
    """Peak of this rank's GPU; None on the CPU, and for a GPU that is neither listed nor given.

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
