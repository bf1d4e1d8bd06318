"""Safetensors: named tensors to bytes and back, files by their header, tensors one at a time; local or remote.

The only file that imports safetensors. Where the bytes lie is `storage.py`'s.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load as _load_tensor_bytes
from safetensors.torch import save as _save_tensor_bytes
from torch import Tensor

from m4v_dist import storage

_TENSOR_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
}  # fmt: skip


def tensors_to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Serialise named tensors as safetensors; equal tensors give equal bytes."""
    return _save_tensor_bytes({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata or {}))


def tensors_from_bytes(data: bytes) -> dict[str, Tensor]:
    """Read safetensors bytes."""
    return _load_tensor_bytes(data)


def tensor_views(data: Tensor, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Tensors of safetensors bytes that lie in memory already: views, nothing is copied.

    Args:
        data: n, uint8, on the CPU: a whole safetensors file. Tensors that do not start at a multiple of their element's
            size in its storage are copied.
        names: those that are wanted; None: all.

    Raises:
        ValueError: it is none, or is cut short.
        KeyError: it holds no tensor of such a name.
    """
    length = int.from_bytes(data[:8].numpy().tobytes(), "little")
    try:
        header = json.loads(data[8 : 8 + length].numpy().tobytes())
        found = {}
        for name in header.keys() - {"__metadata__"} if names is None else names:
            entry = header[name]
            start, stop = (8 + length + int(end) for end in entry["data_offsets"])
            dtype = getattr(torch, _TENSOR_DTYPES[entry["dtype"]])
            part = data[start:stop]
            if part.storage_offset() % dtype.itemsize:
                part = part.clone()
            found[name] = part.view(dtype).view(entry["shape"])
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{len(data)} bytes are no safetensors file, or a cut one ({error}).") from error
    return found


def write_tensors(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    storage.write_bytes(path, tensors_to_bytes(tensors, metadata))


def stream_tensors(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a local safetensors file atomically, tensor by tensor: for what memory cannot hold twice.

    Args:
        path: the file.
        tensors: on the CPU; in the order of their names in the file.
        metadata: kept in the header.
    """
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(tensors.items())}
    header = tensor_header(layout, metadata)

    def chunks() -> Iterator[bytes | memoryview]:
        yield header
        for _, tensor in sorted(tensors.items()):
            yield tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data

    storage.write_chunks(path, chunks, len(header) + sum(tensor.nbytes for tensor in tensors.values()))


def tensor_header(
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """What a safetensors file begins with; the tensors' bytes follow, in the layout's order, without gaps.

    Args:
        layout: shape and dtype of each tensor, by name.
        metadata: kept in the header.
    """
    names = {dtype: name for name, dtype in _TENSOR_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    end = 0
    for name, (shape, dtype) in layout.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        name_of_dtype = names[str(dtype).removeprefix("torch.")]
        header[name] = {"dtype": name_of_dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    # The format aligns the data to 8 bytes, by spaces after the header.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_tensors(path: str) -> dict[str, Tensor]:
    """Read a safetensors file to CPU tensors, local or remote."""
    return tensors_from_bytes(storage.read_bytes(path))


class TensorFile:
    """A safetensors file by its header: layout, and tensors one at a time by a ranged read each; local or remote.

    Args:
        path: the file.

    Raises:
        ValueError: no safetensors file, or a cut one; the message names the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        size = storage.size_bytes(path)
        length = int.from_bytes(storage.read_bytes(path, 0, min(8, size)), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path}: {size} bytes are no safetensors file, or a cut one.")
        try:
            header = json.loads(storage.read_bytes(path, 8, length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            self._ranges = {
                name: (8 + length + int(entry["data_offsets"][0]), 8 + length + int(entry["data_offsets"][1]))
                for name, entry in entries.items()
            }
            self.layout: dict[str, tuple[tuple[int, ...], str]] = {
                name: (tuple(entry["shape"]), _TENSOR_DTYPES.get(entry["dtype"], entry["dtype"]))
                for name, entry in entries.items()
            }
        # ValueError: no JSON, no UTF-8; the others: JSON of another shape
        except (ValueError, AttributeError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{path}: the header is no safetensors header ({error}).") from error
        end = max((stop for _, stop in self._ranges.values()), default=8 + length)
        if end != size:
            raise ValueError(f"{path}: holds {size} bytes, its header names {end}: it is cut short.")

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in the dtype of the file.

        Raises:
            ValueError: the header gives it another number of bytes than its shape and dtype have.
        """
        shape, dtype = self.layout[name]
        start, stop = self._ranges[name]
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        if tensor.nbytes != stop - start:
            raise ValueError(
                f"{self.path}: {name} of shape {list(shape)} and {dtype} has {tensor.nbytes} bytes, but the header "
                f"gives it {stop - start}."
            )
        if tensor.nbytes:
            raw = torch.frombuffer(bytearray(storage.read_bytes(self.path, start, stop - start)), dtype=torch.uint8)
            tensor.view(-1).view(torch.uint8).copy_(raw)
        return tensor


def read_tensor_metadata(path: str) -> dict[str, str]:
    """Read the metadata of a local safetensors file."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
