"""The pool of actors: refused where no node can hold one; generic over what it does."""

from dataclasses import replace

import pytest

from data_pipeline.ray_pool import ActorPool, require_room_for_an_actor
from m4v_dist.errors import ConfigError

POOL = ActorPool(min_actors=1, max_actors=1, cpus_per_actor=1.0, gpus_per_actor=0.0, waits_for_nodes=False)


def test_an_actor_that_no_node_can_hold_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    # two CPUs in all, and a GPU elsewhere: each there is, together there is none
    nodes = [{"CPU": 1.0, "memory": 1e9}, {"CPU": 1.0, "GPU": 1.0}]
    require_room_for_an_actor(replace(POOL, gpus_per_actor=1.0), nodes)
    with pytest.raises(ConfigError, match=r"wants 2 CPU and 0 GPU .*at most 1 CPU"):
        require_room_for_an_actor(replace(POOL, cpus_per_actor=2.0), nodes)
    with pytest.raises(ConfigError, match=r"gpus_per_actor=0 encodes on CPUs.*wait_for_nodes=true"):
        require_room_for_an_actor(replace(POOL, gpus_per_actor=1.0), nodes[:1])
    require_room_for_an_actor(replace(POOL, gpus_per_actor=1.0, waits_for_nodes=True), [])
    assert "waiting for it to grow" in caplog.text
