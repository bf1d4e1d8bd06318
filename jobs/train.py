"""`python -m jobs.train --config run.toml`: train the whole curriculum from the latent cache.

The composition root of training: what each worker builds, and what is checked before any worker starts. Submitting the
same command on a run folder that is not empty goes on from its newest committed checkpoint; after the end it says so.
"""

import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from data_pipeline.host_files import SharedReads
from data_pipeline.latent_cache import LatentCache
from data_pipeline.loader import LatentLoader
from jobs import cli, plan
from jobs.batch_flops import flops_of_batches
from jobs.validation import publish_late_videos, sample_newest
from m4v_dist import storage
from m4v_dist.bench.training_plan import plan_report, require_memory
from m4v_dist.blocks.lora import is_adapter
from m4v_dist.config.load import config_from_json, config_to_json
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, DataError, StoreError
from m4v_dist.frozen.latent_normalization import LatentNormalization
from m4v_dist.frozen.text_encoder import text_encoder_fingerprint
from m4v_dist.frozen.video_vae import build_codec
from m4v_dist.launch.progress import TrainingProgress
from m4v_dist.launch.ray_session import check_resources, ray_session
from m4v_dist.launch.ray_workers import run_workers
from m4v_dist.launch.supervisor import ended_by_signals
from m4v_dist.launch.validation import ValidationSampling
from m4v_dist.lease import Holder, LeaseKeeper, require_free
from m4v_dist.model.build import build_model, build_on_meta, require_channels, require_text_widths
from m4v_dist.model.start_weights import check_start_weights
from m4v_dist.objective.flow_matching import PyramidFlowMatching
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.stop_request import StopRequest
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.curriculum import curriculum_stages
from m4v_dist.trainer.failure_report import report_failure
from m4v_dist.trainer.resume import require_same_run
from m4v_dist.trainer.trainer import Trainer
from m4v_dist.weights_file import WeightsFile, fill_weights

logger = logging.getLogger(__name__)


def train(config: RunConfig, dry_run: bool) -> str:
    """Check what can be known, then train on Ray workers.

    Raises:
        ConfigError: the run folder cannot be used, or belongs to a run with other settings; or a stage does not fit
            the memory of `launch.gpu`.
        RunInUseError: another driver trains this run.
        DataError: the cache is missing, of another codec, or too small for a stage; or a checkpoint or the start
            weights are damaged.
        RetriesExhaustedError: workers failed too often.
        OutOfMemoryJobError: a worker ran out of memory.
        NonFiniteError: training diverged.
        SaveFailedError: checkpoints cannot be written.
        PreemptedError: asked to stop, and saved if there was something to save and time for it.
    """
    config = with_absolute_paths(config)
    with ended_by_signals():
        return _train(config, dry_run)


def _train(config: RunConfig, dry_run: bool) -> str:
    step = check_run_folder(config)
    if dry_run:
        return preflight(config, step)
    if step == config.total_steps:
        # Before its inputs are looked at: they may be gone by now, and nothing needs them.
        return f"nothing to do: {config.run.folder} is trained to its last step {step}"
    cache = check_inputs(config, step)
    if config.launch.gpu is not None:
        require_memory(config, plan.planned_stages(config, cache), plan.states_of)
    holder, timeout_s = Holder.of_this_process(), config.trainer.lease_timeout_s
    cli.check_writable(config.checkpoint_folder, "trainer.checkpoint_folder")
    notes = storage.join(config.run.folder, "attempts", "ray")
    # Left before the last line is printed: the workers' log comes first, the job's answer last. The lease is given back
    # after Ray's workers are gone, since a driver that is told twice to stop leaves before them.
    with (
        LeaseKeeper(config.checkpoint_folder, holder, timeout_s),
        ray_session(config.launch),
        TrainingProgress(config.run.folder, config.total_steps, step),
        ValidationSampling(
            sample_newest,
            {"config": config_to_json(config)},
            config.run.folder,
            every_steps=config.trainer.sample_every_steps,
            settings=config.launch,
        ),
    ):
        result = run_workers(
            train_on_rank,
            {"config": config_to_json(config), "holder": holder},
            config.launch,
            config.run.name,
            notes,
            progress=newest_checkpoint,
            failure_report=report_rank_failure,
        )
    publish_late_videos(config)
    loss = result["held_out_loss"]
    held_out = "" if loss is None else f", held-out loss {loss:.4f}"
    return f"{result['step']} steps done{held_out}; {result['checkpoint']}"


