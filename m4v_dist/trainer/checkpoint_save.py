"""How a folder becomes a checkpoint: a snapshot of each rank's ranges, a file of each rank, the commit by rank 0.

No collective among them, so that all but the snapshot may run in a thread beside training: a rank's JSON file, written
after its data, tells rank 0 that the rank is done. `CheckpointSaver` does that; `save` does the same while all wait.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from m4v_dist import storage, tensor_files
from m4v_dist.config.load import config_to_json
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import DamagedCheckpointError, RunInUseError
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.retries import count_retries
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.block_file import FileSums, sums_of, write_file
from m4v_dist.trainer.checkpoint import rank_file
from m4v_dist.trainer.checkpoint_index import merge_index, sizes_digest
from m4v_dist.trainer.ranges import BYTES_A_VALUE, Ranges
from m4v_dist.trainer.snapshot import Snapshot, SnapshotBuffer

logger = logging.getLogger(__name__)

LONGEST_POLL_S = 1.0


class AbandonedError(OSError):
    """Rank 0 gave a save up because another rank failed: a consequence, and no cause."""


@dataclass(frozen=True)
class Save:
    """One rank's part in one save.

    Args:
        path: the checkpoint's folder.
        step: optimizer steps done.
        attempt: who saves.
        number: of this save in the attempt, the same on all ranks: what a failed one left is not taken for this one's.
        rank, world_size: whose part it is, of how many.
        snapshot: what is saved.
        texts: rank 0's `state.json` and `config.json`.
    """

    path: str
    step: int
    attempt: int
    number: int
    rank: int
    world_size: int
    snapshot: Snapshot
    texts: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Where this attempt's files go."""
        return checkpoint.attempt_folder(self.path, self.attempt)


@dataclass(frozen=True)
class Committed:
    """What a commit says about itself: bytes of all ranks' files, and how often a store had to be asked again."""

    size_bytes: int
    num_retries: int


def rank_zero_texts(state: Mapping[str, Any], config: RunConfig, step: int, world_size: int) -> dict[str, bytes]:
    """Rank 0's own files as they are now, before training changes what they say."""
    whole = {"step": step, "world_size": world_size, **state}
    return {"state.json": storage.json_bytes(whole), "config.json": config_to_json(config).encode()}


def write_share(save: Save) -> None:
    """Write a rank's data, then the JSON file that says so.

    Raises:
        NoSpaceError: the disk is full.
    """
    snapshot = save.snapshot
    layout = {
        f"{key}@{start}": ((length,), torch.float32) for key, parts in snapshot.parts.items() for start, length in parts
    }
    header = tensor_files.tensor_header(layout)
    at = len(header)
    parts_at: dict[str, list[tuple[int, int, int]]] = {}
    for key, parts in snapshot.parts.items():
        parts_at[key] = []
        for start, length in parts:
            parts_at[key].append((start, length, at))
            at += length * BYTES_A_VALUE
    with count_retries() as count:
        data = snapshot.values.view(torch.uint8).numpy().data
        sums = write_file(storage.join(save.folder, rank_file(save.rank)), [header, data])
    share = {
        "save": save.number,
        "file": sums.to_json(),
        # Of all ranks the same, and long.
        "num_elements": sizes_digest(snapshot.num_elements) if save.rank else dict(snapshot.num_elements),
        "parts": parts_at,
        "random": dict(snapshot.random),
        "num_retries": count.num_retries,
    }
    storage.write_bytes(storage.join(save.folder, rank_file(save.rank, "json")), json.dumps(share).encode())


def commit(
    save: Save,
    *,
    may_commit: Callable[[], None] = lambda: None,
    is_abandoned: Callable[[], bool] = lambda: False,
    timeout_s: float = 3600.0,
) -> Committed:
    """Rank 0: wait for the files of all ranks, write the index, and mark the folder as a checkpoint.

    Args:
        save: rank 0's, whose own share is written.
        may_commit: asked last of all; raises if another attempt has taken over.
        is_abandoned: whether another rank has failed, so that its file will not come.
        timeout_s: for the other ranks' files.

    Raises:
        TimeoutError: they did not come.
        AbandonedError: they will not.
        ValueError: the ranks' ranges do not cover each tensor exactly once.
        RunInUseError: another attempt has taken over.
    """
    shares, files = _wait_for_shares(save, is_abandoned, timeout_s)
    index = json.dumps(merge_index([share for share, _ in shares])).encode()
    with count_retries() as count:
        for name, text in {**save.texts, "index.json": index}.items():
            files[name] = write_file(storage.join(save.folder, name), [text])
        marker = storage.join(save.path, checkpoint.COMMITTED)
        # Whoever made a folder may have been killed before its name was durable: the marker must not outlive its files.
        for folder in (save.folder, save.path, save.path.rpartition("/")[0]):
            storage.sync_folder(folder)
        may_commit()
        text = checkpoint.marker_json(save.step, save.attempt, files)
        if not storage.create_bytes(marker, text) and storage.read_bytes(marker) != text:
            _require_earlier(save)
            logger.warning("%s: committed by another attempt too; this attempt's files take its place.", save.path)
            storage.write_bytes(marker, text)
    retries = count.num_retries + sum(share["num_retries"] for share, _ in shares)
    return Committed(sum(sums.size_bytes for sums in files.values()), retries)


