"""The files of a checkpoint: one file, a folder with one, or shards with or without an index; read tensor by tensor.

Knows no parameter's name. What one file may be stands in `weights_file.py`.
"""

import logging
import re
from collections.abc import Sequence

from torch import Tensor

from m4v_dist import storage
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.weights_file import PICKLES, SAFETENSORS, TensorLayout, WeightsFile

logger = logging.getLogger(__name__)

INDEX = ".index.json"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")


class CheckpointReader:
    """One state dict over one or more files: its layout, and each tensor when it is asked for.

    Args:
        files: of `find_files`.

    Raises:
        DataError: a file is damaged or no state dict, or two hold the same name.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self.files = tuple(files)
        self.layout: dict[str, TensorLayout] = {}
        self._file_of: dict[str, str] = {}
        self._opened = {path: WeightsFile(path) for path in files}
        for path, opened in self._opened.items():
            twice = sorted(opened.layout.keys() & self.layout.keys())
            if twice:
                raise DataError(f"{path} and {self._file_of[twice[0]]} both hold {twice[0]}; remove one of the two.")
            self.layout |= opened.layout
            self._file_of |= dict.fromkeys(opened.layout, path)

    def read(self, name: str) -> Tensor:
        """A tensor as float32 on the CPU.

        Raises:
            DataError: the file is damaged, or a weight is not finite.
        """
        path = self._file_of[name]
        tensor = self._opened[path].read(name)
        if not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            raise DataError(
                f"{path}: {name}: {bad} of {tensor.numel()} weights are not finite; take a checkpoint that is whole."
            )
        return tensor


def find_files(path: str, setting: str) -> list[str]:
    """Find the weights files at `path`, local or s3://.

    Args:
        path: a weights file; or an index of shards beside it; or a folder that holds an index and its shards, all
            shards of one set, or one file.
            Where a folder holds safetensors and pickles, the safetensors are taken.
        setting: what names the path in the config, for messages.

    Raises:
        ConfigError: nothing is there, or a file of another kind, or several checkpoints that no index tells apart.
        DataError: a file of the set is missing, or the index is damaged.
    """
    path = path.rstrip("/")
    if not storage.exists(path):
        raise ConfigError(
            f"{setting}={storage.shown(path)}: there is no such file or folder; give a checkpoint's file or folder."
        )
    if path.endswith(SAFETENSORS + PICKLES):
        return [path]
    if storage.is_file(path):
        return _from_index(path, setting)
    there = storage.list_folder(path)
    for suffixes in (SAFETENSORS, PICKLES):
        indices = [name for name in there if name.endswith(_with_index(suffixes))]
        names = [name for name in there if name.endswith(suffixes)]
        if len(indices) == 1:
            return _indexed(path, indices[0], there)
        if len(names) == 1 and _SHARD.fullmatch(names[0]) is None:
            return [storage.join(path, names[0])]
        if len(indices) > 1 or names:
            return _shards(path, [*indices, *names], setting)
    raise ConfigError(
        f"{setting}={path}: no {', '.join(SAFETENSORS + PICKLES)} file in it (it holds {there[:6]}); of a release, "
        "give the folder of the transformer, such as diffusion_transformer_384p."
    )


def _with_index(suffixes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(suffix + INDEX for suffix in suffixes)


def _from_index(path: str, setting: str) -> list[str]:
    """The shards beside an index that is named itself."""
    folder, _, name = path.rpartition("/")
    if not name.endswith(_with_index(SAFETENSORS + PICKLES)):
        _, dot, suffix = name.rpartition(".")
        kind = f"ending in .{suffix}" if dot else "without an ending"
        raise ConfigError(
            f"{setting}={path}: is a file {kind}; read are {', '.join(SAFETENSORS + PICKLES)}, and an index of them "
            f"({SAFETENSORS[0]}{INDEX}). Rename it if it is one of these, or convert it."
        )
    return _indexed(folder or ".", name, storage.list_folder(folder or "."))


def _indexed(folder: str, index: str, there: Sequence[str]) -> list[str]:
    path = storage.join(folder, index)
    try:
        weight_map = storage.read_json(path)["weight_map"]
        names = sorted(set(weight_map.values()))
    # ValueError: no JSON; the others: JSON of another shape
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: is no index of shards ({error!r}); fetch it again.") from error
    missing = [name for name in names if name not in there]
    if missing:
        raise DataError(f"{path}: names {len(names)} files, but {missing} are not there; fetch them.")
    return [storage.join(folder, name) for name in names]


def _shards(folder: str, names: Sequence[str], setting: str) -> list[str]:
    """All of one set `stem-00001-of-00002.suffix`, and nothing beside it."""
    matches = [_SHARD.fullmatch(name) for name in names]
    sets = {(match["stem"], match["count"], match["suffix"]) for match in matches if match is not None}
    if None in matches or len(sets) != 1:
        raise ConfigError(f"{setting}={folder}: holds several checkpoints ({list(names)[:6]}); name one of the files.")
    stem, count, suffix = next(iter(sets))
    wanted = [f"{stem}-{number:05d}-of-{count}{suffix}" for number in range(1, int(count) + 1)]
    missing = [name for name in wanted if name not in names]
    if missing:
        raise DataError(f"{folder}: {len(names)} of {int(count)} shards are there, {missing} are not; fetch them.")
    return [storage.join(folder, name) for name in wanted]