def preflight(config: RunConfig, step: int) -> str:
    """Print the plan, then refuse what cannot work; where its cache cannot be used, the plan is of assumed records.

    Args:
        config: of the run.
        step: that the run folder stands at.
    """
    missing: ConfigError | DataError | StoreError | None = None
    try:
        cache = check_inputs(config, step)
    except (ConfigError, DataError, StoreError) as error:
        # Raised again below: what is missing does not keep the arithmetic from being shown.
        missing, cache = error, plan.cache_to_come(config)
    stages = plan.planned_stages(config, cache)
    found = f"records of {cache.path}" if missing is None else "assumed records, clips and texts as long as can be"
    logger.info("plan, from %s\n\n%s\n", found, plan_report(config, stages, plan.states_of))
    weights = f" with the weights of {config.start_weights}" if step == 0 and config.start_weights else ""
    logger.info("starts at step %d of %d%s; folder %s", step, config.total_steps, weights, config.run.folder)
    require_memory(config, stages, plan.states_of)
    if missing is not None:
        raise missing
    check_resources(config.launch)
    if step == config.total_steps:
        return f"dry run: nothing is left to do; {config.run.folder} is trained to its last step {step}"
    return "dry run: the plan above can be done; nothing was written"


def require_free_run(config: RunConfig) -> None:
    """Refuse a run that another driver trains, before anything of its folder is touched; the verb's `preflight`.

    Rank 0 claims the lease later on; here only so that a driver too many starts no workers and writes no `result.json`.

    Raises:
        RunInUseError: with who holds it.
    """
    config = with_absolute_paths(config)
    require_free(config.checkpoint_folder, Holder.of_this_process(), config.trainer.lease_timeout_s)


def train_on_rank(task: dict[str, Any], stop_requests: Callable[[], Sequence[StopRequest]]) -> dict[str, Any]:
    """What one worker does: build cache, loader, model, objective and trainer, and run.

    Args:
        task: `config`, JSON; `holder`, the driver that keeps the run's lease, may be left out.
        stop_requests: see `Trainer`.
    """
    config = config_from_json(task["config"])
    torch.set_num_threads(config.trainer.num_threads)
    mesh = Mesh.of_process_group(use_gpu=config.launch.use_gpu, sequence_size=config.launch.sequence_parallel)
    cache = LatentCache.open(config.precompute.cache)
    normalization = LatentNormalization.from_json(cache.manifest["normalization"])

    @functools.cache
    def start_weights(path: str) -> WeightsFile:
        logger.info("beginning with the weights of %s", path)
        return WeightsFile(path)

    def fill_start(name: str, part: nn.Module) -> None:
        if config.start_weights is not None:
            fill_weights(part, start_weights(config.start_weights), name, stays=is_adapter)

    trainer = Trainer(
        config,
        mesh,
        build_model=lambda place: build_model(
            config.model, config.kernels, seed=config.run.seed, sequence=mesh.sequence, place=place
        ),
        fill_start=fill_start,
        objective=PyramidFlowMatching(config.objective, normalization.normalize, mesh.device),
        loader=build_loader(config, cache, mesh.data_rank, mesh.data_size, pin_memory=mesh.device.type == "cuda"),
        stop_requests=stop_requests,
        holder=task.get("holder"),
        batch_flops=flops_of_batches(config),
    )
    return asdict(trainer.run())


def newest_checkpoint(task: dict[str, Any]) -> str | None:
    """What a restart would go on from: it has brought nothing new if the one before it went on from the same."""
    return checkpoint.newest_committed(config_from_json(task["config"]).checkpoint_folder)


def report_rank_failure(task: dict[str, Any], silent_ranks: list[int]) -> str | None:
    """Write why the newest attempt ended, and say it in a sentence."""
    return report_failure(config_from_json(task["config"]).run.folder, silent_ranks)


