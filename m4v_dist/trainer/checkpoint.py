"""Checkpoints: what a folder holds, how it becomes one, which one counts, which ones go.

`step_00000120/` holds, written by all ranks together through torch.distributed.checkpoint:
    weights/<parameter>, ema/<parameter>, exp_avg/<parameter>, exp_avg_sq/<parameter>   1-d float32, in ranges
and, written by rank 0: `state.json` (step, curriculum position, loader, optimizer steps, counts, shapes),
`config.json` (the resolved config), `random/rank_00000.json` of each rank, and last of all `COMMITTED`, with the size
of every file. A folder without `COMMITTED` is no checkpoint: it is named in the log and passed over.

A parameter is stored flattened, each rank's range on its own, so any world size and ZeRO stage reads it back without a
conversion. The optimizer's settings (lr, decay) are not in it: they come from the config.
"""

import base64
import logging
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType

from m4v_dist import storage
from m4v_dist.config.load import config_to_json
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

FORMAT = 1
COMMITTED = "COMMITTED"
_FOLDER = re.compile(r"^step_(\d{8})$")


@dataclass(frozen=True)
class Ranges:
    """What this rank holds of one flat tensor: a list of (first element, 1-d values).

    Speaks torch.distributed.checkpoint's protocol (`_checkpointable.py`), so that its planners see the parts of one
    global tensor. Values are read from, and loaded into, in place.
    """

    num_elements: int
    parts: tuple[tuple[int, Tensor], ...]

    def __create_write_items__(self, key: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(key, torch.Size([start])),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=torch.Size([start]), sizes=values.size()),
                    properties=TensorProperties.create_from_tensor(values),
                    size=torch.Size([self.num_elements]),
                ),
            )
            for start, values in self.parts
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=torch.Size([start]), sizes=values.size()) for start, values in self.parts]

    def values_at(self, index: MetadataIndex) -> Tensor:
        """The part that begins at the index's offset."""
        assert index.offset is not None, f"{index}: a range has an offset"
        return next(values for start, values in self.parts if start == index.offset[0])


class _SavePlanner(dcp.DefaultSavePlanner):
    """The default planner takes parts of tensors only from torch's own sharded types."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].values_at(index)


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The default one walks into dataclasses and would hand on copies of the ranges.
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        values: Tensor = self.state_dict[index.fqn].values_at(index)
        return values

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        # Written into below the autograd's eye: these are views of DeepSpeed's buffers.
        return super().resolve_tensor(read_item).detach()


def _require_local(path: str) -> None:
    if storage.is_remote(path):
        raise ConfigError(
            f"{path}: checkpoints on object stores are not supported yet; set run.folder to a local or mounted folder."
        )


def folder_name(step: int) -> str:
    """Name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def step_of(path: str) -> int:
    """The step that a checkpoint path names."""
    match = _FOLDER.match(path.rstrip("/").rsplit("/", 1)[-1])
    if match is None:
        raise DataError(f"{path} is no checkpoint folder; they are called {folder_name(120)}.")
    return int(match.group(1))


def save(
    folder: str,
    step: int,
    *,
    tensors: Mapping[str, Ranges],
    state: Mapping[str, Any],
    config: RunConfig,
    mesh: Mesh,
) -> str:
    """Write the checkpoint of `step` and commit it (collective); return its path.

    Args:
        folder: the run's `checkpoints` folder.
        step: optimizer steps done.
        tensors: keyed `<kind>/<parameter>`, the same keys on every rank.
        state: JSON; rank 0's counts.
        config: resolved config.
        mesh: rank facts.
    """
    _require_local(folder)
    path = storage.join(folder, folder_name(step))
    if mesh.is_main:
        # What an earlier attempt left half-written here must not mix with this one.
        storage.remove(path)
        storage.make_folder(storage.join(path, "random"))
    mesh.barrier()
    planner = _SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(path), planner=planner)
    storage.write_json(storage.join(path, "random", f"rank_{mesh.rank:05d}.json"), _random_state())
    if mesh.is_main:
        whole = {"format": FORMAT, "step": step, "world_size": mesh.world_size, **state}
        storage.write_json(storage.join(path, "state.json"), whole)
        storage.write_bytes(storage.join(path, "config.json"), config_to_json(config).encode())
    # Every rank's files stand before the marker does.
    mesh.barrier()
    if mesh.is_main:
        storage.write_json(storage.join(path, COMMITTED), {"step": step, "size_bytes": _sizes(path)})
    mesh.barrier()
    return path


