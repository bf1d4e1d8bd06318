"""Paths behind one door: whole writes, reads that notice a cut, a store that cannot be asked."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from m4v_dist import storage
from m4v_dist.errors import StoreError


@pytest.mark.parametrize(
    ("ask", "path"),
    [
        (storage.list_folder, "s3://bucket"),
        (storage.list_folder, "s3://bucket/folder"),
        (storage.exists, "s3://bucket/folder/file"),
        (storage.size_bytes, "s3://bucket/folder/file"),
        (storage.read_bytes, "s3://bucket/folder/file"),
    ],
)
def test_a_store_that_cannot_be_asked_is_not_an_empty_one(
    ask: Callable[[str], object], path: str, no_credentials: None
) -> None:
    with pytest.raises(StoreError, match=f"^{path}: NoCredentialsError.*AWS_ACCESS_KEY_ID"):
        ask(path)


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "a.json")
    storage.write_json(path, {"step": 1})

    def full(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write_json(path, {"step": 2})
    assert storage.read_json(path) == {"step": 1}


def test_a_read_past_the_end_says_what_was_asked_and_what_there_is(tmp_path: Path) -> None:
    path = str(tmp_path / "shard.tar")
    storage.write_bytes(path, b"0123456789")
    assert storage.read_bytes(path, 2, 3) == b"234"
    with pytest.raises(EOFError, match=r"asked for 5 bytes at offset 8, got 2"):
        storage.read_bytes(path, 8, 5)


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.tensor([1, 2], dtype=torch.bfloat16)}
    path = str(tmp_path / "t.safetensors")
    storage.write_tensors(path, tensors, {"kind": "test"})
    read = storage.read_tensors(path)
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    assert storage.read_tensor_metadata(path) == {"kind": "test"}


def test_streamed_tensors_are_a_safetensors_file_and_are_read_one_at_a_time(tmp_path: Path) -> None:
    tensors = {
        "z": torch.arange(6.0).reshape(2, 3).t(),
        "a": torch.tensor([True, False, True]),
        "m": torch.tensor(2.5, dtype=torch.bfloat16),
        "none": torch.zeros(0, 4),
    }
    path = str(tmp_path / "folder" / "t.safetensors")
    storage.stream_tensors(path, tensors, {"kind": "test"})
    whole, file = storage.read_tensors(path), storage.TensorFile(path)
    assert whole.keys() == file.layout.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = file.read(name)
        assert torch.equal(read, tensor) and torch.equal(whole[name], tensor) and read.dtype == tensor.dtype
    assert file.layout["z"] == ((3, 2), "float32")
    assert storage.read_tensor_metadata(path) == {"kind": "test"}


def test_a_failed_stream_leaves_the_file_that_was_there_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "t.safetensors")
    storage.stream_tensors(path, {"a": torch.ones(2)})

    def full(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.stream_tensors(path, {"a": torch.zeros(2)})
    assert storage.list_folder(str(tmp_path)) == ["t.safetensors"]
    assert torch.equal(storage.read_tensors(path)["a"], torch.ones(2))


def test_torn_lines_are_counted() -> None:
    rows, num_torn = storage.parse_json_lines(b'{"a": 1}\n\n{"b": \n\xff\xfe\n3\n{"c": 2}\n')
    assert rows == [{"a": 1}, {"c": 2}] and num_torn == 3
