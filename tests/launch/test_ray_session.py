"""What a machine or a cluster cannot hold, without starting Ray."""

import logging
import os

import pytest
import torch

from m4v_dist.config.training_settings import LaunchSettings
from m4v_dist.errors import ConfigError
from m4v_dist.launch import ray_session
from m4v_dist.launch.ray_session import check_resources, require_resources, require_room


def test_what_a_machine_cannot_hold_is_refused_with_the_way_out() -> None:
    gpu = LaunchSettings(num_workers=2, use_gpu=True)
    with pytest.raises(ConfigError, match=r"needs 2 GPUs.*there are 1.*use_gpu=false, or launch.num_workers=1"):
        require_resources(gpu, num_gpus=1, num_cpus=8)
    # a machine without a GPU holds no number of such workers
    with pytest.raises(ConfigError, match=r"there are 0.*use_gpu=false\.$"):
        require_resources(gpu, num_gpus=0, num_cpus=8)
    require_resources(gpu, num_gpus=2, num_cpus=8)
    require_resources(gpu.model_copy(update={"min_workers": 1}), num_gpus=1, num_cpus=8)
    with pytest.raises(ConfigError, match=r"cpus_per_worker=9.*8 CPUs"):
        require_resources(LaunchSettings(cpus_per_worker=9), num_gpus=0, num_cpus=8)
    # workers may outnumber CPUs: they take turns
    require_resources(LaunchSettings(num_workers=20), num_gpus=0, num_cpus=8)


def test_what_a_cluster_cannot_hold_is_refused_unless_it_grows(caplog: pytest.LogCaptureFixture) -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}, {"CPU": 3.0, "GPU": 4.0}]
    settings = LaunchSettings(num_workers=3, use_gpu=True, cpus_per_worker=2)
    # two on the first node, none without a GPU, one where three CPUs are
    require_room(settings, nodes)
    with pytest.raises(ConfigError, match=r"num_workers=4 of 2 CPU and 1 GPU each.*3 nodes.*hold 3.*wait_for_nodes=t"):
        require_room(settings.model_copy(update={"num_workers": 4}), nodes)
    growing = settings.model_copy(update={"num_workers": 4, "wait_for_nodes": True})
    with caplog.at_level(logging.WARNING):
        require_room(growing, nodes)
    assert "waiting for it to grow" in caplog.text
    # an elastic run can do with fewer, down to its least
    require_room(LaunchSettings(num_workers=40, min_workers=19), nodes)
    with pytest.raises(ConfigError, match=r"launch.min_workers=20 of 1 CPU each.*hold 19.*set launch.min_workers or"):
        require_room(LaunchSettings(num_workers=40, min_workers=20), nodes)
    require_room(LaunchSettings(num_workers=19), nodes)
    with pytest.raises(ConfigError, match=r"num_workers=20 of 1 CPU each"):
        require_room(LaunchSettings(num_workers=20), nodes)


@pytest.mark.parametrize("ask", [check_resources, lambda settings: ray_session.ray_session(settings).__enter__()])
def test_a_gpu_that_is_not_there_is_refused_before_ray_starts(ask, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def refuse(_: LaunchSettings) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray_session, "start_ray", refuse)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="launch.use_gpu=true"):
        ask(LaunchSettings(use_gpu=True))
    with pytest.raises(ConfigError, match="cpus_per_worker"):
        ask(LaunchSettings(cpus_per_worker=(os.cpu_count() or 1) + 1))
