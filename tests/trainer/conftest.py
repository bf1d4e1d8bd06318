"""Fixtures of several files here."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from m4v_dist.parallel.mesh import Mesh


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Mesh.of_process_group(use_gpu=False)
    dist.destroy_process_group()
