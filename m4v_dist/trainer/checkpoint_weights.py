"""A committed checkpoint's weights or average, one parameter at a time, for what memory cannot hold whole."""

from typing import Literal

import torch
from torch import Tensor

from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.range_reader import Span, fill, spans_of


class CheckpointWeights:
    """Reads parameters by name; verified, each with ranged reads.

    Args:
        path: of a committed checkpoint.
        kind: weights as they were trained, or their average (the weight itself where a parameter has none).

    Raises:
        DataError: not committed, or of another format.
        DamagedCheckpointError: its files are not what was written.
    """

    def __init__(self, path: str, kind: Literal["weights", "ema"]) -> None:
        self.path = path
        self._marker = checkpoint.check(path)
        self._index = self._marker.read_index()
        self._kind = kind
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(shape) for name, shape in self._marker.read_json("state.json")["shapes"].items()
        }

    def read(self, name: str) -> Tensor:
        """A parameter as float32 on the CPU.

        Raises:
            DamagedCheckpointError: a block of it is not what was written.
        """
        entry = self._index.get(f"{self._kind}/{name}") or self._index[f"weights/{name}"]
        flat = torch.empty(torch.Size(self.shapes[name]).numel())
        by_rank: dict[int, list[Span]] = {}
        for rank, span in spans_of(entry.parts, 0, flat):
            by_rank.setdefault(rank, []).append(span)
        for rank, spans in by_rank.items():
            file = checkpoint.rank_file(rank)
            fill(self._marker.path(file), self._marker.files[file], spans)
        return flat.view(self.shapes[name])
