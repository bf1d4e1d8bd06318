"""What a precompute would do, as a table for people; reads what stands, writes nothing."""

from data_pipeline.cache_manifest import read_manifest
from data_pipeline.curation import ListedShard, make_lists, survey_tasks, unsurveyed
from data_pipeline.pack import count_records
from data_pipeline.precompute_plan import (
    PrecomputePlan,
    ShardTask,
    committed_outcome,
    describe_cache,
    plan_tasks,
    require_decoder,
    require_same_settings,
)


def describe_plan(plan: PrecomputePlan) -> str:
    """What a run would do, as a table; reads shard headers, writes nothing.

    Raises:
        DataError: a shard is missing or is no tar; the cache has other settings.
        ConfigError: decord is missing or broken, and there is video to decode.
    """
    description = describe_cache(plan)
    existing = read_manifest(plan.precompute.cache)
    if existing is not None:
        require_same_settings(plan.precompute.cache, existing, description)
    tasks = plan_tasks(plan, description)
    listed, last_line = _listed(plan, tasks)
    tasks = [listed[task.name].task if listed else task for task in tasks]
    todo = [task for task in tasks if committed_outcome(plan.precompute.cache, task) is None]
    require_decoder(todo, plan.precompute.decoder)
    longest = (plan.precompute.num_frames - 1) // description["temporal_stride"] + 1
    lines, total = [f"{'source':<20}{'shards':>8}{'to do':>8}{'clips':>10}{'at most MiB':>14}"], 0.0
    for source in plan.sources:
        of_source = [task for task in tasks if task.source == source.name]
        num_todo = sum(task.source == source.name for task in todo)
        clips = sum(listed[task.name].kept if listed else count_records(task.path) for task in of_source)
        latents = longest if source.media == "video" else 1
        largest = max(bucket.height_px * bucket.width_px for bucket in plan.buckets_of(source.name))
        grid = largest // description["spatial_stride"] ** 2
        mib = clips * latents * grid * description["latent_channels"] * 2 / 2**20
        total += mib
        lines.append(f"{source.name:<20}{len(of_source):>8}{num_todo:>8}{clips:>10}{mib:>14.1f}")
    lines.append(f"latents of the whole cache: at most {total:.1f} MiB in {plan.precompute.cache}, text beside it")
    return "\n".join([*lines, *last_line])


def _listed(plan: PrecomputePlan, tasks: list[ShardTask]) -> tuple[dict[str, ListedShard], list[str]]:
    """The clip lists as they would be, where all is surveyed; and what to say of curation."""
    if not plan.curation.enabled:
        return {}, []
    surveys, pending = survey_tasks(plan, tasks), unsurveyed(plan, tasks)
    if pending:
        return {}, [
            f"curation: {len(pending)} of {len(surveys)} shards would be surveyed, and the clips that pass it encoded"
        ]
    listed = make_lists(plan, tasks, writes=False)
    kept = sum(shard.kept for shard in listed.values())
    dropped = sum(sum(shard.dropped.values()) for shard in listed.values())
    return listed, [f"curation: all {len(surveys)} shards are surveyed; {kept} clips are kept, {dropped} dropped"]