def build_loader(
    config: RunConfig, cache: LatentCache, rank: int, world_size: int, *, pin_memory: bool = False
) -> LatentLoader:
    """The loader of one data-parallel rank; its sequence ranks have equal ones."""
    share_mib = config.trainer.share_reads_mib
    if share_mib is None:
        share_mib = 1024 if storage.is_remote(cache.path) else 0
    return LatentLoader(
        plan.build_planner(config, cache),
        rank=rank,
        world_size=world_size,
        prefetch_steps=config.trainer.prefetch_steps,
        reads_in_flight=config.trainer.reads_in_flight,
        shared=SharedReads(share_mib << 20) if share_mib else None,
        has_twins=config.launch.sequence_parallel > 1,
        pin_memory=pin_memory,
        held_out_slots=config.trainer.held_out_slots,
        max_bad_fraction=config.precompute.max_bad_fraction,
    )


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Local folders as seen from here: workers stand in another working directory."""

    def absolute(path: str) -> str:
        return path if storage.is_remote(path) else os.path.abspath(path)

    run = config.run.model_copy(update={"folder": absolute(config.run.folder)})
    precompute = config.precompute.model_copy(update={"cache": absolute(config.precompute.cache)})
    warm_start, trainer = config.warm_start, config.trainer
    if warm_start.weights is not None:
        warm_start = warm_start.model_copy(update={"weights": absolute(warm_start.weights)})
    if trainer.checkpoint_folder is not None:
        trainer = trainer.model_copy(update={"checkpoint_folder": absolute(trainer.checkpoint_folder)})
    return config.model_copy(
        update={"run": run, "precompute": precompute, "warm_start": warm_start, "trainer": trainer}
    )


def check_run_folder(config: RunConfig) -> int:
    """Find the step that the run folder stands at, and check that this config may go on from there.

    Raises:
        ConfigError: a remote folder, or another run's.
        DataError: all its checkpoints are damaged; with a sound one, training goes on from that.
    """
    folder = config.run.folder
    if storage.is_remote(folder):
        raise ConfigError(
            f"run.folder={folder}: metrics are appended to, which object stores cannot do; give a local or mounted "
            "folder. Checkpoints (trainer.checkpoint_folder) and cache may be on s3://."
        )
    newest = checkpoint.newest_sound(config.checkpoint_folder)
    if newest is None:
        return 0
    stage = checkpoint.read_state(newest)["curriculum_stage"]
    before = checkpoint.read_config(newest)
    require_same_run(before, config.model_dump(mode="json"), stage_index=stage["index"], where=newest)
    step = checkpoint.step_of(newest)
    # That the stages before it are as long as they were is settled above.
    stop = next(
        (
            curriculum_stage.stop
            for curriculum_stage in curriculum_stages(config.curriculum)
            if curriculum_stage.index == stage["index"]
        ),
        config.total_steps,
    )
    if step > stop:
        raise ConfigError(
            f"{newest} is at step {step} of stage {stage['name']!r}, but that stage now ends at step {stop}; give it "
            f"at least the {step - stage['start']} steps that were done."
        )
    logger.info("going on from %s", newest)
    return step


def check_inputs(config: RunConfig, step: int) -> LatentCache:
    """Check what a run begins from: start weights if it stands at its start, and data.

    Raises:
        DataError: either is missing or damaged; see `check_data`.
    """
    if step == 0 and config.start_weights is not None:
        check_start_weights(config, build_on_meta(config.model, config.kernels))
    return check_data(config)


def check_data(config: RunConfig) -> LatentCache:
    """Open the cache with this run's fingerprint, and try every stage's buckets and the held-out slots.

    Raises:
        ConfigError: codec or text encoder are not those that the model is made for.
        DataError: a text of more tokens than the encoder gives; see `LatentCache.open` and `LatentLoader.enter`.
    """
    codec = build_codec(config.codec)
    fingerprint = codec.fingerprint() | text_encoder_fingerprint(config.text_encoder)
    cache = LatentCache.open(config.precompute.cache, fingerprint)
    require_channels(config.model, codec.latent_channels, codec.name)
    require_text_widths(config.model, cache.null_text, "the cache's text")
    _require_short_texts(config, cache)
    loader = build_loader(config, cache, 0, config.launch.num_data_ranks)
    for index in range(len(config.curriculum)):
        loader.enter(index, 0)
    loader.held_out()
    loader.close()
    build_on_meta(config.model, config.kernels)
    return cache


def _require_short_texts(config: RunConfig, cache: LatentCache) -> None:
    """Refuse texts that this run's encoder would have cut: their tokens are planned and trained with as they are.

    The encoder's own are never longer. What the index says is what a record must hold (`LatentCache.read`).
    """
    limit = config.text_encoder.max_tokens
    tables = [cache.table(source.name) for source in config.sources]
    found = [(table, record) for table in tables for record in table.longer_than(limit).tolist()]
    if found:
        table, record = found[0]
        raise DataError(
            f"{cache.path}: {len(found)} records have more text tokens than text_encoder.max_tokens={limit}, the first "
            f"is {table.source}/{table.key(record)} with {max(table.num_text_tokens(record))}; another program wrote "
            f"them: {cache.how_to_redo(table.shard(record) for table, record in found)}."
        )


if __name__ == "__main__":
    description = "Train the curriculum of a run on Ray workers."
    sys.exit(cli.main("train", train, description, preflight=require_free_run))
