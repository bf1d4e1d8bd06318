"""Saves beside training, in one process: what the loop waits for, what may fail, and what stands after a kill."""

import os
import resource
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from m4v_dist import storage
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import RunInUseError
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.checkpoint_save import Save, commit, write_share
from m4v_dist.trainer.checkpoint_saver import CheckpointSaver
from m4v_dist.trainer.ranges import Ranges
from m4v_dist.trainer.snapshot import SnapshotBuffer
from tests.object_store_server import object_store
from tests.trainer.ranks import run_ranks
from tests.trainer.toy import toy_config

STATE = {"shapes": {"a": [4]}}


def _tensors(values: torch.Tensor) -> dict[str, Ranges]:
    return {"weights/a": Ranges(4, ((0, values),))}


def _saver(config: RunConfig, mesh: Mesh, may_commit: Callable[[], None] = lambda: None) -> CheckpointSaver:
    return CheckpointSaver(config, mesh, 1, may_commit)


def test_the_snapshot_is_what_stands_however_the_weights_move_on(mesh: Mesh, tmp_path: Path) -> None:
    config = toy_config(str(tmp_path), keep_last=2)
    saver, values = _saver(config, mesh), torch.arange(4.0)
    assert saver.settle() is None
    for step in (1, 2, 3):
        called: list[int] = []
        saver.begin(step, _tensors(values), STATE, lambda called=called, step=step: called.append(step))
        values += 10
        settled = saver.settle()
        assert settled is not None and settled.failures == () and called == [step]
        assert checkpoint.load_weights(settled.path)["a"].tolist() == [10.0 * (step - 1) + n for n in range(4)]
        report = saver.take_report()
        assert report is not None and report.step == step and saver.take_report() is None
    assert checkpoint.list_committed(config.checkpoint_folder) == ["step_00000002", "step_00000003"]


