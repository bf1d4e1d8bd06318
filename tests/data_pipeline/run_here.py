"""The precompute with its worker in this process: all of it but Ray, which the tests marked `ray` run."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from data_pipeline.pipeline import PrecomputeResult, run_precompute
from data_pipeline.precompute_plan import PrecomputePlan, ShardTask
from data_pipeline.precompute_progress import BadLimit, DoneShards, collect, collect_surveys
from data_pipeline.shard_actor import ShardActor
from data_pipeline.survey_actor import SurveyActor
from m4v_dist.lease import Lease


def run_here(plan: PrecomputePlan) -> PrecomputeResult:
    """`run_precompute` without Ray."""
    return run_precompute(plan, nullcontext, run_shards, run_surveys)


def run_shards(plan: PrecomputePlan, pending: list[ShardTask], lease: Lease, limit: BadLimit) -> DoneShards:
    """A `pipeline.RunShards` of one worker, one shard after the other."""
    return collect(_rows(ShardActor(plan, lease), pending), len(pending), limit)


def run_surveys(plan: PrecomputePlan, pending: list[ShardTask], lease: Lease) -> None:
    """A `pipeline.RunSurveys` of one worker."""
    collect_surveys(_rows(SurveyActor(plan, lease), pending), len(pending))


def _rows(actor: ShardActor | SurveyActor, pending: list[ShardTask]) -> Iterator[dict[str, Any]]:
    try:
        for task in pending:
            columns = actor({"task": [json.dumps(asdict(task))]})
            yield {name: values[0] for name, values in columns.items()}
    finally:
        actor.close()
