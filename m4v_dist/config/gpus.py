"""Facts about GPUs that a plan counts with, and that MFU is a share of; nothing here is measured.

Source: NVIDIA's data sheets. Peaks are dense bfloat16, whatever trainer.precision is, so that figures compare: the
sheets of Hopper give it with sparsity, twice as much.
"""

import re
from dataclasses import dataclass

USABLE_FRACTION = 0.92
"""Of a GPU's memory; the rest goes to the CUDA context, NCCL, and holes of the allocator. An assumption."""


PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"\bA[18]00\b", 312.0),
    (r"\bH100 PCIe\b", 756.0),
    (r"\bH[12]00 NVL\b", 835.0),
    (r"\bH[128]00\b", 989.0),
    (r"\bH20\b", 148.0),
    (r"\bL40S\b", 362.0),
)
"""Pattern of the name that the driver gives, and 1e12 FLOP/s of matrix products; the first that matches counts."""


def peak_of(name: str) -> float | None:
    """Peak of a GPU in 1e12 FLOP/s, or None for one that is not listed.

    Args:
        name: as the driver gives it, such as "NVIDIA A100-SXM4-80GB".
    """
    return next((peak for pattern, peak in PEAK_TFLOPS if re.search(pattern, name)), None)


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Args:
        title: as people write it.
        memory_gib: the data sheet's GB; a driver reports about as many GiB.
        driver_name: as its driver gives it; its peak is found by it.
    """

    title: str
    memory_gib: int
    driver_name: str

    @property
    def bfloat16_tflops(self) -> float:
        """Dense peak of matrix products, in 1e12 FLOP/s."""
        peak = peak_of(self.driver_name)
        assert peak is not None, f"PEAK_TFLOPS has no {self.driver_name}"
        return peak

    @property
    def usable_bytes(self) -> int:
        """What a plan may fill."""
        return int(USABLE_FRACTION * self.memory_gib * 2**30)


GPUS: dict[str, Gpu] = {
    "a100_40gb": Gpu("A100 40 GB", 40, "NVIDIA A100-SXM4-40GB"),
    "a100_80gb": Gpu("A100 80 GB", 80, "NVIDIA A100-SXM4-80GB"),
    "h100_80gb": Gpu("H100 80 GB", 80, "NVIDIA H100 80GB HBM3"),
    "h200_141gb": Gpu("H200 141 GB", 141, "NVIDIA H200"),
}
"""By the name that `launch.gpu` takes."""
