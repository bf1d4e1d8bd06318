"""What a checkpoint promises: re-sharding, the commit marker, damage, and what is pruned when."""

import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m4v_dist import storage, tensor_files
from m4v_dist.errors import DamagedCheckpointError, DataError, RunInUseError
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.checkpoint_save import (
    AbandonedError,
    Save,
    commit,
    discard,
    merge_index,
    remove_earlier_attempts,
    save,
    write_share,
)
from m4v_dist.trainer.ranges import Ranges, to_ranges
from m4v_dist.trainer.snapshot import SnapshotBuffer
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
    return to_ranges(kind, parts, SHAPES)


def _save_job(folder: str, step: int) -> str:
    mesh = Mesh.of_process_group(use_gpu=False)
    tensors = _ranges("weights", _whole(), mesh)
    tensors |= _ranges("ema", {name: -values for name, values in _whole().items()}, mesh)
    state = {"shapes": SHAPES, "loader": {"cursor": 3}}
    return save(folder, step, tensors=tensors, state=state, config=toy_config(folder), mesh=mesh)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("run") / "checkpoints")
    return str(run_ranks(_save_job, 3, folder, 120)[0])


@pytest.fixture
def copy(saved: str, tmp_path: Path) -> str:
    import shutil

    return str(shutil.copytree(saved, tmp_path / "checkpoints" / Path(saved).name))


def test_three_ranks_save_and_two_ranks_load_their_own_ranges(saved: str) -> None:
    for rank in range(2):
        mesh = Mesh(rank, 2, torch.device("cpu"))
        fresh = {name: torch.full(tuple(shape), torch.nan) for name, shape in SHAPES.items()}
        targets = _ranges("weights", fresh, mesh)
        checkpoint.load(saved, targets)
        parts = [(key, start, values) for key, ranges in targets.items() for start, values in ranges.parts]
        assert len(parts) == 3 - rank, "rank 1 owns nothing of the parameter with one element"
        for key, start, values in parts:
            expected = _whole()[key.removeprefix("weights/")].reshape(-1)[start : start + len(values)]
            assert torch.equal(values, expected)


def _cut(generator: random.Random, size: int, world_size: int) -> list[list[tuple[int, int]]]:
    """Ranges (start, length) of a tensor for each rank: random cuts, given to random ranks, some of them to none."""
    cuts = sorted({0, size, *(generator.randint(0, size) for _ in range(generator.randint(0, 2 * world_size)))})
    owned: list[list[tuple[int, int]]] = [[] for _ in range(world_size)]
    for start, end in zip(cuts, cuts[1:], strict=False):
        owned[generator.randrange(world_size)].append((start, end - start))
    return owned


def _write(path: str, flats: dict[str, Tensor], owned: dict[str, list[list[tuple[int, int]]]], world_size: int) -> None:
    """What `world_size` ranks would write, one after the other, and the commit."""
    saves = []
    for rank in range(world_size):
        tensors = {
            key: Ranges(flat.numel(), tuple((at, flat[at : at + length]) for at, length in owned[key][rank]))
            for key, flat in flats.items()
        }
        saves.append(Save(path, checkpoint.step_of(path), 1, 1, rank, world_size, SnapshotBuffer().take(tensors)))
        write_share(saves[-1])
    commit(saves[0], timeout_s=0)


