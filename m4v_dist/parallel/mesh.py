"""Rank facts of one process: built once, passed down, never a module global.

One axis for now, data parallel: every rank holds its own slots of the global batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Mesh:
    """Who this process is.

    Args:
        rank: 0 <= rank < world_size; rank 0 writes what one process must write.
        world_size: processes of the run.
        device: where this rank computes.
    """

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def of_process_group(cls, *, use_gpu: bool) -> "Mesh":
        """Read the facts of the process group that is up.

        Raises:
            RuntimeError: no process group, or a GPU was asked for and none is there.
        """
        if not dist.is_initialized():
            raise RuntimeError("Mesh: no process group is up; start the workers through launch/ray_workers.py.")
        if use_gpu and not torch.cuda.is_available():
            raise RuntimeError("Mesh: launch.use_gpu=true, but torch sees no CUDA device; set launch.use_gpu=false.")
        device = torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")
        return cls(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks (collective)."""
        dist.barrier()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum float64 `values` over all ranks (collective); every rank gets the same bits, NaN included."""
        total = values.to(self.device, torch.float64)
        dist.all_reduce(total)
        return total.cpu()

    def gather(self, value: Any) -> list[Any]:
        """Collect one small picklable value of each rank, in rank order (collective)."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """Return rank 0's `value` on every rank (collective)."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]
