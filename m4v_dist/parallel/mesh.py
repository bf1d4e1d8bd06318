"""Rank facts of one process: built once, passed down, never a module global.

Two axes divide the world, data parallel times sequence parallel. Data-parallel ranks hold their own slots of the global
batch; the sequence ranks of one data rank hold the same slots and cut their sequence (`sequence.py`). Sequence ranks
are neighbours, rank = data_rank * size + sequence.rank, so that they share a node wherever they fit in one.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m4v_dist.errors import ConfigError


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that cut one sequence among them.

    Args:
        rank: 0 <= rank < size; lower ranks hold older tokens.
        size: ranks of the group; 1 cuts nothing.
        group: torch's process group of these ranks; None at size 1.
    """

    rank: int = 0
    size: int = 1
    group: Any = None


ALONE = SequenceGroup()
"""One rank that holds whole sequences."""


@dataclass(frozen=True)
class Mesh:
    """Who this process is.

    Args:
        rank: 0 <= rank < world_size; rank 0 writes what one process must write.
        world_size: processes of the run.
        device: where this rank computes.
        sequence: this rank among those that share its slots.
    """

    rank: int
    world_size: int
    device: torch.device
    sequence: SequenceGroup = ALONE

    @classmethod
    def of_process_group(cls, *, use_gpu: bool, sequence_size: int = 1) -> "Mesh":
        """Read the facts of the process group that is up, and make the sequence groups (collective).

        Args:
            use_gpu: compute on this rank's GPU.
            sequence_size: ranks that cut one sequence among them; divides the world.

        Raises:
            RuntimeError: no process group, or a GPU was asked for and none is there.
            ConfigError: `sequence_size` does not divide the world.
        """
        if not dist.is_initialized():
            raise RuntimeError("Mesh: no process group is up; start the workers through launch/ray_workers.py.")
        if use_gpu and not torch.cuda.is_available():
            raise RuntimeError("Mesh: launch.use_gpu=true, but torch sees no CUDA device; set launch.use_gpu=false.")
        device = torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")
        rank, world_size = dist.get_rank(), dist.get_world_size()
        return cls(rank, world_size, device, _sequence_group(rank, world_size, sequence_size))

    @property
    def data_rank(self) -> int:
        """This rank among the data-parallel ones: which slots it reads."""
        return self.rank // self.sequence.size

    @property
    def data_size(self) -> int:
        """Data-parallel ranks: how many shares the slots are split into."""
        return self.world_size // self.sequence.size

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


def _sequence_group(rank: int, world_size: int, size: int) -> SequenceGroup:
    """Make all sequence groups, on all ranks in one order, and return this rank's."""
    if world_size % size:
        raise ConfigError(
            f"launch.sequence_parallel={size} does not divide the {world_size} ranks; set it, or launch.num_workers, "
            "so that it does."
        )
    if size == 1:
        return ALONE
    groups = [dist.new_group(range(start, start + size)) for start in range(0, world_size, size)]
    return SequenceGroup(rank % size, size, groups[rank // size])
