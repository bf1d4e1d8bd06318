"""What may stand in for a damaged record, found without a look at every record of its source."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_pipeline.index_table import RecordTable
from m4v_dist.config.data_settings import BucketSettings

Positions = NDArray[np.int32]
"""Positions of records in their source's table."""


class Reserve:
    """What may stand in for a record of a source in a stage: the allowed records by size, the longest first.

    So the records that are long enough are the first ones of their size, and counting them is a binary search.

    Args:
        table: of the source.
        allowed: of the stage.
        buckets: the sizes that these have.
    """

    def __init__(self, table: RecordTable, allowed: Positions, buckets: Sequence[BucketSettings]) -> None:
        self._table = table
        self._of_size: dict[tuple[int, int], tuple[Positions, Positions]] = {}
        for bucket in buckets:
            size = (bucket.height_px, bucket.width_px)
            records = allowed[(table.height_px[allowed] == size[0]) & (table.width_px[allowed] == size[1])]
            # by length, then by position: the sort is stable
            order = np.argsort(-table.num_latents[records], kind="stable")
            self._of_size[size] = (records[order], -table.num_latents[records][order])

    def fitting(self, record: int, num_latents: int) -> Positions:
        """Records of this one's size that are as long, or have `num_latents`."""
        size = (int(self._table.height_px[record]), int(self._table.width_px[record]))
        records, negative_lengths = self._of_size[size]
        needed = min(int(self._table.num_latents[record]), num_latents)
        return records[: int(np.searchsorted(negative_lengths, -needed, side="right"))]
