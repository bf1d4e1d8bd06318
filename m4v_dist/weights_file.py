"""Released weights from a file, strictly: names, shapes and dtypes are compared before a tensor is read.

safetensors, or what `torch.save` wrote of a state dict (`.bin`, `.pt`, `.pth`; read with weights_only, so that a file
runs no code). Local or s3://. Weights are handed out in float32: float32, bfloat16 and float16 all fit in it.
"""

import hashlib
import logging
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from m4v_dist import storage, tensor_files
from m4v_dist.errors import DataError

logger = logging.getLogger(__name__)

SAFETENSORS = (".safetensors",)
PICKLES = (".bin", ".pt", ".pth")
DTYPES = ("float32", "bfloat16", "float16")
"""What weights may be stored in."""
WRAPPERS = ("module", "model", "state_dict")
"""Keys under which trainers save a state dict beside other things; DeepSpeed's is the first."""
_NUM_NAMED = 5
_HASH_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class TensorLayout:
    """Shape and dtype (torch's name of it) of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: str


def read_layout(path: str) -> dict[str, TensorLayout]:
    """Names, shapes and dtypes of a weights file; of safetensors only the header is read.

    Raises:
        DataError: the file is damaged, or no state dict, or of another kind.
    """
    return _tensor_file_layout(_open(path)) if path.endswith(SAFETENSORS) else _state_layout(unpickle(path, "meta"))


class WeightsFile:
    """A weights file, opened: its layout, and its tensors one at a time, so that memory need not hold them all.

    Args:
        path: the file. A pickle is mapped where that can be done: it must stand as long as it is read.

    Raises:
        DataError: see `read_layout`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._tensors = _open(path) if path.endswith(SAFETENSORS) else unpickle(path, "cpu", is_mapped=True)
        if isinstance(self._tensors, dict):
            self.layout = _state_layout(self._tensors)
        else:
            self.layout = _tensor_file_layout(self._tensors)

    def read(self, name: str) -> Tensor:
        """A tensor as float32 on the CPU; may be a view of the file.

        Raises:
            DataError: the file is damaged.
        """
        if isinstance(self._tensors, dict):
            return self._tensors[name].float()
        try:
            return self._tensors.read(name).float()
        except ValueError as error:
            raise DataError(f"{error} Fetch the file again.") from error


def load_weights(module: nn.Module, path: str) -> None:
    """Give `module` (on the meta device, or real) the file's weights as float32 on the CPU; strict.

    Raises:
        DataError: see `read_layout` and `require_layout`.
    """
    require_layout(path, read_layout(path), module.state_dict())
    tensors = tensor_files.read_tensors(path) if path.endswith(SAFETENSORS) else unpickle(path, "cpu")
    module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)


@torch.no_grad()
def fill_weights(
    module: nn.Module, file: WeightsFile, prefix: str = "", *, stays: Callable[[str], bool] = lambda _: False
) -> None:
    """Copy the file's weights into `module`'s own memory, tensor by tensor; strict.

    Args:
        module: the file's network, or a part of it.
        file: opened once for all parts.
        prefix: name of the part in the network; "" is the whole.
        stays: whether a tensor of this name is not in the file and stays as it is.

    Raises:
        DataError: see `read_layout` and `require_layout`.
    """
    start = f"{prefix}." if prefix else ""
    layout = {name.removeprefix(start): entry for name, entry in file.layout.items() if name.startswith(start)}
    wanted = {name: tensor for name, tensor in module.state_dict().items() if not stays(name)}
    require_layout(f"{file.path}: {prefix}" if prefix else file.path, layout, wanted)
    for name, tensor in wanted.items():
        tensor.copy_(file.read(start + name))


def require_layout(
    path: str,
    found: Mapping[str, TensorLayout],
    wanted: Mapping[str, Tensor],
    way_out: str = "Take the released file, and the config that belongs to it.",
) -> None:
    """Compare a file's layout with a state dict's; equal names and shapes, and dtypes that fit in float32.

    Args:
        path: the file, for the message.
        found: its layout.
        wanted: by name; may be on the meta device.
        way_out: a sentence that ends the message.

    Raises:
        DataError: with what is missing, extra, or of another shape or dtype (both values each).
    """
    problems = [
        *_describe("missing", sorted(wanted.keys() - found.keys())),
        *_describe("too many", sorted(found.keys() - wanted.keys())),
        *_describe(
            "of another shape",
            [
                f"{name}: file {list(found[name].shape)}, wanted {list(tensor.shape)}"
                for name, tensor in wanted.items()
                if name in found and found[name].shape != tuple(tensor.shape)
            ],
        ),
        *_describe(
            "of another dtype",
            [
                f"{name}: file {layout.dtype}, wanted {', '.join(DTYPES[:-1])} or {DTYPES[-1]}"
                for name, layout in found.items()
                if name in wanted and layout.dtype not in DTYPES
            ],
        ),
    ]
    if problems:
        raise DataError(
            f"{path}: these are not the weights of this network ({len(found)} tensors, wanted {len(wanted)}): "
            f"{'; '.join(problems)}. {way_out}"
        )


