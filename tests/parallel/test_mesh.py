"""Two axes of ranks: neighbours share a sequence."""

import pytest

from m4v_dist.errors import ConfigError
from m4v_dist.parallel.mesh import Mesh
from tests.trainer.ranks import run_ranks


def mesh_on_rank(sequence_size: int) -> tuple[int, int, int, int]:
    """Facts of a mesh."""
    mesh = Mesh.of_process_group(use_gpu=False, sequence_size=sequence_size)
    return mesh.data_rank, mesh.data_size, mesh.sequence.rank, mesh.sequence.size


def test_neighbours_share_a_sequence() -> None:
    assert run_ranks(mesh_on_rank, 4, 2) == [(0, 2, 0, 2), (0, 2, 1, 2), (1, 2, 0, 2), (1, 2, 1, 2)]
    assert run_ranks(mesh_on_rank, 2, 1) == [(0, 2, 0, 1), (1, 2, 0, 1)]


def refused_on_rank() -> str:
    """The error of a size that does not divide."""
    with pytest.raises(ConfigError) as caught:
        Mesh.of_process_group(use_gpu=False, sequence_size=2)
    return str(caught.value)


def test_a_sequence_size_that_does_not_divide_the_ranks_is_refused() -> None:
    assert all("does not divide the 3 ranks" in answer for answer in run_ranks(refused_on_rank, 3))
