"""The snapshot of what is on a GPU: pinned host memory, and done before the weights move on."""

import pytest
import torch

from m4v_dist.trainer.checkpoint_save import SnapshotBuffer
from m4v_dist.trainer.ranges import Ranges

pytestmark = pytest.mark.gpu


def test_a_snapshot_of_gpu_memory_is_pinned_kept_and_not_what_comes_after_it() -> None:
    values = torch.arange(2.0**24, device="cuda")
    buffer = SnapshotBuffer()
    for turn in range(3):
        expected = values.cpu()
        snapshot = buffer.take({"weights/a": Ranges(len(values), ((0, values[:-5]), (len(values) - 5, values[-5:])))})
        values += 1
        assert snapshot.values.is_pinned() and torch.equal(snapshot.values, expected), turn
        assert snapshot.values.data_ptr() == buffer.take({"weights/a": Ranges(5, ((0, values[:5]),))}).values.data_ptr()
