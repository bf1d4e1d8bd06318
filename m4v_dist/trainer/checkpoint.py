"""Checkpoints: what a folder holds, which one counts, how it is read, which ones go. Written by `checkpoint_save.py`.

`step_00000120/` holds `attempt_0003/`, the files of the attempt that wrote it:
    rank_00000.safetensors   of each rank: its ranges of weights/<parameter>, ema/<parameter>, exp_avg/<parameter> and
                             exp_avg_sq/<parameter>, 1-d float32, named <key>@<first element>; no ema where no stage of
                             the curriculum trains the parameter, no moments where this one does not
    rank_00000.json          of each rank: sums and ranges of that file, and the rank's random state
    index.json               of each key: its size, and its ranges or the rule that they follow (`checkpoint_index.py`)
    state.json config.json   step, curriculum position, loader, optimizer steps, counts, shapes; the resolved config
and, last of all, `COMMITTED`: the attempt's number, and of each file its size and a checksum for each megabyte. A
folder without it is no checkpoint: it is named in the log and passed over. `DAMAGED` says why a marker was taken away.

An attempt writes in a folder of its own, and takes only an earlier attempt's marker and files away: one that was
declared dead and goes on all the same can spoil nothing that a later one wrote.
A parameter is stored flattened, each rank's range on its own, so any world size and ZeRO stage reads it back without a
conversion. The optimizer's settings (lr, decay) are not in it: they come from the config.
"""

import json
import logging
import os
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m4v_dist import storage
from m4v_dist.errors import DamagedCheckpointError, DataError
from m4v_dist.trainer.block_file import FileSums, read_file
from m4v_dist.trainer.checkpoint_index import IndexEntry, read_index
from m4v_dist.trainer.range_reader import Span, fill, spans_of
from m4v_dist.trainer.ranges import Ranges

logger = logging.getLogger(__name__)

FORMAT = 3
READ_FORMATS = (2, 3)
"""Of format 2 the index has all ranges written out; the rest is the same."""
COMMITTED = "COMMITTED"
DAMAGED = "DAMAGED"
_FOLDER = re.compile(r"^step_(\d{8})$")
_ATTEMPT = re.compile(r"^attempt_(\d+)$")


