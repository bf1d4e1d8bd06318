"""Tensors in files: as they were, one at a time, and whole or not at all."""

from pathlib import Path

import pytest
import torch

from m4v_dist import storage, tensor_files


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.tensor([1, 2], dtype=torch.bfloat16)}
    path = str(tmp_path / "t.safetensors")
    tensor_files.write_tensors(path, tensors, {"kind": "test"})
    read = tensor_files.read_tensors(path)
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    assert tensor_files.read_tensor_metadata(path) == {"kind": "test"}


def test_streamed_tensors_are_a_safetensors_file_and_are_read_one_at_a_time(tmp_path: Path) -> None:
    tensors = {
        "z": torch.arange(6.0).reshape(2, 3).t(),
        "a": torch.tensor([True, False, True]),
        "m": torch.tensor(2.5, dtype=torch.bfloat16),
        "none": torch.zeros(0, 4),
    }
    path = str(tmp_path / "folder" / "t.safetensors")
    tensor_files.stream_tensors(path, tensors, {"kind": "test"})
    whole, file = tensor_files.read_tensors(path), tensor_files.TensorFile(path)
    assert whole.keys() == file.layout.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = file.read(name)
        assert torch.equal(read, tensor) and torch.equal(whole[name], tensor) and read.dtype == tensor.dtype
    assert file.layout["z"] == ((3, 2), "float32")
    assert tensor_files.read_tensor_metadata(path) == {"kind": "test"}


def test_a_failed_stream_leaves_the_file_that_was_there_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "t.safetensors")
    tensor_files.stream_tensors(path, {"a": torch.ones(2)})

    def full(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tensor_files.stream_tensors(path, {"a": torch.zeros(2)})
    assert storage.list_folder(str(tmp_path)) == ["t.safetensors"]
    assert torch.equal(tensor_files.read_tensors(path)["a"], torch.ones(2))
