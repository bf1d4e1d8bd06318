"""What a local disk holds after a loss of power, by a plain model of it: a name stands if its folder was synced since.

Bytes of files are synced before they get their names; `test_storage.py` has that.
"""

import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from m4v_dist import storage
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.checkpoint_save import Save, commit, write_share
from m4v_dist.trainer.ranges import Ranges
from m4v_dist.trainer.snapshot import SnapshotBuffer


class Disk:
    """Knows of each folder which names were in it when it was synced last."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root, self._names = str(root), {str(root): set(os.listdir(root))}
        fsync = os.fsync

        def watched(file: int) -> None:
            fsync(file)
            path = os.readlink(f"/proc/self/fd/{file}")
            if stat.S_ISDIR(os.fstat(file).st_mode):
                self._names[path] = set(os.listdir(path))

        monkeypatch.setattr(os, "fsync", watched)

    def keeps(self, path: str) -> bool:
        """Whether the file or folder would be found after the power went now."""
        while path != self._root:
            folder, _, name = path.rpartition("/")
            if name not in self._names.get(folder, ()):
                return False
            path = folder
        return True


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(tmp_path, monkeypatch)


def _before(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, look: Callable[[str], None]) -> None:
    """Have `look` called with the last path that is given to `place.name`, before it does its work."""
    real = getattr(place, name)

    def watched(*given: Any, **named: Any) -> Any:
        look(given[-1])
        return real(*given, **named)

    monkeypatch.setattr(place, name, watched)


def _commit(folder: str, step: int) -> str:
    path = f"{folder}/{checkpoint.folder_name(step)}"
    snapshot = SnapshotBuffer().take({"weights/a": Ranges(4, ((0, torch.full((4,), float(step))),))})
    save = Save(path, step, 1, step, 0, 1, snapshot, {"state.json": b"{}", "config.json": b"{}"})
    write_share(save)
    commit(save, timeout_s=0)
    return path


def test_what_was_written_has_a_name_that_stays_in_new_folders_too(disk: Disk, tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/a/b/whole", b"1")
    assert storage.create_bytes(f"{tmp_path}/a/claims/1.json", b"{}")
    (tmp_path / "finished").write_bytes(b"shard")
    storage.put_file(f"{tmp_path}/finished", f"{tmp_path}/shards/0.tar")
    storage.make_folder(f"{tmp_path}/made/by/hand")
    for name in ("a/b/whole", "a/claims/1.json", "shards/0.tar", "made/by/hand"):
        assert disk.keeps(f"{tmp_path}/{name}"), name


def test_a_marker_is_written_when_all_its_files_stay_and_stays_itself(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path / "checkpoints")
    storage.make_folder(folder)
    # As whoever made it, and was killed then, leaves it.
    os.makedirs(f"{folder}/step_00000003/attempt_0001")
    found: list[str] = []

    def look(path: str) -> None:
        if path.endswith("/COMMITTED"):
            found.extend(str(name) for name in Path(path).parent.rglob("*.*") if "COMMITTED" not in name.name)
            assert all(map(disk.keeps, found))

    _before(monkeypatch, os, "link", look)
    path = _commit(folder, 3)
    assert len(found) == 5 and disk.keeps(f"{path}/COMMITTED")


def test_files_are_removed_when_the_marker_cannot_come_back(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path)
    first, second = _commit(folder, 1), _commit(folder, 2)
    removed: list[str] = []

    def look(path: str) -> None:
        removed.append(path)
        assert not disk.keeps(f"{path}/COMMITTED")

    _before(monkeypatch, shutil, "rmtree", look)
    checkpoint.prune(folder, keep_last=1, keep_every_steps=0)
    assert removed == [first] and disk.keeps(f"{second}/COMMITTED")


def test_a_folder_that_its_file_system_cannot_sync_is_written_all_the_same_and_an_error_of_the_disk_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuse(file: int, why: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(why, os.strerror(why))
        fsync(file)

    monkeypatch.setattr(os, "fsync", lambda file: refuse(file, errno.EINVAL))
    storage.write_bytes(f"{tmp_path}/a/b", b"1")
    assert storage.read_bytes(f"{tmp_path}/a/b") == b"1"
    monkeypatch.setattr(os, "fsync", lambda file: refuse(file, errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        storage.write_bytes(f"{tmp_path}/a/c", b"1")