def folder_name(step: int) -> str:
    """Name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def attempt_folder(path: str, attempt: int) -> str:
    """Where an attempt writes the checkpoint at `path`."""
    return storage.join(path, f"attempt_{attempt:04d}")


def attempt_of(name: str) -> int | None:
    """The attempt whose files a folder of that name holds; None for any other name."""
    match = _ATTEMPT.match(name)
    return None if match is None else int(match.group(1))


def step_of(path: str) -> int:
    """The step that a checkpoint path names."""
    match = _FOLDER.match(path.rstrip("/").rsplit("/", 1)[-1])
    if match is None:
        raise DataError(f"{path} is no checkpoint folder; they are called {folder_name(120)}.")
    return int(match.group(1))


@dataclass(frozen=True)
class Marker:
    """What COMMITTED says.

    Args:
        attempt: who wrote it.
        folder: of the files.
        files: sums of each file by its name there.
    """

    attempt: int
    folder: str
    files: Mapping[str, FileSums]

    def path(self, name: str) -> str:
        """Path of one of the files."""
        return storage.join(self.folder, name)

    def read_json(self, name: str) -> dict[str, Any]:
        """One of the JSON files, verified.

        Raises:
            DamagedCheckpointError: it is missing, or not what was written.
        """
        if name not in self.files:
            path = self.folder.rpartition("/")[0]
            raise DamagedCheckpointError(f"{self.path(name)}: no such file in the commit; {_way_out(path)}")
        value: dict[str, Any] = json.loads(read_file(self.path(name), self.files[name]))
        return value

    def read_index(self) -> dict[str, IndexEntry]:
        """Where each tensor is, by its key.

        Raises:
            DamagedCheckpointError: the index is missing, or not what was written.
        """
        return read_index(self.read_json("index.json"))


def marker_json(step: int, attempt: int, files: Mapping[str, FileSums]) -> bytes:
    """What `read_marker` reads."""
    sums = {name: files[name].to_json() for name in sorted(files)}
    return json.dumps({"format": FORMAT, "step": step, "attempt": attempt, "files": sums}).encode()


def read_marker(path: str) -> Marker:
    """Read a committed checkpoint's marker.

    Raises:
        DataError: not committed, or of another format.
        DamagedCheckpointError: the marker is no such JSON.
    """
    require_committed(path)
    file = storage.join(path, COMMITTED)
    try:
        value = json.loads(storage.read_bytes(file))
        found = 1 if "size_bytes" in value else value["format"]
        if found in READ_FORMATS:
            files = {name: FileSums.from_json(sums) for name, sums in value["files"].items()}
            attempt = int(value["attempt"])
            return Marker(attempt, attempt_folder(path, attempt), files)
    # ValueError: no JSON, or bytes that are no text; the others: JSON of another shape
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(
            f"{file}: no marker of a checkpoint ({type(error).__name__}: {error}); {_way_out(path)}"
        ) from error
    read = ", ".join(map(str, READ_FORMATS))
    raise DataError(
        f"{path}: checkpoint format {found}, but this code reads formats {read}; go on with the code that wrote it, or "
        "give another run.folder."
    )


def _way_out(path: str) -> str:
    return f"the checkpoint is damaged: training goes on from the one before it; to do so by hand, remove {path}."


def load(path: str, tensors: Mapping[str, Ranges], *, may_miss: Collection[str] = ()) -> None:
    """Fill `tensors` in place from a committed checkpoint; each rank for itself, what it needs and no more.

    Args:
        path: of the checkpoint.
        tensors: keyed `<kind>/<parameter>`.
        may_miss: kinds of which what is not stored stays as it is.

    Raises:
        DataError: a tensor is missing or has another size.
        DamagedCheckpointError: a file is not what was written.
    """
    marker = check(path)
    index = marker.read_index()
    wanted: dict[str, list[Span]] = {}
    for key, ranges in tensors.items():
        entry = index.get(key)
        if entry is None and key.split("/", 1)[0] in may_miss:
            continue
        if entry is None or entry.num_elements != ranges.num_elements:
            size = "nothing" if entry is None else f"{entry.num_elements}"
            raise DataError(
                f"{path}: {key} needs {ranges.num_elements} elements, but the checkpoint has {size}; it was written by "
                "another model: use its config, or a fresh run.folder."
            )
        for start, values in ranges.parts:
            for rank, span in spans_of(entry.parts, start, values):
                wanted.setdefault(rank_file(rank), []).append(span)
    for name, spans in wanted.items():
        fill(marker.path(name), marker.files[name], spans)


def stored_names(path: str, kind: str) -> set[str]:
    """Parameters that a committed checkpoint holds a `kind` of: weights, ema, exp_avg, exp_avg_sq.

    Raises:
        DamagedCheckpointError: its index is not what was written.
    """
    index = check(path).read_index()
    return {key.removeprefix(f"{kind}/") for key in index if key.startswith(f"{kind}/")}


def stored_keys(path: str, kind: str, names: Collection[str]) -> dict[str, str]:
    """Under which key each parameter's `kind` stands: of an average that is not stored, the weights'."""
    stored = stored_names(path, kind)
    return {name: f"{kind if name in stored or kind != 'ema' else 'weights'}/{name}" for name in names}


def rank_file(rank: int, suffix: str = "safetensors") -> str:
    """Name of a rank's file."""
    return f"rank_{rank:05d}.{suffix}"


def read_state(path: str) -> dict[str, Any]:
    """Read a checkpoint's `state.json`.

    Raises:
        DataError: not committed, damaged, or of another format.
    """
    return read_marker(path).read_json("state.json")


def read_config(path: str) -> dict[str, Any]:
    """Read the resolved config that a checkpoint was written under, as JSON values.

    Raises:
        DataError: not committed, damaged, or of another format.
    """
    return read_marker(path).read_json("config.json")


