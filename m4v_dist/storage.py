"""Local and `s3://` paths behind one door: open, list, exists, atomic put, remove, and safetensors bytes.

The only file that imports s3fs, botocore and safetensors. Paths are strings; `s3://bucket/key` is remote, all else is
local.
Writes become visible at once or not at all: a local file is written beside its final name and renamed, an S3 object
appears when its upload is complete.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import load as _load_tensor_bytes
from safetensors.torch import save as _save_tensor_bytes
from torch import Tensor

from m4v_dist.errors import StoreError


def is_remote(path: str) -> bool:
    """Whether `path` names an object store."""
    return path.startswith("s3://")


def join(base: str, *parts: str) -> str:
    """Join path parts with one slash each, local or remote."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def _s3() -> Any:
    import s3fs

    # Explicit timeouts and retries: the defaults let a stalled server hold a job for minutes.
    config = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 8, "mode": "adaptive"}}
    return s3fs.S3FileSystem(config_kwargs=config, use_listings_cache=False)


@contextmanager
def _remote(path: str) -> Iterator[Any]:
    """The object store's file system; what it answers is an OSError, as on a local disk.

    s3fs turns answers into OSErrors, but not what stops a request before it is sent: no credentials, no region, no
    server.

    Raises:
        StoreError: it cannot be asked, or refuses these credentials.
    """
    from botocore.exceptions import BotoCoreError

    try:
        yield _s3()
    except (BotoCoreError, PermissionError) as error:
        raise StoreError(
            f"{path}: {type(error).__name__}: {error}. The store takes credentials and endpoint from the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; AWS_ENDPOINT_URL where it is not AWS) or "
            "from the machine's role; every node needs them."
        ) from error


def exists(path: str) -> bool:
    """Whether a file or folder stands at `path`."""
    if is_remote(path):
        with _remote(path) as filesystem:
            return bool(filesystem.exists(path))
    return os.path.exists(path)


def is_file(path: str) -> bool:
    """Whether a file, and no folder, stands at `path`."""
    if is_remote(path):
        with _remote(path) as filesystem:
            return bool(filesystem.isfile(path))
    return os.path.isfile(path)


def shown(path: str) -> str:
    """The path for a message: behind a relative one stands where it leads from here."""
    return path if is_remote(path) or os.path.isabs(path) else f"{path} ({os.path.abspath(path)})"


def size_bytes(path: str) -> int:
    """Size of the file at `path`, in bytes."""
    if is_remote(path):
        with _remote(path) as filesystem:
            return int(filesystem.size(path))
    return os.path.getsize(path)


def list_folder(path: str) -> list[str]:
    """Names (not paths) of what stands directly in a folder, sorted; empty if there is no such folder."""
    if is_remote(path):
        with _remote(path) as filesystem:
            # Not asked by exists(): of a bucket's own root, that says "no" for every error.
            try:
                entries = filesystem.ls(path, detail=False)
            except FileNotFoundError:
                return []
            return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)
    return sorted(os.listdir(path)) if os.path.isdir(path) else []


def make_folder(path: str) -> None:
    """Make a local folder with its parents; object stores have none to make."""
    if not is_remote(path):
        os.makedirs(path, exist_ok=True)


@contextmanager
def open_read(path: str) -> Iterator[IO[bytes]]:
    """Open for reading bytes."""
    if is_remote(path):
        with _remote(path) as filesystem, filesystem.open(path, "rb") as file:
            yield file
    else:
        with open(path, "rb") as file:
            yield file


def read_bytes(path: str, offset: int = 0, length: int | None = None) -> bytes:
    """Read `length` bytes from `offset` (all to the end when None): a ranged read, local or remote.

    Raises:
        EOFError: the file holds fewer bytes than were asked for.
    """
    if is_remote(path):
        end = None if length is None else offset + length
        with _remote(path) as filesystem:
            data = bytes(filesystem.cat_file(path, start=offset, end=end))
    else:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read() if length is None else file.read(length)
    if length is not None and len(data) != length:
        raise EOFError(f"{path}: asked for {length} bytes at offset {offset}, got {len(data)}; the file is cut short.")
    return data


def write_bytes(path: str, data: bytes) -> None:
    """Write a whole file so that readers see all of it or nothing."""
    if is_remote(path):
        with _remote(path) as filesystem:
            filesystem.pipe_file(path, data)
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.tmp-{uuid.uuid4().hex[:8]}"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def put_file(local_path: str, path: str) -> None:
    """Move a finished local file to its place, at once."""
    if is_remote(path):
        with _remote(path) as filesystem:
            filesystem.put_file(local_path, path)
        os.remove(local_path)
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.tmp-{uuid.uuid4().hex[:8]}"
    shutil.move(local_path, temporary)
    os.replace(temporary, path)


def remove(path: str) -> None:
    """Remove a file, or a folder with all in it; nothing happens if there is none."""
    if is_remote(path):
        if exists(path):
            with _remote(path) as filesystem:
                filesystem.rm(path, recursive=True)
    elif os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)


def read_json(path: str) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: not JSON; the message names the file.
    """
    try:
        return json.loads(read_bytes(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}); the file is damaged, remove it or write it anew."
        ) from error


def parse_json_lines(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """Parse JSON objects, one a line, as an append-only writer leaves them; empty lines are passed over.

    Returns:
        The objects in order, and the number of lines that are none: torn by a lost node or a full disk. A caller counts
        them aloud, or fails.
    """
    rows: list[dict[str, Any]] = []
    num_torn = 0
    for line in data.split(b"\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        # ValueError: no JSON, or bytes that are no UTF-8 (a block that the disk never got).
        except ValueError:
            num_torn += 1
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            num_torn += 1
    return rows, num_torn


def write_json(path: str, value: Any) -> None:
    """Write JSON with sorted keys, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


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


def write_tensors(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    write_bytes(path, tensors_to_bytes(tensors, metadata))


def stream_tensors(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a local safetensors file atomically, tensor by tensor: for what memory cannot hold twice.

    Args:
        path: the file.
        tensors: on the CPU; in the order of their names in the file.
        metadata: kept in the header.
    """
    names = {dtype: name for name, dtype in _TENSOR_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    end = 0
    for name, tensor in sorted(tensors.items()):
        start, end = end, end + tensor.nbytes
        dtype = names[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    # The format aligns the data to 8 bytes, by spaces after the header.
    text += b" " * (-len(text) % 8)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, tensor in sorted(tensors.items()):
                file.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        remove(temporary)


def read_tensors(path: str) -> dict[str, Tensor]:
    """Read a safetensors file to CPU tensors, local or remote."""
    return tensors_from_bytes(read_bytes(path))


class TensorFile:
    """A safetensors file by its header: layout, and tensors one at a time by a ranged read each; local or remote.

    Args:
        path: the file.

    Raises:
        ValueError: no safetensors file, or a cut one; the message names the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        size = size_bytes(path)
        length = int.from_bytes(read_bytes(path, 0, min(8, size)), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path}: {size} bytes are no safetensors file, or a cut one.")
        try:
            header = json.loads(read_bytes(path, 8, length))
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
            raw = torch.frombuffer(bytearray(read_bytes(self.path, start, stop - start)), dtype=torch.uint8)
            tensor.view(-1).view(torch.uint8).copy_(raw)
        return tensor


def read_tensor_metadata(path: str) -> dict[str, str]:
    """Read the metadata of a local safetensors file."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