def test_a_store_that_is_down_keeps_the_writer_and_not_the_loop(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with object_store(monkeypatch) as (bucket, outage):
        config = toy_config(str(tmp_path), checkpoint_folder=f"{bucket}/run")
        saver = _saver(config, mesh)
        outage.is_down = True
        saver.begin(3, _tensors(torch.ones(4)), STATE)
        begun = time.monotonic()
        while "trying again" not in caplog.text:
            assert time.monotonic() < begun + 30, "the writer does not ask again"
            time.sleep(0.01)
        assert not saver.has_failed and saver.take_report() is None
        outage.is_down = False
        settled, report = saver.settle(), saver.take_report()
        assert settled is not None and settled.failures == ()
        assert report is not None and report.committed.num_retries > 0
        assert checkpoint.newest_committed(config.checkpoint_folder) == settled.path == f"{bucket}/run/step_00000003"
        assert checkpoint.load_weights(settled.path)["a"].tolist() == [1.0] * 4
        checkpoint.condemn(settled.path, "made up")
        assert checkpoint.newest_committed(config.checkpoint_folder) is None


@contextmanager
def _full_disk(size_bytes: int) -> Iterator[None]:
    """No file may grow past a size: what the system says then, it says of a full disk too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_fails_the_save_leaves_nothing_of_it_and_the_next_one_stands(mesh: Mesh, tmp_path: Path) -> None:
    config = toy_config(str(tmp_path))
    saver = _saver(config, mesh)
    saver.begin(1, _tensors(torch.ones(4)), STATE)
    saver.settle()
    with _full_disk(64):
        saver.begin(2, _tensors(torch.ones(4)), STATE)
        settled = saver.settle()
    assert settled is not None
    (failure,) = settled.failures
    assert "rank_00000.safetensors" in failure and "bytes are needed" in failure and "are free" in failure
    assert checkpoint.list_committed(config.checkpoint_folder) == ["step_00000001"]
    assert not storage.exists(settled.path), "the half-written folder goes"
    saver.begin(3, _tensors(torch.ones(4)), STATE)
    assert saver.settle() == type(settled)(settled.path.replace("02", "03"), ())


def test_an_overtaken_attempt_ends_without_a_commit(mesh: Mesh, tmp_path: Path) -> None:
    def overtaken() -> None:
        raise RunInUseError("attempt 1 has lost its lease")

    config = toy_config(str(tmp_path))
    saver = _saver(config, mesh, overtaken)
    saver.begin(1, _tensors(torch.ones(4)), STATE)
    with pytest.raises(RunInUseError, match="has lost its lease"):
        saver.settle()
    assert checkpoint.list_committed(config.checkpoint_folder) == []


def test_a_fault_of_the_program_in_the_thread_is_raised_and_is_no_failed_save(mesh: Mesh, tmp_path: Path) -> None:
    saver = _saver(toy_config(str(tmp_path)), mesh)
    saver.begin(1, {"weights/a": Ranges(5, ((0, torch.ones(4)),))}, STATE)
    with pytest.raises(RuntimeError, match=r"rank 0, saving .*step_00000001: ValueError: .*hold 4 of 5 elements"):
        saver.settle()


def test_trouble_after_the_commit_is_told_and_the_checkpoint_stands(mesh: Mesh, tmp_path: Path) -> None:
    saver = _saver(toy_config(str(tmp_path)), mesh)

    def no_ledger() -> None:
        raise OSError("ledger.json: stale file handle")

    saver.begin(1, _tensors(torch.ones(4)), STATE, no_ledger)
    settled, report = saver.settle(), saver.take_report()
    assert settled is not None and settled.failures == () and checkpoint.is_committed(settled.path)
    assert report is not None and report.tidy_error == "OSError: ledger.json: stale file handle"


def test_trouble_with_what_an_earlier_attempt_left_does_not_take_the_commit_away(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toy_config(str(tmp_path), keep_last=1)
    saver = CheckpointSaver(config, mesh, 2, lambda: None)
    left = f"{config.checkpoint_folder}/step_00000001/attempt_0001"
    storage.write_bytes(f"{left}/rank_00000.json", b"{}")
    remove = storage.remove

    def refuse(path: str) -> None:
        if path == left:
            raise OSError("attempt_0001: busy")
        remove(path)

    monkeypatch.setattr(storage, "remove", refuse)
    saver.begin(1, _tensors(torch.ones(4)), STATE)
    settled, report = saver.settle(), saver.take_report()
    assert settled is not None and settled.failures == ()
    assert report is not None and report.tidy_error == "OSError: attempt_0001: busy"
    assert checkpoint.load_weights(settled.path)["a"].tolist() == [1.0] * 4


@pytest.mark.parametrize("damage", ["cut", "lost", "unmarked"])
def test_older_checkpoints_stay_where_the_one_that_was_just_committed_is_not_what_was_written(
    mesh: Mesh, tmp_path: Path, damage: str
) -> None:
    config = toy_config(str(tmp_path), keep_last=1)
    saver = _saver(config, mesh)
    reports = []

    def spoil(step: int) -> None:
        path = tmp_path / "checkpoints" / checkpoint.folder_name(step)
        file = path / ("COMMITTED" if damage == "unmarked" else "attempt_0001/rank_00000.safetensors")
        if step == 2 and damage == "cut":
            file.write_bytes(file.read_bytes()[:-1])
        elif step == 2:
            file.unlink()

    for step in (1, 2, 3):
        saver.begin(step, _tensors(torch.ones(4)), STATE, partial(spoil, step))
        settled, report = saver.settle(), saver.take_report()
        assert settled is not None and settled.failures == () and report is not None
        reports.append(report.tidy_error)
        if step == 2:
            assert storage.list_folder(config.checkpoint_folder) == ["step_00000001", "step_00000002"]
            newest = checkpoint.newest_sound(config.checkpoint_folder)
            assert newest is not None and newest.endswith("step_00000001")
    assert [reports[0], reports[2]] == [None, None]
    assert str(reports[1]).startswith("nothing was removed: ") and "step_00000002" in str(reports[1])
    assert checkpoint.list_committed(config.checkpoint_folder) == ["step_00000003"]


def test_an_attempt_that_is_overtaken_behind_its_commit_removes_nothing(mesh: Mesh, tmp_path: Path) -> None:
    config = toy_config(str(tmp_path), keep_last=1)
    asked: list[None] = []
    ledgers: list[int] = []

    def may_commit() -> None:
        asked.append(None)
        if len(asked) == 4:
            raise RunInUseError("attempt 1 has lost its lease")

    saver = _saver(config, mesh, may_commit)
    for step in (1, 2):
        saver.begin(step, _tensors(torch.ones(4)), STATE, lambda step=step: ledgers.append(step))
        if step == 1:
            assert saver.settle() is not None and len(asked) == 2
    with pytest.raises(RunInUseError, match="has lost its lease"):
        saver.settle()
    assert ledgers == [1], "the ledger is the newer one's too"
    assert checkpoint.list_committed(config.checkpoint_folder) == ["step_00000001", "step_00000002"]


def _late_answer_job(folder: str) -> tuple[tuple[str, ...], str]:
    """Rank 1's store writes its last file, and says that it did not."""
    mesh = Mesh.of_process_group(use_gpu=False)
    config = toy_config(folder, keep_last=1)
    saver = _saver(config, mesh)
    write_bytes = storage.write_bytes

    def answer_late(path: str, data: bytes) -> None:
        write_bytes(path, data)
        if path.endswith("step_00000002/attempt_0001/rank_00001.json"):
            raise OSError("503 Slow Down")

    storage.write_bytes = answer_late
    for step in (1, 2):
        values = torch.full((2,), float(step))
        saver.begin(step, {"weights/a": Ranges(4, ((2 * mesh.rank, values),))}, STATE)
        if step == 2 and mesh.is_main:
            # It has all files before it hears of the failure.
            deadline = time.monotonic() + 30
            while saver.is_writing and time.monotonic() < deadline:
                time.sleep(0.01)
        settled = saver.settle()
        assert settled is not None
    return settled.failures, settled.path


@pytest.mark.slow
def test_a_commit_stands_though_a_rank_is_told_too_late_that_its_file_was_written(tmp_path: Path) -> None:
    for failures, path in run_ranks(_late_answer_job, 2, str(tmp_path)):
        assert failures == ()
        assert checkpoint.load_weights(path)["a"].tolist() == [2.0] * 4


# ---- kills


def _die(*_: Any, **__: Any) -> None:
    os._exit(9)


def _die_in_a_file(file: int) -> None:
    if stat.S_ISREG(os.fstat(file).st_mode):
        _die()


def _remove_markers_alone(remove: Callable[[str], None], path: str) -> None:
    remove(path) if path.endswith("COMMITTED") else _die()


def _kill_job(folder: str) -> None:
    """Each rank, for itself, dies at another point of a save, in a folder of its own where step 1 stands."""
    point = dist.get_rank()
    folder = f"{folder}/{point}"
    # Rank 0 holds the store by which the others find one another: it must not die before they did.
    dist.barrier()
    for step in (1, 2, 3):
        snapshot = SnapshotBuffer().take(_tensors(torch.full((4,), float(step))))
        texts = {"state.json": storage.json_bytes(STATE), "config.json": b"{}"}
        mine = Save(f"{folder}/{checkpoint.folder_name(step)}", step, 1, step, 0, 1, snapshot, texts)
        if step == 3 and point == 0:
            # In the middle of a file, under its temporary name.
            os.fsync = _die_in_a_file
        write_share(mine)
        if step == 3 and point == 1:
            # All files stand; the marker is what is written next.
            storage.create_bytes = _die  # type: ignore[assignment]
        commit(mine, timeout_s=0)
        if step == 3 and point == 2:
            # A prune takes the markers first: of the first folder it is gone, and the rest is there.
            storage.remove = partial(_remove_markers_alone, storage.remove)
        if step == 3:
            checkpoint.prune(folder, keep_last=1, keep_every_steps=0)


def test_a_kill_at_any_point_leaves_the_newest_commit_in_force(tmp_path: Path) -> None:
    assert run_ranks(_kill_job, 3, str(tmp_path), watch=lambda _: None) == [None, None, None]
    assert [path.name[:23] for path in Path(tmp_path, "0", "step_00000003", "attempt_0001").iterdir()] == [
        "rank_00000.safetensors."
    ], "the kill fell into the write"
    assert Path(tmp_path, "1", "step_00000003", "attempt_0001", "index.json").exists()
    assert [checkpoint.list_committed(f"{tmp_path}/{point}") for point in range(3)] == [
        ["step_00000001", "step_00000002"],
        ["step_00000001", "step_00000002"],
        ["step_00000002", "step_00000003"],
    ]
    assert Path(tmp_path, "2", "step_00000001", "attempt_0001").exists(), "the kill fell into the prune"
    for point, step in enumerate((2, 2, 3)):
        newest = checkpoint.newest_sound(f"{tmp_path}/{point}")
        assert newest is not None and checkpoint.load_weights(newest)["a"].tolist() == [float(step)] * 4
    # The next commit's prune removes what the cut off one left.
    checkpoint.prune(f"{tmp_path}/2", keep_last=1, keep_every_steps=0)
    assert storage.list_folder(f"{tmp_path}/2") == ["step_00000003"]