@pytest.mark.parametrize("seed", range(12))
def test_any_ranges_of_any_ranks_load_as_any_others(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of 64 bytes, so that ranges, blocks and reads cross in every way; more than one read a file."""
    monkeypatch.setattr("m4v_dist.trainer.block_file._BLOCKS_A_READ", 3)
    monkeypatch.setattr("m4v_dist.trainer.block_file.write_file.__defaults__", (64,))
    generator = random.Random(seed)
    flats = {f"weights/{n}": torch.randn(generator.choice([0, 1, 15, 16, 17, 300])) for n in "abcd"}
    before, after = generator.randint(1, 5), generator.randint(1, 5)
    path = str(tmp_path / "step_00000007")
    _write(path, flats, {key: _cut(generator, flat.numel(), before) for key, flat in flats.items()}, before)
    owned = {key: _cut(generator, flat.numel(), after) for key, flat in flats.items()}
    for rank in range(after):
        targets = {
            key: Ranges(flat.numel(), tuple((at, torch.full((n,), torch.nan)) for at, n in owned[key][rank]))
            for key, flat in flats.items()
        }
        checkpoint.load(path, targets)
        for key, ranges in targets.items():
            for at, values in ranges.parts:
                assert torch.equal(values, flats[key][at : at + len(values)])


def test_the_files_are_safetensors_named_by_key_and_first_element(saved: str) -> None:
    files = sorted(Path(saved, "attempt_0001").glob("rank_*.safetensors"))
    assert [file.name for file in files] == [f"rank_{rank:05d}.safetensors" for rank in range(3)]
    found = {name: values for file in files for name, values in tensor_files.read_tensors(str(file)).items()}
    assert torch.equal(found["weights/a@5"], _whole()["a"].reshape(-1)[5:10])
    assert torch.equal(found["ema/c@6"], -_whole()["c"][6:])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([[(0, 3, 8)], [(4, 1, 8)]], r"a: rank 1 holds elements from 4, the ranks before it up to 3"),
        ([[(0, 3, 8)], [(2, 3, 8)]], r"a: rank 1 holds elements from 2, the ranks before it up to 3"),
        ([[(0, 3, 8)], []], r"a: the ranks hold 3 of 5 elements"),
    ],
    ids=["a gap", "an overlap", "an end that is missing"],
)
def test_ranges_that_do_not_cover_a_tensor_once_are_never_committed(parts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_index([{"num_elements": {"a": 5}, "parts": {"a": own}} for own in parts])
    with pytest.raises(ValueError, match=r"ranks \[1\] save other tensors"):
        merge_index([{"num_elements": {"a": n}, "parts": {"a": [(0, n, 8)]}} for n in (5, 4)])


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
    data = next(Path(copy).glob("*/rank_00001.safetensors"))
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(DamagedCheckpointError, match=rf"{data.name}.*committed"):
        checkpoint.load_weights(copy)
    data.unlink()
    with pytest.raises(DamagedCheckpointError, match=rf"{data.name}: None bytes"):
        checkpoint.load_weights(copy)


@pytest.mark.parametrize("name", ["rank_00002.safetensors", "index.json", "state.json"])
def test_a_bit_that_flipped_after_the_commit_is_found_by_who_reads_it(copy: str, name: str) -> None:
    data = Path(copy, "attempt_0001", name)
    content = bytearray(data.read_bytes())
    content[-5] ^= 4
    data.write_bytes(content)
    checkpoint.check(copy)
    with pytest.raises(DamagedCheckpointError, match=rf"{name}: 1 blocks .*another checksum"):
        checkpoint.load_ema_weights(copy)


def test_a_rank_reads_and_verifies_its_own_ranges_alone(copy: str) -> None:
    """Rank 2's file is damaged, and a rank that needs nothing of it does not look."""
    data = Path(copy, "attempt_0001", "rank_00002.safetensors")
    data.write_bytes(bytes(data.stat().st_size))
    values = torch.full((5,), torch.nan)
    checkpoint.load(copy, {"weights/a": Ranges(15, ((0, values),))})
    assert torch.equal(values, _whole()["a"].reshape(-1)[:5])


@pytest.mark.parametrize("damage", ["{", "[]", "{}", "\0\0", '{"format": 2, "attempt": 1, "files": {"a": 3}}'])
@pytest.mark.parametrize("read", [checkpoint.check, checkpoint.read_state, checkpoint.read_config])
def test_a_damaged_marker_is_an_error_with_the_way_out(copy: str, read: Callable[[str], Any], damage: str) -> None:
    Path(copy, "COMMITTED").write_text(damage)
    with pytest.raises(DamagedCheckpointError, match=r"step_00000120/COMMITTED.*damaged: .*remove .*step_00000120"):
        read(copy)


def test_a_checkpoint_of_the_format_before_is_refused_by_number(copy: str) -> None:
    Path(copy, "COMMITTED").write_text('{"size_bytes": {}, "step": 120}')
    with pytest.raises(DataError, match="checkpoint format 1, but this code reads formats 2, 3"):
        checkpoint.load_weights(copy)


def test_a_condemned_checkpoint_is_never_chosen_again_and_says_why(copy: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint.condemn(copy, "rank_00001.safetensors: 3 bytes")
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest_committed(str(Path(copy).parent)) is None
    assert "step_00000120: damaged checkpoint, passed over" in caplog.text
    assert json.loads(Path(copy, "DAMAGED").read_text())["reason"] == "rank_00001.safetensors: 3 bytes"


def test_a_save_over_a_condemned_checkpoint_makes_a_sound_one(copy: str) -> None:
    """The attempt that wrote it first was another one: nothing of its files is left."""
    checkpoint.condemn(copy, "bad")
    mesh = Mesh(0, 1, torch.device("cpu"))
    snapshot = SnapshotBuffer().take(_ranges("weights", _whole(), mesh))
    mine = Save(copy, 120, 2, 1, 0, 1, snapshot, {"state.json": json.dumps({"shapes": SHAPES}).encode()})
    write_share(mine)
    commit(mine, timeout_s=0)
    remove_earlier_attempts(mine)
    assert sorted(path.name for path in Path(copy).iterdir()) == ["COMMITTED", "attempt_0002"]
    assert torch.equal(checkpoint.load_weights(copy)["c"], _whole()["c"])


def _part(path: str, attempt: int, value: float) -> Save:
    """The one rank's part of a save of step 5, written."""
    snapshot = SnapshotBuffer().take({"weights/a": Ranges(4, ((0, torch.full((4,), value)),))})
    part = Save(path, 5, attempt, 1, 0, 1, snapshot, {"state.json": storage.json_bytes({"shapes": {"a": [4]}})})
    write_share(part)
    return part


def test_an_attempt_that_slept_between_question_and_commit_spoils_nothing_of_the_newer_one(tmp_path: Path) -> None:
    """Attempt 9 is asked whether it may commit, and sleeps; attempt 10, an other length of name, does all meanwhile."""
    path = str(tmp_path / "step_00000005")
    stale, newer = _part(path, 9, 9.0), _part(path, 10, 10.0)

    def sleep() -> None:
        commit(newer, timeout_s=0)
        remove_earlier_attempts(newer)

    with pytest.raises(RunInUseError, match="committed by attempt 10, so attempt 9 has been overtaken"):
        commit(stale, may_commit=sleep, timeout_s=0)
    assert checkpoint.load_weights(path)["a"].tolist() == [10.0] * 4


def test_an_attempt_that_slept_behind_its_commit_spoils_nothing_of_the_newer_one(tmp_path: Path) -> None:
    path = str(tmp_path / "step_00000005")
    stale = _part(path, 1, 1.0)
    commit(stale, timeout_s=0)
    newer = _part(path, 2, 2.0)
    commit(newer, timeout_s=0)
    remove_earlier_attempts(stale)
    assert checkpoint.load_weights(path)["a"].tolist() == [2.0] * 4
    remove_earlier_attempts(newer)
    assert storage.list_folder(path) == ["COMMITTED", "attempt_0002"]


def test_a_marker_whose_writing_was_answered_too_late_goes_with_the_files_of_the_failed_save(tmp_path: Path) -> None:
    path = str(tmp_path / "step_00000005")
    mine = _part(path, 1, 1.0)
    commit(mine, timeout_s=0)
    discard(mine)
    assert not storage.exists(path)
    other = _part(path, 2, 2.0)
    commit(other, timeout_s=0)
    write_share(mine)
    discard(mine)
    assert checkpoint.load_weights(path)["a"].tolist() == [2.0] * 4, "another attempt's marker stays"


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


def test_what_a_failed_save_left_is_not_taken_for_the_next_one_s(tmp_path: Path) -> None:
    """The same attempt, the same step: rank 1's file is there, but of the save before."""
    path = str(tmp_path / "step_00000005")
    snapshot = SnapshotBuffer().take(_ranges("weights", _whole(), Mesh(0, 1, torch.device("cpu"))))
    nothing = SnapshotBuffer().take({key: Ranges(n, ()) for key, n in snapshot.num_elements.items()})
    write_share(Save(path, 5, 1, 1, 1, 2, nothing))
    mine = Save(path, 5, 1, 2, 0, 2, snapshot)
    write_share(mine)
    with pytest.raises(TimeoutError, match=r"ranks \[1\] \(1 of 2\) did not write .*trainer.save_timeout_s"):
        commit(mine, timeout_s=0)
    with pytest.raises(AbandonedError, match="another rank failed"):
        commit(mine, is_abandoned=lambda: True)
    assert not checkpoint.is_committed(path)
    write_share(Save(path, 5, 1, 2, 1, 2, nothing))
    assert commit(mine, timeout_s=0).num_retries == 0
    assert checkpoint.is_committed(path)
