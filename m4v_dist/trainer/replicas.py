"""Whether all ranks hold the same weights, where ZeRO keeps a whole copy on each: a checksum of every parameter.

Under ZeRO 1 and 2 each rank computes with its own copy, and nothing else ever compares them. A frozen weight that
changed on one rank stays so to the end. One that trains is written anew in each step from the rank that owns it: there
the check finds what went wrong in the last step's gather. Under ZeRO 3 there is no copy to compare: each rank owns its
part of every parameter alone, and what it gathers for a forward is gone after it.

The checksum is the sum of the bit patterns as integers: exact, so that no order of adding changes it, and one changed
bit of one element always shows.
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from m4v_dist.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicasDifferError(RuntimeError):
    """Ranks hold different weights. No JobError: a restart from the last checkpoint mends it."""


def checksums(replicas: Mapping[str, Tensor]) -> dict[str, int]:
    """Sum of the bit patterns of each tensor, modulo 2^64.

    Args:
        replicas: name to a contiguous tensor of any dtype; those of one rank stand on one device.
    """
    if not replicas:
        return {}
    sums = [t.detach().reshape(-1).view(_INTEGERS[t.element_size()]).sum(dtype=torch.int64) for t in replicas.values()]
    return dict(zip(replicas, torch.stack(sums).tolist(), strict=True))


def require_equal_replicas(replicas: Mapping[str, Tensor], mesh: Mesh, *, step: int) -> None:
    """Compare every rank's copies with rank 0's (collective); all ranks raise, or none.

    Args:
        replicas: what each rank holds whole, the same names in the same order everywhere.
        mesh: rank facts.
        step: steps done, for the message.

    Raises:
        ReplicasDifferError: with the first parameter that differs, both values, and the ranks.
    """
    mine = checksums(replicas)
    first = mesh.from_main(mine)
    differing = [name for name, value in mine.items() if value != first[name]]
    found = mesh.gather((len(differing), differing[0], mine[differing[0]]) if differing else None)
    ranks = [rank for rank, told in enumerate(found) if told is not None]
    if not ranks:
        return
    count, name, value = found[ranks[0]]
    raise ReplicasDifferError(
        f"after step {step}: ranks {ranks} hold other weights than rank 0, though ZeRO 1 and 2 keep them equal; first "
        f"on rank {ranks[0]}: {name} ({count} parameters in all) has checksum {value}, rank 0 has {first[name]}. "
        "Nothing of this attempt is saved any more: it ends, and the next one goes on from the last checkpoint. If it "
        "comes again on the same host, take that host out."
    )
