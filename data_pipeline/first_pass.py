"""Pass 1 of a precompute with curation: survey what is not surveyed, list what is encoded; nothing where it is off."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from data_pipeline.curation import ListedShard, format_counts, make_lists, survey_tasks, unsurveyed
from data_pipeline.precompute_plan import PrecomputePlan, ShardOutcome, ShardTask
from data_pipeline.precompute_progress import collect_surveys
from data_pipeline.ray_pool import ActorPool, run_on_ray
from data_pipeline.survey_actor import SurveyActor
from m4v_dist.lease import Lease, require_held

logger = logging.getLogger(__name__)

RunSurveys = Callable[[PrecomputePlan, list[ShardTask], Lease], None]
"""Surveys the pending shards under a lease; `run_surveys_on_ray` is the one of every job."""


def survey_and_list(
    plan: PrecomputePlan,
    tasks: Sequence[ShardTask],
    lease: Lease,
    join_ray: Callable[[], None],
    run_surveys: RunSurveys,
) -> dict[str, ListedShard]:
    """Survey what is not surveyed yet, then write the clip lists.

    Args:
        plan: what to do.
        tasks: of pass 2, in the order of the sources.
        lease: on the cache.
        join_ray: called before workers are needed.
        run_surveys: does the work.

    Returns:
        what the lists say, by task name; empty where curation is off.
    """
    if not plan.curation.enabled:
        return {}
    pending = unsurveyed(plan, tasks)
    if pending:
        num_all = len(survey_tasks(plan, tasks))
        logger.info("curation: %d shards: %d surveyed before, %d to do", num_all, num_all - len(pending), len(pending))
        join_ray()
        run_surveys(plan, pending, lease)
    require_held(plan.precompute.cache, lease)
    listed = make_lists(plan, tasks)
    logger.info("curation\n%s", format_counts(listed))
    return listed


def run_surveys_on_ray(plan: PrecomputePlan, pending: list[ShardTask], lease: Lease) -> None:
    """Survey the pending shards in an actor pool on the Ray that is up; see `RunSurveys` and `collect_surveys`."""
    tasks = [json.dumps(asdict(task)) for task in pending]
    pool = ActorPool.of_surveys(plan.curation, plan.precompute.wait_for_nodes)
    collect_surveys(run_on_ray(SurveyActor, (plan, lease), tasks, pool), len(pending))


def lists_as_they_stand(plan: PrecomputePlan, tasks: Sequence[ShardTask]) -> dict[str, ListedShard] | None:
    """The clip lists that the surveys give, nothing written; empty where curation is off, None where one is missing."""
    if unsurveyed(plan, tasks):
        return None
    return make_lists(plan, tasks, writes=False) if plan.curation.enabled else {}


def with_lists(tasks: Sequence[ShardTask], listed: Mapping[str, ListedShard]) -> list[ShardTask]:
    """The tasks with their lists, if there are any."""
    return [listed[task.name].task if listed else task for task in tasks]


def with_curation(outcomes: dict[str, ShardOutcome], listed: Mapping[str, ListedShard]) -> dict[str, ShardOutcome]:
    """What became of all clips: of those too that pass 1 dropped, or could not survey."""
    nothing_done = {
        name: ShardOutcome(shard.task.source, shard.task.fingerprint)
        for name, shard in listed.items()
        if shard.quarantined
    }
    return {
        name: listed[name].outcome_with(outcome) if listed else outcome
        for name, outcome in (nothing_done | outcomes).items()
    }