def sha256(path: str) -> str:
    """Hash of the file's bytes, read block by block."""
    digest = hashlib.sha256()
    with storage.open_read(path) as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _describe(what: str, entries: Sequence[str]) -> list[str]:
    if not entries:
        return []
    more = f", and {len(entries) - _NUM_NAMED} more" if len(entries) > _NUM_NAMED else ""
    return [f"{len(entries)} {what} ({', '.join(entries[:_NUM_NAMED])}{more})"]


def _open(path: str) -> tensor_files.TensorFile:
    try:
        return tensor_files.TensorFile(path)
    except ValueError as error:
        raise DataError(f"{error} Fetch the file again.") from error


def _tensor_file_layout(file: tensor_files.TensorFile) -> dict[str, TensorLayout]:
    return {name: TensorLayout(shape, dtype) for name, (shape, dtype) in file.layout.items()}


def _state_layout(state: Mapping[str, Tensor]) -> dict[str, TensorLayout]:
    return {
        name: TensorLayout(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in state.items()
    }


UNREADABLE = (
    RuntimeError, pickle.UnpicklingError, EOFError, AssertionError, LookupError, ValueError, TypeError, struct.error,
)  # fmt: skip
"""What torch's reader raises: no archive, or a cut one; more than tensors; empty; the others where it takes any bytes
for a pickle of old."""


def _why_unreadable(error: BaseException) -> str:
    """Our own words: torch's advise to run the file's code, and colour their text."""
    refused = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
    if refused is not None:
        return f"it holds objects that are not tensors ({refused[1]})"
    return f"it is no file of torch.save's, or a damaged one ({type(error).__name__})"


def _unwrapped(path: str, held: Any) -> Any:
    """What torch.save was given, or the one state dict that stands in it under a trainer's key, said aloud."""
    if not isinstance(held, dict) or _is_state(held):
        return held
    keys = [key for key in WRAPPERS if _is_state(held.get(key))]
    if len(keys) != 1:
        return held
    aside = sorted(str(key) for key in held if key != keys[0])
    logger.info("%s: taking the state dict under %r; left aside: %s", path, keys[0], ", ".join(aside) or "nothing")
    return held[keys[0]]


def _is_state(held: Any) -> bool:
    return isinstance(held, dict) and bool(held) and all(isinstance(value, Tensor) for value in held.values())


def unpickle(path: str, device: str, *, is_mapped: bool = False) -> dict[str, Tensor]:
    """Read a state dict that torch.save wrote, alone or under one of `WRAPPERS` at the top level; it runs no code.

    Args:
        path: a `.bin`, `.pt` or `.pth` file, local or s3://.
        device: "cpu", or "meta": the numbers stay in the file.
        is_mapped: the tensors of a local file are read when they are used, so they are whole only while it stands.

    Raises:
        DataError: another kind of file, a damaged one, or no state dict.
    """
    if not path.endswith(PICKLES):
        raise DataError(f"{path}: weights are read from {', '.join(SAFETENSORS + PICKLES)} files; convert it to one.")
    # What torch wrote before it wrote zip archives cannot be mapped.
    can_map = is_mapped and not storage.is_remote(path) and zipfile.is_zipfile(path)
    with storage.open_read(path) as file:
        try:
            state: Any = torch.load(path if can_map else file, map_location=device, mmap=can_map, weights_only=True)
        except UNREADABLE as error:
            raise DataError(
                f"{path}: torch.load(weights_only=True) cannot read it: {_why_unreadable(error)}; fetch it again, or "
                "save its state dict alone."
            ) from error
    state = _unwrapped(path, state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        held = f"keys {sorted(map(str, state))[:_NUM_NAMED]}" if isinstance(state, dict) else type(state).__name__
        raise DataError(f"{path}: holds no state dict of tensors but {held}; save the state dict alone.")
    return state
