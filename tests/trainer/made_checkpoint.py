"""Checkpoint folders made by hand, as training would have committed them."""

from pathlib import Path
from typing import Any

from m4v_dist import storage
from m4v_dist.config.load import config_to_json
from m4v_dist.config.schema import RunConfig
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.block_file import sums_of


def commit_by_hand(path: str) -> None:
    """Mark what stands in a local checkpoint's attempt folder as it is now."""
    folder = Path(checkpoint.attempt_folder(path, 1))
    files = {file.name: sums_of([file.read_bytes()]) for file in folder.iterdir()}
    storage.write_bytes(f"{path}/COMMITTED", checkpoint.marker_json(checkpoint.step_of(path), 1, files))


def made_checkpoint(config: RunConfig, step: int, curriculum_stage: dict[str, Any]) -> str:
    """A committed checkpoint without weights: what a preflight looks at. Returns its path."""
    path = storage.join(config.checkpoint_folder, checkpoint.folder_name(step))
    folder = checkpoint.attempt_folder(path, 1)
    storage.write_json(storage.join(folder, "state.json"), {"curriculum_stage": curriculum_stage})
    storage.write_bytes(storage.join(folder, "config.json"), config_to_json(config).encode())
    commit_by_hand(path)
    return path
