"""The precompute with its worker in this process: all of it but Ray, which the tests marked `ray` run."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from data_pipeline.pipeline import PrecomputeResult, run_precompute
from data_pipeline.precompute_plan import PrecomputePlan, ShardTask
from data_pipeline.precompute_progress import BadLimit, DoneShards, collect
from data_pipeline.shard_actor import ShardActor
from m4v_dist.lease import Lease


def run_here(plan: PrecomputePlan) -> PrecomputeResult:
    """`run_precompute` without Ray."""
    return run_precompute(plan, nullcontext, run_shards)


def run_shards(plan: PrecomputePlan, pending: list[ShardTask], lease: Lease, limit: BadLimit) -> DoneShards:
    """A `pipeline.RunShards` of one worker, one shard after the other."""
    actor = ShardActor(plan, lease)

    def rows() -> Iterator[dict[str, Any]]:
        for task in pending:
            columns = actor({"task": [json.dumps(asdict(task))]})
            yield {name: values[0] for name, values in columns.items()}

    try:
        return collect(rows(), len(pending), limit)
    finally:
        actor.close()