def read_random_state(path: str, rank: int) -> dict[str, Any] | None:
    """The random state that `rank` had; None if there was no such rank at the save: it keeps its own.

    Training draws everything from slot seeds; this covers what a library may draw beside them.

    Raises:
        DataError: not committed, damaged, or of another format.
    """
    marker, name = read_marker(path), rank_file(rank, "json")
    if name not in marker.files:
        logger.info("rank %d: no saved random state in %s (another world size).", rank, path)
        return None
    state: dict[str, Any] = marker.read_json(name)["random"]
    return state


def load_weights(path: str) -> dict[str, Tensor]:
    """Read all weights of a checkpoint as whole float32 tensors; needs no process group.

    Raises:
        DataError: not a committed checkpoint, or damaged.
    """
    return _load_whole(path, "weights")


def load_ema_weights(path: str) -> dict[str, Tensor]:
    """The same for the moving average of the weights; the weight itself where no stage trains it."""
    return _load_whole(path, "ema")


def _load_whole(path: str, kind: str) -> dict[str, Tensor]:
    shapes: dict[str, list[int]] = read_state(path)["shapes"]
    flats = {name: torch.empty(torch.Size(shape).numel()) for name, shape in shapes.items()}
    keys = stored_keys(path, kind, flats)
    load(path, {keys[name]: Ranges(flat.numel(), ((0, flat),)) for name, flat in flats.items()})
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


def check(path: str) -> Marker:
    """Compare the files of a committed checkpoint with the sizes that were committed; return its marker.

    Raises:
        DataError: not committed, or of another format.
        DamagedCheckpointError: a file is missing or has another size.
    """
    marker = read_marker(path)
    found = storage.list_sizes(marker.folder)
    for name, sums in marker.files.items():
        if found.get(name) != sums.size_bytes:
            raise DamagedCheckpointError(
                f"{marker.path(name)}: {found.get(name)} bytes, but {sums.size_bytes} were committed; {_way_out(path)}"
            )
    return marker


def condemn(path: str, reason: str) -> None:
    """Take a damaged checkpoint out of the choice for good: note the reason in it, then remove its marker."""
    storage.write_json(storage.join(path, DAMAGED), {"reason": reason, "time": time.time()})
    unmark(path)


def unmark(path: str) -> None:
    """Take a checkpoint's marker away, if there is one, before its files go; a loss of power does not bring it back."""
    storage.remove(storage.join(path, COMMITTED))
    storage.sync_folder(path)


def list_committed(folder: str) -> list[str]:
    """Names of the committed checkpoints of a `checkpoints` folder, oldest first; the others are named in the log."""
    committed = []
    for name in storage.list_folder(folder):
        if not _FOLDER.match(name):
            continue
        if is_committed(storage.join(folder, name)):
            committed.append(name)
        else:
            is_damaged = storage.exists(storage.join(folder, name, DAMAGED))
            what = "damaged checkpoint" if is_damaged else "uncommitted checkpoint (a save that was cut off)"
            logger.warning("%s: %s, passed over.", f"{folder}/{name}", what)
    return committed


def newest_committed(folder: str) -> str | None:
    """Path of the newest committed checkpoint, or None."""
    names = list_committed(folder)
    return storage.join(folder, names[-1]) if names else None


def newest_sound(folder: str) -> str | None:
    """Path of the newest committed checkpoint that looks sound, or None if none stands.

    By the sizes of its files, and by state and config; changes nothing: it is what a preflight expects training to go
    on from. Damaged ones are named in the log.

    Raises:
        DataError: checkpoints stand there, and all are damaged.
    """
    names = list_committed(folder)
    for name in reversed(names):
        try:
            marker = check(storage.join(folder, name))
            for part in ("state.json", "config.json"):
                marker.read_json(part)
        except DamagedCheckpointError as error:
            logger.warning("%s", error)
        else:
            return storage.join(folder, name)
    if names:
        raise DataError(
            f"{folder}: all committed checkpoints are damaged ({', '.join(names)}; the log says how); remove them to "
            "begin anew, or put a copy of one in its place."
        )
    return None


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
        unmark(storage.join(folder, name))
        storage.remove(storage.join(folder, name))
    return removed
