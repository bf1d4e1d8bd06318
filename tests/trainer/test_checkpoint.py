"""What a checkpoint promises: re-sharding, the commit marker, damage, and what is pruned when."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m4v_dist import storage
from m4v_dist.errors import DataError
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.checkpoint import Ranges
from tests.trainer.ranks import run_ranks
from tests.trainer.toy import toy_config

SHAPES = {"a": [5, 3], "b": [1], "c": [7]}


def _whole() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(torch.Size(shape), generator=generator) for name, shape in SHAPES.items()}


def _share(values: Tensor, rank: int, world_size: int) -> tuple[int, Tensor]:
    size = -(-values.numel() // world_size)
    start = min(rank * size, values.numel())
    return start, values.reshape(-1)[start : start + size]


def _ranges(kind: str, tensors: dict[str, Tensor], mesh: Mesh) -> dict[str, Ranges]:
    owned = [(name, *_share(values, mesh.rank, mesh.world_size)) for name, values in tensors.items()]
    parts = [(name, start, values) for name, start, values in owned if len(values)]
    return checkpoint.to_ranges(kind, parts, SHAPES)


def _save_job(folder: str, step: int) -> str:
    mesh = Mesh.of_process_group(use_gpu=False)
    tensors = _ranges("weights", _whole(), mesh)
    tensors |= _ranges("ema", {name: -values for name, values in _whole().items()}, mesh)
    state = {"shapes": SHAPES, "loader": {"cursor": 3}}
    return checkpoint.save(folder, step, tensors=tensors, state=state, config=toy_config(folder), mesh=mesh)


def _load_job(path: str) -> list[tuple[str, int, Tensor]]:
    mesh = Mesh.of_process_group(use_gpu=False)
    targets = _ranges("weights", {name: torch.full(tuple(shape), torch.nan) for name, shape in SHAPES.items()}, mesh)
    checkpoint.load(path, targets)
    return [(key, start, values) for key, ranges in targets.items() for start, values in ranges.parts]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("run") / "checkpoints")
    return str(run_ranks(_save_job, 3, folder, 120)[0])


@pytest.fixture
def copy(saved: str, tmp_path: Path) -> str:
    import shutil

    return str(shutil.copytree(saved, tmp_path / "checkpoints" / Path(saved).name))


def test_three_ranks_save_and_two_ranks_load_their_own_ranges(saved: str) -> None:
    for rank, parts in enumerate(run_ranks(_load_job, 2, saved)):
        assert len(parts) == 3 - rank, "rank 1 owns nothing of the parameter with one element"
        for key, start, values in parts:
            expected = _whole()[key.removeprefix("weights/")].reshape(-1)[start : start + len(values)]
            assert torch.equal(values, expected)


def test_weights_and_average_load_whole_without_a_process_group(saved: str) -> None:
    weights, average = checkpoint.load_weights(saved), checkpoint.load_ema_weights(saved)
    for name, values in _whole().items():
        assert torch.equal(weights[name], values)
        assert torch.equal(average[name], -values)
    assert checkpoint.read_state(saved)["loader"] == {"cursor": 3}


def test_an_uncommitted_folder_is_named_and_passed_over(copy: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = str(Path(copy).parent)
    (Path(folder) / "step_00000130").mkdir()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest_committed(folder) == copy
    assert "step_00000130" in caplog.text


def test_an_uncommitted_folder_asked_for_by_name_is_an_error_that_names_the_others(copy: str) -> None:
    cut_off = Path(copy).parent / "step_00000130"
    cut_off.mkdir()
    with pytest.raises(DataError, match=r"step_00000130.*never finished.*step_00000120"):
        checkpoint.load_ema_weights(str(cut_off))
    with pytest.raises(DataError, match=r"no such checkpoint.*step_00000120"):
        checkpoint.load_ema_weights(str(cut_off.parent / "step_00000777"))


def test_a_file_cut_short_after_the_commit_is_found(copy: str) -> None:
    data = next(Path(copy).glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{data.name}.*committed"):
        checkpoint.load_weights(copy)


@pytest.mark.parametrize("damage", ["{", "[]", "\0\0"])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("COMMITTED", checkpoint.check),
        ("state.json", checkpoint.read_state),
        ("config.json", checkpoint.read_config),
    ],
)
def test_a_damaged_json_file_is_a_data_error_with_the_way_out(
    tmp_path: Path, name: str, read: Callable[[str], Any], damage: str
) -> None:
    folder = tmp_path / "checkpoints" / "step_00000120"
    folder.mkdir(parents=True)
    (folder / "COMMITTED").write_text("{}")
    (folder / name).write_text(damage)
    with pytest.raises(DataError, match=rf"step_00000120/{name}.*damaged: remove .*step_00000120, and the one before"):
        read(str(folder))


def test_a_marker_without_sizes_and_a_missing_state_are_data_errors(tmp_path: Path) -> None:
    folder = tmp_path / "step_00000120"
    folder.mkdir()
    (folder / "COMMITTED").write_text("{}")
    with pytest.raises(DataError, match="COMMITTED: no sizes"):
        checkpoint.check(str(folder))
    with pytest.raises(DataError, match=r"state.json: no such file"):
        checkpoint.read_state(str(folder))


def test_another_models_checkpoint_is_refused_by_parameter_name(saved: str) -> None:
    with pytest.raises(DataError, match=r"weights/a needs 4 elements"):
        checkpoint.load(saved, {"weights/a": Ranges(4, ((0, torch.zeros(4)),))})
    with pytest.raises(DataError, match=r"weights/d needs 4 elements, but the checkpoint has nothing"):
        checkpoint.load(saved, {"weights/d": Ranges(4, ((0, torch.zeros(4)),))})


def test_prune_keeps_the_newest_the_multiples_and_nothing_uncommitted_before_them(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (10, 20, 30, 40, 50):
        storage.write_json(str(folder / checkpoint.folder_name(step) / "COMMITTED"), {})
    for step in (35, 60):
        (folder / checkpoint.folder_name(step)).mkdir()
    removed = checkpoint.prune(str(folder), keep_last=2, keep_every_steps=20)
    assert removed == ["step_00000010", "step_00000030", "step_00000035"]
    # a save in flight (60) is newer than the newest commit, and is left alone
    assert sorted(path.name for path in folder.iterdir()) == [f"step_{step:08d}" for step in (20, 40, 50, 60)]


def _resave_job(folder: str) -> dict[str, Any]:
    leftover = Path(folder) / checkpoint.folder_name(5) / "left_behind.distcp"
    mesh = Mesh.of_process_group(use_gpu=False)
    if mesh.is_main:
        storage.write_bytes(str(leftover), b"half")
    path = _save_job(folder, 5)
    return {"leftover": leftover.exists(), "committed": checkpoint.is_committed(path)}


def test_a_save_over_a_cut_off_save_starts_clean(tmp_path: Path) -> None:
    assert run_ranks(_resave_job, 1, str(tmp_path)) == [{"leftover": False, "committed": True}]
