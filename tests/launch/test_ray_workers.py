"""Ray workers: the answer, a worker that dies once, errors that keep their type and are not retried."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from m4v_dist.config.training_settings import LaunchSettings
from m4v_dist.errors import DataError, OutOfMemoryJobError, PreemptedError, RetriesExhaustedError, RunInUseError
from m4v_dist.launch.ray_session import start_ray, stop_ray
from m4v_dist.launch.ray_workers import WorkerFunction, run_workers
from m4v_dist.stop_request import StopRequest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SETTINGS = LaunchSettings(num_workers=2, max_failures=1)
StopRequests = Callable[[], Sequence[StopRequest]]


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    folder = start_ray(SETTINGS)
    yield
    stop_ray(folder)
    assert folder is None or not Path(folder).exists(), "Ray's folder stays behind"


def _run(function: WorkerFunction, folder: Path, settings: LaunchSettings, name: str, **options: Any) -> Any:
    config = {"folder": str(folder)}
    return run_workers(function, config, settings, name, str(folder / "ray"), progress=_no_commit, **options)


def _no_commit(config: dict[str, Any]) -> None:
    """Nothing is ever committed here."""


def _note(config: dict[str, Any]) -> int:
    """Leave a file for this start of rank 0, and say how many there are."""
    import torch.distributed as dist

    folder = Path(config["folder"])
    if dist.get_rank() == 0:
        (folder / f"start_{len(list(folder.glob('start_*')))}").touch()
    dist.barrier()
    return len(list(folder.glob("start_*")))


def _killed_once(config: dict[str, Any], stop_requests: StopRequests) -> dict[str, Any]:
    import torch.distributed as dist

    starts = _note(config)
    if starts == 1 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    threads = os.environ["OMP_NUM_THREADS"]
    return {"starts": starts, "rank": dist.get_rank(), "stop": stop_requests(), "threads": threads}


def _data_error_on_rank_1(config: dict[str, Any], _: StopRequests) -> None:
    import torch.distributed as dist

    _note(config)
    if dist.get_rank() == 1:
        raise DataError("shard 7 is gone")
    dist.barrier()


def _bug_on_rank_1(config: dict[str, Any], _: StopRequests) -> None:
    import torch.distributed as dist

    _note(config)
    if dist.get_rank() == 1:
        raise ZeroDivisionError("a bug")
    dist.barrier()


def test_a_killed_worker_restarts_the_group_and_rank_0_answers(tmp_path: Path) -> None:
    answer = _run(_killed_once, tmp_path, SETTINGS, "kill")
    assert answer == {"starts": 2, "rank": 0, "stop": (), "threads": "1"}


def test_a_data_error_of_one_rank_ends_the_run_as_itself_without_a_retry(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shard 7 is gone"):
        _run(_data_error_on_rank_1, tmp_path, SETTINGS, "data")
    assert len(list(tmp_path.glob("start_*"))) == 1


def _another_driver_has_it(config: dict[str, Any], _: StopRequests) -> None:
    raise RunInUseError("in use by attempt 7")


def test_no_report_is_asked_for_of_a_run_that_another_driver_trains(tmp_path: Path) -> None:
    """Its newest attempt is alive: a report would call it dead, and stand in the way of its own."""
    asked: list[list[int]] = []

    def report(_: dict[str, Any], silent: list[int]) -> None:
        asked.append(silent)

    with pytest.raises(RunInUseError, match="in use by attempt 7"):
        _run(_another_driver_has_it, tmp_path, SETTINGS, "used", failure_report=report)
    assert not asked


def _until_asked_to_stop(config: dict[str, Any], stop_requests: StopRequests) -> None:
    _note(config)
    while not (requests := stop_requests()):
        time.sleep(0.1)
    raise PreemptedError(f"saved, asked by {requests[0].why}")


def test_sigterm_to_the_driver_lets_the_workers_save_and_end_once(tmp_path: Path) -> None:
    def terminate() -> None:
        while not list(tmp_path.glob("start_*")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    with pytest.raises(PreemptedError, match="saved, asked by SIGTERM"):
        _run(_until_asked_to_stop, tmp_path, SETTINGS, "stop")
    assert len(list(tmp_path.glob("start_*"))) == 1


def test_a_time_limit_reaches_the_workers_with_its_deadline(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"time_limit_s": 86400.0})
    with pytest.raises(PreemptedError, match=r"saved, asked by the time limit \(launch.time_limit_s=86400\)"):
        _run(_until_asked_to_stop, tmp_path, settings, "limit")


def test_retries_end_with_the_root_cause(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"max_failures": 0})
    asked: list[list[int]] = []

    def report(config: dict[str, Any], silent: list[int]) -> str:
        assert config == {"folder": str(tmp_path)}
        asked.append(silent)
        return "Report: here."

    with pytest.raises(
        RetriesExhaustedError, match=r"max_failures=0.*rank 1.*ZeroDivisionError: a bug.*Report: here\."
    ) as caught:
        _run(_bug_on_rank_1, tmp_path, settings, "bug", failure_report=report)
    assert asked == [[]], "rank 1 told its error"
    assert caught.value.exit_code == 6
    assert len(list(tmp_path.glob("start_*"))) == 1


def _out_of_memory_on_rank_1(config: dict[str, Any], _: StopRequests) -> None:
    import torch
    import torch.distributed as dist

    _note(config)
    if dist.get_rank() == 1:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    dist.barrier()


def test_a_device_out_of_memory_ends_the_run_with_exit_4_without_a_retry(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemoryJobError, match=r"rank 1 ran out of memory.*2.00 GiB.*micro_batch_slots") as caught:
        _run(_out_of_memory_on_rank_1, tmp_path, SETTINGS, "memory")
    assert caught.value.exit_code == 4
    assert len(list(tmp_path.glob("start_*"))) == 1


def _kill_rank_1(config: dict[str, Any], _: Callable[[], bool]) -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_the_report_is_asked_for_with_the_rank_that_died_without_an_error(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"max_failures": 0})
    # `.` takes no line break: the message is one line
    with pytest.raises(RetriesExhaustedError, match=r"^workers.*rank 1 died without an error.*silent: \[1\]$"):
        _run(_kill_rank_1, tmp_path, settings, "silent", failure_report=lambda _, silent: f"silent: {silent}")


def test_restarts_without_a_limit_end_when_they_bring_nothing_new(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"max_failures": -1})
    with pytest.raises(RetriesExhaustedError, match=r"1 restarts in a row.*attempt 2.*ZeroDivisionError: a bug"):
        _run(_bug_on_rank_1, tmp_path, settings, "fruitless", max_fruitless_restarts=1)
    assert len(list(tmp_path.glob("start_*"))) == 2
