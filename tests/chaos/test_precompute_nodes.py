"""A node is lost without a word under a precompute, and another one comes: the shards of the lost one are done again.

Minutes long, so no part of `make test`: python -m pytest -s -m chaos tests/chaos/test_precompute_nodes.py
"""

from pathlib import Path

import pytest

from tests.chaos.nodes import WAIT_S, driver, nodes, wait_for
from tests.data_pipeline.copied_shards import CopiedShards, files_of

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.slow]


def test_a_precompute_outlives_a_lost_node_and_uses_a_new_one(tmp_path: Path) -> None:
    shards = CopiedShards(tmp_path, num_shards=120)
    shards.write()
    cache, log = tmp_path / "cache", tmp_path / "log"

    def num_committed() -> int:
        return len(list((cache / "index").glob("*.parquet")))

    config = shards.config(str(cache), num_actors=2, min_actors=1, wait_for_nodes=True)
    with (
        nodes(2) as (cluster, (first, _)),
        driver(config, cluster.env, log, module=("jobs.precompute_latents",)) as job,
    ):
        started = wait_for("ten shards", lambda: num_committed() >= 10, job, log)
        cluster.lose(first)
        before = num_committed()
        lost = wait_for("ten more", lambda: num_committed() >= before + 10, job, log)
        cluster.add()
        assert job.wait(WAIT_S) == 0, log.read_text()[-6000:]
    print(f"ten shards more {lost - started:.1f} s after a node was lost")
    assert files_of(cache) == shards.undisturbed()
