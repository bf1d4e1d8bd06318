"""Weights are loaded strictly: names, shapes and dtypes are compared, and a damaged file is named."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from m4v_dist import tensor_files
from m4v_dist.errors import DataError
from m4v_dist.weights_file import PICKLES, TensorLayout, load_weights, read_layout, sha256


def tensors(**changed: Tensor | None) -> dict[str, Tensor]:
    values = {"weight": torch.randn(2, 3), "bias": torch.randn(2), **changed}
    return {name: tensor for name, tensor in values.items() if tensor is not None}


def write(path: Path, values: dict[str, Tensor]) -> str:
    if path.suffix == ".safetensors":
        tensor_files.write_tensors(str(path), values)
    else:
        torch.save(values, path)
    return str(path)


def linear() -> nn.Linear:
    with torch.device("meta"):
        return nn.Linear(3, 2)


@pytest.mark.parametrize("suffix", [".safetensors", *PICKLES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_arrive_in_float32_with_their_values(suffix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    values = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    path = write(tmp_path / f"weights{suffix}", values)
    name = str(dtype).removeprefix("torch.")
    assert read_layout(path) == {"weight": TensorLayout((2, 3), name), "bias": TensorLayout((2,), name)}
    module = linear()
    load_weights(module, path)
    assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight, values["weight"].float()) and torch.equal(module.bias, values["bias"].float())


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"bias": None}, r"1 missing \(bias\)"),
        ({"gain": torch.ones(1)}, r"1 too many \(gain\)"),
        ({"bias": torch.ones(5)}, r"1 of another shape \(bias: file \[5\], wanted \[2\]\)"),
        (
            {"bias": torch.ones(2, dtype=torch.int8)},
            r"1 of another dtype \(bias: file int8, wanted float32, bfloat16 or",
        ),
        ({"bias": torch.ones(2, dtype=torch.float64)}, r"bias: file float64, wanted float32"),
    ],
    ids=["missing", "extra", "shape", "integers", "float64"],
)
def test_what_does_not_fit_is_named_with_both_values(
    suffix: str, changed: dict[str, Tensor | None], words: str, tmp_path: Path
) -> None:
    path = write(tmp_path / f"weights{suffix}", tensors(**changed))
    module = linear()
    with pytest.raises(DataError, match=words) as raised:
        load_weights(module, path)
    assert path in str(raised.value)
    assert module.weight.is_meta, "nothing may be loaded from a file that does not fit"


def test_all_problems_are_in_one_message(tmp_path: Path) -> None:
    path = write(tmp_path / "weights.bin", tensors(bias=None, weight=torch.ones(1), gain=torch.ones(1)))
    with pytest.raises(DataError, match=r"2 tensors, wanted 2.*1 missing.*1 too many.*1 of another shape"):
        load_weights(linear(), path)


@pytest.mark.parametrize("kept_bytes", [0, 5, 40, -4])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_cut_file_is_refused_by_name(suffix: str, kept_bytes: int, tmp_path: Path) -> None:
    path = Path(write(tmp_path / f"weights{suffix}", tensors()))
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(DataError, match=rf"weights{suffix}.*(cut|damaged|no safetensors)"):
        load_weights(linear(), str(path))


def test_a_header_that_is_no_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    for text in (b"{broken", b"[1, 2]", b'{"a": {}}', b'{"a": 3}', b'{"a": {"data_offsets": []}}'):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(DataError, match=r"weights\.safetensors: .*header.*Fetch the file again"):
            read_layout(str(path))


def test_a_file_of_more_than_tensors_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    torch.save(linear(), path)
    with pytest.raises(DataError, match=r"weights_only=True\) cannot read it.*save its state dict alone") as raised:
        read_layout(str(path))
    # Ours, not torch's, which advise to run the file's code.
    assert "it holds objects that are not tensors (torch.nn.modules.linear.Linear)" in str(raised.value)
    assert "\x1b" not in str(raised.value) and "weights_only=False" not in str(raised.value)
    torch.save({"ema": tensors()}, path)
    with pytest.raises(DataError, match=r"no state dict of tensors but keys \['ema'\]"):
        read_layout(str(path))
    torch.save(torch.ones(2), path)
    with pytest.raises(DataError, match="no state dict of tensors but Tensor"):
        read_layout(str(path))


@pytest.mark.parametrize("text", [b"hello there", b"<html>" * 50, b"\x80\x02}q\x00.", b"PK\x03\x04", b"}", b"("])
def test_what_torch_save_never_wrote_is_refused(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(text)
    with pytest.raises(DataError, match=r"weights.pth: torch.load.* cannot read it: it is no file of torch.save's"):
        read_layout(str(path))


@pytest.mark.parametrize("key", ["module", "model", "state_dict"])
def test_a_state_dict_under_a_trainer_s_key_is_taken_and_said(
    key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, values = str(tmp_path / "weights.pt"), tensors()
    torch.save({key: values, "optimizer": {"lr": 1.0}, "step": 3}, path)
    module = linear()
    with caplog.at_level(logging.INFO):
        load_weights(module, path)
    assert torch.equal(module.weight, values["weight"])
    assert f"weights.pt: taking the state dict under '{key}'; left aside: optimizer, step" in caplog.text


def test_of_two_state_dicts_in_a_file_none_is_taken(tmp_path: Path) -> None:
    path = str(tmp_path / "weights.pt")
    torch.save({"model": tensors(), "module": tensors()}, path)
    with pytest.raises(DataError, match=r"no state dict of tensors but keys \['model', 'module'\]"):
        read_layout(path)


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.npz"
    path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"weights\.npz: weights are read from \.safetensors, \.bin"):
        read_layout(str(path))


def test_the_hash_is_of_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"abc")
    assert sha256(str(path)) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
