"""Faults at a moment that only the worker's own process knows: in the middle of a save, or of a step's loss.

`WorkerFault.train` takes the place of `jobs.train.train_on_rank` on Ray's workers (`train_with_fault.py`): it arms the
fault in its process, once in a run, and trains. What it patches is at the edge of what is tested: a file's bytes on
their way to the disk, a call of storage, the objective's answer.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, assert_never

import torch.distributed as dist

import jobs.train
from m4v_dist import storage
from m4v_dist.batch import LatentBatch
from m4v_dist.objective.flow_matching import ObjectiveOutput, PyramidFlowMatching
from m4v_dist.stop_request import StopRequest
from m4v_dist.trainer import checkpoint

Kind = Literal["in_write", "in_commit", "in_prune", "nan"]
train_on_rank = jobs.train.train_on_rank


@dataclass(frozen=True)
class WorkerFault:
    """One fault, that happens once in a run.

    Args:
        kind: in_write: SIGKILL when half of the rank's file is written. in_commit: when the index is written, and the
            marker is not. in_prune: when a part of the oldest checkpoint is removed. nan: the loss of a step.
        step: of the checkpoint that is saved; for nan the step itself, 0-based.
        rank: whose process.
        note: file that says when it happened and what stood there then; while it stands, nothing is armed.
    """

    kind: Kind
    step: int
    rank: int
    note: str

    def train(self, task: dict[str, Any], stop_requests: Callable[[], Sequence[StopRequest]]) -> dict[str, Any]:
        """What a worker runs."""
        if dist.get_rank() == self.rank and not Path(self.note).exists():
            self._arm()
        return train_on_rank(task, stop_requests)

    def _arm(self) -> None:
        match self.kind:
            case "in_write":
                storage.write_chunks = self._cutting(storage.write_chunks)
            case "in_commit":
                storage.create_bytes = self._dying_at_marker(storage.create_bytes)
            case "in_prune":
                storage.remove = self._dying_in_removal(storage.remove)
            case "nan":
                jobs.train.PyramidFlowMatching = self._spoiling(PyramidFlowMatching)  # type: ignore[misc]
            case _:
                assert_never(self.kind)

    def _write_note(self, **facts: Any) -> None:
        temporary = Path(f"{self.note}.tmp")
        temporary.write_text(json.dumps({"time": time.time(), **facts}))
        temporary.rename(self.note)

    def _die(self, **facts: Any) -> None:
        self._write_note(**facts)
        os.kill(os.getpid(), signal.SIGKILL)

    def _cutting(self, write: Callable[..., None]) -> Callable[..., None]:
        name = checkpoint.rank_file(self.rank)

        def cut(path: str, chunks: Callable[[], Iterable[bytes | memoryview]], size_bytes: int) -> None:
            folder, _, file = path.rpartition("/")
            if file != name or checkpoint.folder_name(self.step) not in folder:
                write(path, chunks, size_bytes)
                return

            def half() -> Iterator[bytes | memoryview]:
                left = size_bytes // 2
                for chunk in chunks():
                    part = chunk[:left]
                    yield part
                    left -= len(part)
                    if left == 0:
                        self._die(size_bytes=size_bytes, files=storage.list_sizes(folder))

            write(path, half, size_bytes)

        return cut

    def _dying_at_marker(self, create: Callable[[str, bytes], bool]) -> Callable[[str, bytes], bool]:
        marker = f"{checkpoint.folder_name(self.step)}/{checkpoint.COMMITTED}"

        def die_or_create(path: str, data: bytes) -> bool:
            if path.endswith(marker):
                folder = path.rpartition("/")[0]
                attempts = storage.list_folder(folder)
                self._die(files={name: storage.list_sizes(storage.join(folder, name)) for name in attempts})
            return create(path, data)

        return die_or_create

    def _dying_in_removal(self, remove: Callable[[str], None]) -> Callable[[str], None]:
        def die_or_remove(path: str) -> None:
            name = path.rpartition("/")[2]
            is_old = name.startswith("step_") and checkpoint.step_of(path) < self.step
            if is_old and checkpoint.is_committed(storage.join(path, "..", checkpoint.folder_name(self.step))):
                (attempt,) = storage.list_folder(path)
                remove(storage.join(path, attempt, checkpoint.rank_file(0)))
                self._die(name=name, files=storage.list_sizes(storage.join(path, attempt)))
            remove(path)

        return die_or_remove

    def _spoiling(self, objective: type[PyramidFlowMatching]) -> type[PyramidFlowMatching]:
        fault = self

        class Spoilt(objective):  # type: ignore[misc,valid-type]
            """NaN for the loss of one step, once."""

            def __call__(self, model: Any, batch: LatentBatch) -> ObjectiveOutput:
                output: ObjectiveOutput = super().__call__(model, batch)
                if batch.slots[0].step != fault.step or Path(fault.note).exists():
                    return output
                fault._write_note(loss=float(output.loss))
                return replace(output, loss=output.loss * float("nan"))

        return Spoilt
