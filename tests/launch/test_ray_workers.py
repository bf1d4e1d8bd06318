"""Ray workers: the answer, a worker that dies once, errors that keep their type and are not retried."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from m4v_dist.config.schema import LaunchSettings
from m4v_dist.errors import DataError, PreemptedError, RetriesExhaustedError
from m4v_dist.launch.ray_workers import run_workers, start_ray, stop_ray

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SETTINGS = LaunchSettings(num_workers=2, max_failures=1)


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    start_ray(SETTINGS)
    yield
    stop_ray()


def _note(config: dict[str, Any]) -> int:
    """Leave a file for this start of rank 0, and say how many there are."""
    import torch.distributed as dist

    folder = Path(config["folder"])
    if dist.get_rank() == 0:
        (folder / f"start_{len(list(folder.glob('start_*')))}").touch()
    dist.barrier()
    return len(list(folder.glob("start_*")))


def _killed_once(config: dict[str, Any], should_stop: Callable[[], bool]) -> dict[str, Any]:
    import torch.distributed as dist

    starts = _note(config)
    if starts == 1 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return {"starts": starts, "rank": dist.get_rank(), "stop": should_stop(), "threads": os.environ["OMP_NUM_THREADS"]}


def _data_error_on_rank_1(config: dict[str, Any], _: Callable[[], bool]) -> None:
    import torch.distributed as dist

    _note(config)
    if dist.get_rank() == 1:
        raise DataError("shard 7 is gone")
    dist.barrier()


def _bug_on_rank_1(config: dict[str, Any], _: Callable[[], bool]) -> None:
    import torch.distributed as dist

    _note(config)
    if dist.get_rank() == 1:
        raise ZeroDivisionError("a bug")
    dist.barrier()


def test_a_killed_worker_restarts_the_group_and_rank_0_answers(tmp_path: Path) -> None:
    answer = run_workers(_killed_once, {"folder": str(tmp_path)}, SETTINGS, "kill", str(tmp_path / "ray"))
    assert answer == {"starts": 2, "rank": 0, "stop": False, "threads": "1"}


def test_a_data_error_of_one_rank_ends_the_run_as_itself_without_a_retry(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shard 7 is gone"):
        run_workers(_data_error_on_rank_1, {"folder": str(tmp_path)}, SETTINGS, "data", str(tmp_path / "ray"))
    assert len(list(tmp_path.glob("start_*"))) == 1


def _until_asked_to_stop(config: dict[str, Any], should_stop: Callable[[], bool]) -> None:
    _note(config)
    while not should_stop():
        time.sleep(0.1)
    raise PreemptedError("saved")


def test_sigterm_to_the_driver_lets_the_workers_save_and_end_once(tmp_path: Path) -> None:
    def terminate() -> None:
        while not list(tmp_path.glob("start_*")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    with pytest.raises(PreemptedError, match="saved"):
        run_workers(_until_asked_to_stop, {"folder": str(tmp_path)}, SETTINGS, "stop", str(tmp_path / "ray"))
    assert len(list(tmp_path.glob("start_*"))) == 1


def test_retries_end_with_the_root_cause(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"max_failures": 0})
    with pytest.raises(RetriesExhaustedError, match=r"max_failures=0.*rank 1.*ZeroDivisionError: a bug") as caught:
        run_workers(_bug_on_rank_1, {"folder": str(tmp_path)}, settings, "bug", str(tmp_path / "ray"))
    assert caught.value.exit_code == 6
    assert len(list(tmp_path.glob("start_*"))) == 1