def load(path: str, tensors: Mapping[str, Ranges]) -> None:
    """Fill `tensors` in place from a committed checkpoint (collective when a process group is up).

    Raises:
        DataError: a tensor is missing or has another size, or a file was cut short since the commit.
    """
    check(path)
    reader = dcp.FileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata
    for key, ranges in tensors.items():
        entry = stored.get(key)
        if not isinstance(entry, TensorStorageMetadata) or entry.size.numel() != ranges.num_elements:
            size = "nothing" if entry is None else f"{getattr(entry, 'size', entry)}"
            raise DataError(
                f"{path}: {key} needs {ranges.num_elements} elements, but the checkpoint has {size}; it was written by "
                "another model: use its config, or a fresh run.folder."
            )
    planner = _LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        # Reading in one process is meant, and needs no warning.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        alone = not torch.distributed.is_initialized()
        dcp.load(dict(tensors), storage_reader=reader, planner=planner, no_dist=alone)


def read_state(path: str) -> dict[str, Any]:
    """Read a checkpoint's `state.json`.

    Raises:
        DataError: damaged, or of another format.
    """
    state: dict[str, Any] = _read_part(path, "state.json")
    if state.get("format") != FORMAT:
        raise DataError(f"{path}: checkpoint format {state.get('format')}, but this code reads format {FORMAT}.")
    return state


def read_config(path: str) -> dict[str, Any]:
    """Read the resolved config that a checkpoint was written under, as JSON values.

    Raises:
        DataError: damaged.
    """
    config: dict[str, Any] = _read_part(path, "config.json")
    return config


def _read_part(path: str, name: str) -> Any:
    """Read one JSON file of a committed checkpoint.

    Raises:
        DataError: it is missing, no JSON, or no JSON object.
    """
    file = storage.join(path, name)
    way_out = f"the checkpoint is damaged: remove {path}, and the one before it is taken."
    if not storage.exists(file):
        raise DataError(f"{file}: no such file; {way_out}")
    try:
        value = storage.read_json(file)
    # ValueError: no JSON, or bytes that are no text.
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON ({error.__cause__ or error}); {way_out}") from error
    if not isinstance(value, dict):
        raise DataError(f"{file}: needs a JSON object, but holds {str(value)[:60]!r}; {way_out}")
    return value


def stored_names(path: str, kind: str) -> list[str]:
    """Names of the parameters that a checkpoint holds a `kind` of: weights, ema, exp_avg, exp_avg_sq."""
    keys = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return sorted(key.removeprefix(f"{kind}/") for key in keys if key.startswith(f"{kind}/"))


def load_weights(path: str) -> dict[str, Tensor]:
    """Read all weights of a checkpoint as whole float32 tensors; needs no process group.

    Raises:
        DataError: not a committed checkpoint, or damaged.
    """
    return _load_whole(path, "weights")


def load_ema_weights(path: str) -> dict[str, Tensor]:
    """The same for the moving average of the weights."""
    return _load_whole(path, "ema")


def _load_whole(path: str, kind: str) -> dict[str, Tensor]:
    require_committed(path)
    shapes: dict[str, list[int]] = read_state(path)["shapes"]
    flats = {name: torch.empty(torch.Size(shape).numel()) for name, shape in shapes.items()}
    load(path, {f"{kind}/{name}": Ranges(flat.numel(), ((0, flat),)) for name, flat in flats.items()})
    return {name: flat.view(shapes[name]) for name, flat in flats.items()}


def is_committed(path: str) -> bool:
    """Whether the checkpoint at `path` is complete."""
    return storage.exists(storage.join(path, COMMITTED))


def require_committed(path: str) -> None:
    """Raise unless `path`, asked for by name, is a committed checkpoint.

    Raises:
        DataError: no such folder, or one whose save was never finished.
    """
    if not storage.exists(path):
        there = ", ".join(list_committed(os.path.dirname(path.rstrip("/")))) or "none"
        raise DataError(f"{path}: no such checkpoint; committed ones there: {there}.")
    if not is_committed(path):
        there = ", ".join(list_committed(os.path.dirname(path.rstrip("/")))) or "none"
        raise DataError(
            f"{path}: this save was never finished (no {COMMITTED} file), so it cannot be used; committed ones "
            f"there: {there}."
        )


