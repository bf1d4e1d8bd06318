"""What ends a run and what restarts it, and what a machine cannot hold: without Ray."""

import os

import pytest
import torch

from m4v_dist.config.schema import LaunchSettings
from m4v_dist.errors import ConfigError, DataError, NonFiniteError, OutOfMemoryJobError
from m4v_dist.launch import ray_workers
from m4v_dist.launch.ray_workers import MAX_FRUITLESS_RESTARTS, Verdict, as_job_error, ray_session, require_resources


def test_a_restart_counts_as_fruitless_only_if_nothing_was_committed_since_the_one_before() -> None:
    verdict = Verdict()
    assert [verdict.begin(None) for _ in range(1 + MAX_FRUITLESS_RESTARTS)] == [1, 2, 3, 4]
    assert [verdict.begin("step_3") for _ in range(1 + MAX_FRUITLESS_RESTARTS)] == [5, 6, 7, 8]
    assert not verdict.has_given_up()
    assert verdict.begin("step_3") is None
    assert verdict.has_given_up()


def test_a_job_error_ends_the_run_and_another_error_does_not() -> None:
    verdict = Verdict()
    verdict.record(1, 0, "here", "ZeroDivisionError: a bug", "", as_job_error(ZeroDivisionError("a bug"), 0))
    assert verdict.begin(None) == 1
    verdict.record(1, 1, "here", "NonFiniteError: diverged", "", as_job_error(NonFiniteError("diverged"), 1))
    assert verdict.begin("step_9") is None
    assert isinstance(verdict.fatal(), NonFiniteError)


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), MemoryError("host")])
def test_memory_of_device_and_host_is_exit_4(error: BaseException) -> None:
    found = as_job_error(error, 3)
    assert isinstance(found, OutOfMemoryJobError) and found.exit_code == 4
    assert "rank 3" in str(found) and str(error) in str(found)


def test_a_job_error_stays_itself() -> None:
    error = DataError("shard 7")
    assert as_job_error(error, 0) is error


def test_what_a_machine_cannot_hold_is_refused_with_the_way_out() -> None:
    gpu = LaunchSettings(num_workers=2, use_gpu=True)
    with pytest.raises(ConfigError, match=r"needs 2 GPUs.*there are 1.*num_workers=1"):
        require_resources(gpu, num_gpus=1, num_cpus=8)
    require_resources(gpu, num_gpus=2, num_cpus=8)
    with pytest.raises(ConfigError, match=r"cpus_per_worker=9.*8 CPUs"):
        require_resources(LaunchSettings(cpus_per_worker=9), num_gpus=0, num_cpus=8)
    # workers may outnumber CPUs: they take turns
    require_resources(LaunchSettings(num_workers=20), num_gpus=0, num_cpus=8)


def test_a_gpu_that_is_not_there_is_refused_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: LaunchSettings) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray_workers, "start_ray", refuse)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="launch.use_gpu=true"), ray_session(LaunchSettings(use_gpu=True)):
        pass
    cpus = (os.cpu_count() or 1) + 1
    with pytest.raises(ConfigError, match="cpus_per_worker"), ray_session(LaunchSettings(cpus_per_worker=cpus)):
        pass