def _require_earlier(save: Save) -> None:
    """Go on, or not, where a checkpoint of this step stands already.

    An earlier attempt's was written when it had lost its lease and was too late to know. A later one's says that this
    attempt is the late one: it lost its lease between the question and the commit.

    Raises:
        RunInUseError: the checkpoint is a later attempt's.
    """
    try:
        there = checkpoint.read_marker(save.path).attempt
    except DamagedCheckpointError:
        return
    if there > save.attempt:
        raise RunInUseError(
            f"{save.path}: committed by attempt {there}, so attempt {save.attempt} has been overtaken and must not "
            "commit. The newer one goes on."
        )


def remove_earlier_attempts(save: Save) -> None:
    """Behind a commit: remove what earlier attempts left in its folder; a later one's is not this one's to touch."""
    for name in storage.list_folder(save.path):
        number = checkpoint.attempt_of(name)
        if number is not None and number < save.attempt:
            storage.remove(storage.join(save.path, name))
    storage.remove(storage.join(save.path, checkpoint.DAMAGED))


def _wait_for_shares(
    save: Save, is_abandoned: Callable[[], bool], timeout_s: float
) -> tuple[list[tuple[dict[str, Any], int]], dict[str, FileSums]]:
    """Every rank's JSON file with its rank, in rank order, and the sums of all ranks' files."""
    found: dict[int, dict[str, Any]] = {}
    files: dict[str, FileSums] = {}
    deadline, pause_s = time.monotonic() + timeout_s, 0.01
    while True:
        there = set(storage.list_folder(save.folder))
        for rank in range(save.world_size):
            name = rank_file(rank, "json")
            if rank in found or name not in there:
                continue
            text = storage.read_bytes(storage.join(save.folder, name))
            share = json.loads(text)
            # Else it was left by a save of this attempt that failed.
            if share["save"] == save.number:
                found[rank] = share
                files[rank_file(rank)] = FileSums.from_json(share["file"])
                files[name] = sums_of([text])
        if len(found) == save.world_size:
            return [(found[rank], rank) for rank in range(save.world_size)], files
        missing = sorted(set(range(save.world_size)) - set(found))
        if is_abandoned():
            raise AbandonedError(f"{save.path}: given up, since another rank failed to write its file.")
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{save.path}: ranks {missing[:8]} ({len(missing)} of {save.world_size}) did not write their files in "
                f"{timeout_s:.0f} s (trainer.save_timeout_s)."
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_POLL_S)


def discard(save: Save) -> None:
    """Remove what a failed save left of this attempt; of a folder that holds nothing else, the folder too."""
    if checkpoint.is_committed(save.path) and checkpoint.read_marker(save.path).attempt == save.attempt:
        # The store wrote it and could not say so. First, as in a prune: files without it count for nothing, it without
        # files for a damaged checkpoint.
        checkpoint.unmark(save.path)
    storage.remove(save.folder)
    if not storage.list_folder(save.path):
        storage.remove(save.path)


def save(
    folder: str,
    step: int,
    *,
    tensors: Mapping[str, Ranges],
    state: Mapping[str, Any],
    config: RunConfig,
    mesh: Mesh,
    attempt: int = 1,
) -> str:
    """Write the checkpoint of `step` and commit it, while everybody waits (collective); return its path.

    Args:
        folder: the run's checkpoint folder.
        step: optimizer steps done.
        tensors: keyed `<kind>/<parameter>`, the same keys on every rank.
        state: JSON; rank 0's counts.
        config: resolved config.
        mesh: rank facts.
        attempt: who saves.
    """
    path = storage.join(folder, checkpoint.folder_name(step))
    texts = rank_zero_texts(state, config, step, mesh.world_size) if mesh.is_main else {}
    snapshot = SnapshotBuffer().take(tensors)
    mine = Save(path, step, attempt, 1, mesh.rank, mesh.world_size, snapshot, texts)
    write_share(mine)
    if mesh.is_main:
        commit(mine)
        remove_earlier_attempts(mine)
    mesh.barrier()
    return path