def check(path: str) -> None:
    """Compare the files of a committed checkpoint with the sizes that were committed.

    Raises:
        DataError: not committed, or a file is missing or has another size.
    """
    require_committed(path)
    marker = _read_part(path, COMMITTED)
    if not isinstance(marker.get("size_bytes"), dict):
        raise DataError(
            f"{storage.join(path, COMMITTED)}: no sizes in it; the checkpoint is damaged: remove {path}, and the one "
            "before it is taken."
        )
    for name, size in marker["size_bytes"].items():
        file = storage.join(path, name)
        found = storage.size_bytes(file) if storage.exists(file) else None
        if found != size:
            raise DataError(
                f"{file}: {found} bytes, but {size} were committed; the checkpoint is damaged: remove {path}, and the "
                "one before it is taken."
            )


def list_committed(folder: str) -> list[str]:
    """Names of the committed checkpoints of a `checkpoints` folder, oldest first; the others are named in the log."""
    committed = []
    for name in storage.list_folder(folder):
        if not _FOLDER.match(name):
            continue
        if is_committed(storage.join(folder, name)):
            committed.append(name)
        else:
            logger.warning("%s: uncommitted checkpoint (a save that was cut off), passed over.", f"{folder}/{name}")
    return committed


def newest_committed(folder: str) -> str | None:
    """Path of the newest committed checkpoint, or None."""
    names = list_committed(folder)
    return storage.join(folder, names[-1]) if names else None


def prune(folder: str, *, keep_last: int, keep_every_steps: int) -> list[str]:
    """Remove what is no longer wanted, by the committed checkpoints that stand; return the removed names.

    Stays: the newest `keep_last`, and multiples of `keep_every_steps` (0 keeps none for ever). Uncommitted leftovers
    older than the newest committed one go too.
    """
    committed = list_committed(folder)
    if not committed:
        return []
    stays = set(committed[-keep_last:])
    if keep_every_steps:
        stays |= {name for name in committed if step_of(name) % keep_every_steps == 0}
    older = [name for name in storage.list_folder(folder) if _FOLDER.match(name) and name < committed[-1]]
    removed = [name for name in older if name not in stays]
    for name in removed:
        # The marker goes first: a removal that is cut off leaves no folder that looks whole.
        storage.remove(storage.join(folder, name, COMMITTED))
        storage.remove(storage.join(folder, name))
    return removed


def restore_random_state(path: str, mesh: Mesh) -> None:
    """Restore this rank's random state; a rank that did not exist at the save keeps its own.

    Training draws everything from slot seeds; this covers what a library may draw beside them.
    """
    file = storage.join(path, "random", f"rank_{mesh.rank:05d}.json")
    if not storage.exists(file):
        logger.info("rank %d: no saved random state in %s (another world size).", mesh.rank, path)
        return
    state = _read_part(path, f"random/rank_{mesh.rank:05d}.json")
    torch.set_rng_state(_from_text(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_text(state["cuda"]))


def _random_state() -> dict[str, str]:
    state = {"torch": _to_text(torch.get_rng_state())}
    if torch.cuda.is_available():
        state["cuda"] = _to_text(torch.cuda.get_rng_state())
    return state


def _to_text(values: Tensor) -> str:
    return base64.b64encode(bytes(values.tolist())).decode()


def _from_text(text: str) -> Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)


def _sizes(path: str) -> dict[str, int]:
    names: Iterable[str] = (
        name if not folder else f"{folder}/{name}"
        for folder in ("", "random")
        for name in storage.list_folder(storage.join(path, folder) if folder else path)
    )
    return {name: storage.size_bytes(storage.join(path, name)) for name in names if not _is_folder(path, name)}


def _is_folder(path: str, name: str) -> bool:
    return os.path.isdir(storage.join(path, name))


def to_ranges(kind: str, owned: Sequence[tuple[str, int, Tensor]], shapes: Mapping[str, Any]) -> dict[str, Ranges]:
    """Key what a rank owns by `<kind>/<parameter>`; parameters that it owns nothing of have no parts.

    Args:
        kind: weights, ema, exp_avg or exp_avg_sq.
        owned: (parameter, first element, 1-d values).
        shapes: of all parameters to be named, in model order.
    """
    parts: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in shapes}
    for name, start, values in owned:
        parts[name].append((start, values.detach()))
    return {f"{kind}/{name}": Ranges(torch.Size(shapes[name]).numel(), tuple(found)) for name, found in parts.items()}
