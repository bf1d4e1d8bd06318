"""Facts about GPUs that a plan counts with; nothing here is measured.

Source: NVIDIA data sheets: A100 Tensor Core GPU (40 GB and 80 GB SXM), H100 SXM, H200 SXM. Peaks are dense: the sheets
of H100 and H200 give bfloat16 with sparsity, twice as much.
"""

from dataclasses import dataclass

USABLE_FRACTION = 0.92
"""Of a GPU's memory; the rest goes to the CUDA context, NCCL, and holes of the allocator. An assumption."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Args:
        title: as people write it.
        memory_gib: the data sheet's GB; a driver reports about as many GiB.
        bfloat16_tflops: dense peak of matrix products, in 1e12 FLOP/s.
    """

    title: str
    memory_gib: int
    bfloat16_tflops: float

    @property
    def usable_bytes(self) -> int:
        """What a plan may fill."""
        return int(USABLE_FRACTION * self.memory_gib * 2**30)


GPUS: dict[str, Gpu] = {
    "a100_40gb": Gpu("A100 40 GB", 40, 312.0),
    "a100_80gb": Gpu("A100 80 GB", 80, 312.0),
    "h100_80gb": Gpu("H100 80 GB", 80, 989.0),
    "h200_141gb": Gpu("H200 141 GB", 141, 989.0),
}
"""By the name that `launch.gpu` takes."""
