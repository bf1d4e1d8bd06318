"""Files of a checkpoint: every form that a release has reads the same, and what is incomplete or damaged is named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m4v_dist import tensor_files
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.model.checkpoint_files import CheckpointReader, find_files

WEIGHTS = {
    "a.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b.bias": torch.arange(4, dtype=torch.bfloat16) / 8,
    "c.scale": torch.tensor(3.0, dtype=torch.float16),
    "d.none": torch.zeros(0, 5),
}
STEM = "diffusion_pytorch_model"


def _shard_names(suffix: str) -> list[str]:
    return [f"{STEM}-{number:05d}-of-00002{suffix}" for number in (1, 2)]


def _halves() -> list[dict[str, Tensor]]:
    items = list(WEIGHTS.items())
    return [dict(items[:2]), dict(items[2:])]


def _one_safetensors(folder: Path) -> None:
    tensor_files.write_tensors(str(folder / f"{STEM}.safetensors"), WEIGHTS)
    (folder / "config.json").write_text("{}")


def _one_pickle(folder: Path) -> None:
    torch.save(WEIGHTS, folder / f"{STEM}.bin")


def _one_old_pickle(folder: Path) -> None:
    torch.save(WEIGHTS, folder / "weights.pth", _use_new_zipfile_serialization=False)


def _shards(folder: Path) -> None:
    for name, part in zip(_shard_names(".safetensors"), _halves(), strict=True):
        tensor_files.write_tensors(str(folder / name), part)


def _indexed_pickles(folder: Path) -> None:
    names = _shard_names(".bin")
    for name, part in zip(names, _halves(), strict=True):
        torch.save(part, folder / name)
    weight_map = {key: name for name, part in zip(names, _halves(), strict=True) for key in part}
    (folder / f"{STEM}.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _safetensors_beside_a_pickle(folder: Path) -> None:
    _one_safetensors(folder)
    torch.save({"other": torch.zeros(1)}, folder / f"{STEM}.bin")


FORMS = [_one_safetensors, _one_pickle, _one_old_pickle, _shards, _indexed_pickles, _safetensors_beside_a_pickle]


@pytest.mark.parametrize("write", FORMS)
def test_every_form_gives_the_same_tensors_in_float32(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    reader = CheckpointReader(find_files(f"{tmp_path}/", "here"))
    assert {name: (item.shape, item.dtype) for name, item in reader.layout.items()} == {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in WEIGHTS.items()
    }
    for name, tensor in WEIGHTS.items():
        read = reader.read(name)
        assert read.dtype == torch.float32 and torch.equal(read, tensor.float())


def test_a_file_named_by_itself_is_read_whatever_lies_beside_it(tmp_path: Path) -> None:
    _safetensors_beside_a_pickle(tmp_path)
    assert find_files(f"{tmp_path}/{STEM}.bin", "here") == [f"{tmp_path}/{STEM}.bin"]


def test_an_index_named_by_itself_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _indexed_pickles(tmp_path)
    index = f"{STEM}.bin.index.json"
    assert find_files(f"{tmp_path}/{index}", "here") == find_files(str(tmp_path), "here")
    monkeypatch.chdir(tmp_path)
    assert find_files(index, "here") == [f"./{name}" for name in _shard_names(".bin")]


@pytest.mark.parametrize(
    ("name", "words"), [("one.ckpt", "is a file ending in .ckpt"), ("weights", "is a file without an ending")]
)
def test_a_file_of_another_kind_is_refused_with_the_kinds_that_are_read(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ConfigError, match=rf"here=.*{name}: {words}; read are .safetensors, .bin, .pt, .pth, and an"):
        find_files(f"{tmp_path}/{name}", "here")


def _nothing(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def _a_shard_is_missing(folder: Path) -> None:
    _shards(folder)
    (folder / _shard_names(".safetensors")[1]).unlink()


def _an_indexed_file_is_missing(folder: Path) -> None:
    _indexed_pickles(folder)
    (folder / _shard_names(".bin")[0]).unlink()


def _a_broken_index(folder: Path) -> None:
    _indexed_pickles(folder)
    (folder / f"{STEM}.bin.index.json").write_text('{"weight_map": ')


def _an_index_of_another_kind(folder: Path) -> None:
    _indexed_pickles(folder)
    (folder / f"{STEM}.bin.index.json").write_text('["a"]')


def _two_checkpoints(folder: Path) -> None:
    _one_safetensors(folder)
    tensor_files.write_tensors(str(folder / "ema.safetensors"), WEIGHTS)


def _shards_that_overlap(folder: Path) -> None:
    for name in _shard_names(".safetensors"):
        tensor_files.write_tensors(str(folder / name), WEIGHTS)


def _cut(name: str, length: int) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        _one_safetensors(folder) if name.endswith("safetensors") else _one_pickle(folder)
        path = folder / name
        path.write_bytes(path.read_bytes()[:length])

    return harm


def _more_than_tensors(folder: Path) -> None:
    torch.save({"weights": WEIGHTS, "step": 3}, folder / f"{STEM}.bin")


def _not_finite(folder: Path) -> None:
    tensor = WEIGHTS["a.weight"].clone()
    tensor[0, :2] = torch.nan
    tensor_files.write_tensors(str(folder / f"{STEM}.safetensors"), WEIGHTS | {"a.weight": tensor})


def _a_header_that_lies(folder: Path) -> None:
    """Whole in size, but a tensor is given fewer bytes than its shape has."""
    _one_safetensors(folder)
    path = folder / f"{STEM}.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"shape":[2,3]', b'"shape":[3,3]'))


@pytest.mark.parametrize(
    ("harm", "kind", "message"),
    [
        (_nothing, ConfigError, r"here=.*no .safetensors.*config.json.*diffusion_transformer_384p"),
        (_two_checkpoints, ConfigError, r"here=.*several checkpoints.*ema.safetensors.*name one"),
        (_a_shard_is_missing, DataError, r"1 of 2 shards are there, \['.*-00002-of-00002.safetensors'\] are not"),
        (_an_indexed_file_is_missing, DataError, r"names 2 files, but \['.*00001-of-00002.bin'\] are not there"),
        (_a_broken_index, DataError, r"index.json: is no index of shards"),
        (_an_index_of_another_kind, DataError, r"index.json: is no index of shards"),
        (_shards_that_overlap, DataError, r"00002-of-00002.safetensors and .*00001-of.* both hold a.weight"),
        (_cut(f"{STEM}.safetensors", 300), DataError, r"model.safetensors: .*cut"),
        (_cut(f"{STEM}.safetensors", 5), DataError, r"model.safetensors: 5 bytes are no safetensors"),
        (_cut(f"{STEM}.bin", 700), DataError, r"model.bin: torch.load\(weights_only=True\) cannot read it"),
        (_cut(f"{STEM}.bin", 0), DataError, r"model.bin: torch.load\(weights_only=True\) cannot read it"),
        (_more_than_tensors, DataError, r"model.bin: holds no state dict of tensors but keys \['step', 'weights'\]"),
        (_not_finite, DataError, r"model.safetensors: a.weight: 2 of 6 weights are not finite"),
        (_a_header_that_lies, DataError, r"a.weight of shape \[3, 3\] and float32 has 36 bytes.*gives it 24"),
    ],
)
def test_what_is_missing_ambiguous_or_damaged_is_named(
    tmp_path: Path, harm: Callable[[Path], None], kind: type[Exception], message: str
) -> None:
    harm(tmp_path)
    with pytest.raises(kind, match=message):
        reader = CheckpointReader(find_files(str(tmp_path), "here"))
        for name in reader.layout:
            reader.read(name)


def test_a_path_where_nothing_is_says_so_and_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"here=.*/none: there is no such file or folder"):
        find_files(f"{tmp_path}/none", "here")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"here=a/none \({tmp_path}/a/none\): there is no such file"):
        find_files("a/none", "here")
