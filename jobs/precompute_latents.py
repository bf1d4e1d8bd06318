"""`python -m jobs.precompute_latents --config run.toml`: raw shards to the latent cache, on Ray Data; run at will."""

import logging
import sys

from data_pipeline.actor_memory import actor_memory
from data_pipeline.manifest import list_shards
from data_pipeline.pipeline import run_precompute
from data_pipeline.plan_table import describe_plan
from data_pipeline.precompute_plan import PrecomputePlan
from jobs.cli import check_writable, main
from m4v_dist.config.schema import RunConfig
from m4v_dist.launch.ray_session import ray_session
from m4v_dist.report.curation_page import write_curation_page

logger = logging.getLogger(__name__)


def precompute_latents(config: RunConfig, dry_run: bool) -> str:
    """Fill the run's latent cache; see `pipeline.run_precompute` for what it raises."""
    plan = PrecomputePlan(config.sources, config.precompute, config.codec, config.text_encoder, config.curation)
    if dry_run:
        logger.info("plan\n%s", describe_plan(plan))
        at_most = config.precompute.media_mib_in_flight * 2**20
        logger.info("memory, for media files of up to %d MiB: %s", at_most / 2**20, actor_memory(plan, at_most))
        return "dry run: the plan above can be done; nothing was written"
    # Before the probe, which makes the cache's folder: in a fresh clone the shards are what is missing.
    for source in config.sources:
        list_shards(source.shards)
    check_writable(config.precompute.cache, "precompute.cache")
    result = run_precompute(plan, lambda: ray_session(config.launch, has_workers=False), show_lists=_show_lists)
    report = result.report
    if result.did_nothing:
        return (
            f"nothing to do: {report['kept']} records of {report['num_shards']} shards stand in {plan.precompute.cache}"
        )
    return (
        f"{report['kept']} records kept, {sum(report['filtered'].values())} filtered, "
        f"{len(report['quarantined'])} quarantined, {len(report['damaged_shards'])} shards damaged, "
        f"in {plan.precompute.cache} ({report['clips_per_s']} clips/s)"
    )


def _show_lists(cache: str) -> None:
    logger.info("distributions of all scores: %s", write_curation_page(cache))


if __name__ == "__main__":
    sys.exit(main("precompute_latents", precompute_latents, "Encode raw shards into the latent cache."))
