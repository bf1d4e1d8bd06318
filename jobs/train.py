"""`python -m jobs.train --config run.toml`: train the whole curriculum from the latent cache.

The composition root of training: what each worker builds, and what is checked before any worker starts. Submitting the
same command on a run folder that is not empty goes on from its newest committed checkpoint; after the end it says so.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from data_pipeline.latent_cache import LatentCache
from data_pipeline.loader import LatentLoader
from data_pipeline.mixture import num_micro_batches
from data_pipeline.slot_plan import SlotPlanner
from jobs import cli
from m4v_dist import storage
from m4v_dist.config.load import config_from_json, config_to_json
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.frozen.latent_normalization import LatentNormalization
from m4v_dist.frozen.text_encoder import text_encoder_fingerprint
from m4v_dist.frozen.video_vae import build_codec
from m4v_dist.launch.progress import TrainingProgress
from m4v_dist.launch.ray_session import check_resources, ray_session
from m4v_dist.launch.ray_workers import run_workers
from m4v_dist.model.build import build_model, build_on_meta, require_channels, require_text_widths
from m4v_dist.model.start_weights import check_start_weights
from m4v_dist.objective.flow_matching import PyramidFlowMatching
from m4v_dist.objective.history import choose_unit, num_segment_tokens
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.stop_request import StopRequest
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.curriculum import curriculum_stages
from m4v_dist.trainer.deepspeed_engine import model_state_bytes
from m4v_dist.trainer.optimizer import is_frozen
from m4v_dist.trainer.resume import require_same_run
from m4v_dist.trainer.trainer import Trainer
from m4v_dist.weights_file import fill_weights

logger = logging.getLogger(__name__)

_PLANNED_STEPS = 4
"""Steps of each stage that a dry run plans, to count tokens."""


def train(config: RunConfig, dry_run: bool) -> str:
    """Check what can be known, then train on Ray workers.

    Raises:
        ConfigError: the run folder cannot be used, or belongs to a run with other settings.
        DataError: the cache is missing, of another codec, or too small for a stage; or a checkpoint or the start
            weights are damaged.
        RetriesExhaustedError: workers failed too often.
        OutOfMemoryJobError: a worker ran out of memory.
        NonFiniteError: training diverged.
        PreemptedError: asked to stop, and saved if there was time for it.
    """
    config = with_absolute_paths(config)
    step = check_run_folder(config)
    if step == 0 and config.start_weights is not None:
        check_start_weights(config, build_on_meta(config.model, config.kernels))
    loader = check_data(config)
    if dry_run:
        check_resources(config.launch)
        logger.info("plan\n%s", plan_table(config, loader, step))
        if step == config.total_steps:
            return f"dry run: nothing is left to do; {config.run.folder} is trained to its last step {step}"
        return "dry run: the plan above can be done; nothing was written"
    loader.close()
    if step == config.total_steps:
        return f"nothing to do: {config.run.folder} is trained to its last step {step}"
    notes = storage.join(config.run.folder, "attempts", "ray")
    # Left before the last line is printed: the workers' log comes first, the job's answer last.
    with ray_session(config.launch), TrainingProgress(config.run.folder, config.total_steps, step):
        result = run_workers(
            train_on_rank,
            {"config": config_to_json(config)},
            config.launch,
            config.run.name,
            notes,
            progress=newest_checkpoint,
        )
    loss = result["held_out_loss"]
    held_out = "" if loss is None else f", held-out loss {loss:.4f}"
    return f"{result['step']} steps done{held_out}; {result['checkpoint']}"


def train_on_rank(task: dict[str, Any], stop_requests: Callable[[], Sequence[StopRequest]]) -> dict[str, Any]:
    """What one worker does: build cache, loader, model, objective and trainer, and run."""
    config = config_from_json(task["config"])
    torch.set_num_threads(config.trainer.num_threads)
    mesh = Mesh.of_process_group(use_gpu=config.launch.use_gpu)
    cache = LatentCache.open(config.precompute.cache)
    normalization = LatentNormalization.from_json(cache.manifest["normalization"])

    def fill_start(model: nn.Module) -> None:
        if config.start_weights is not None:
            logger.info("beginning with the weights of %s", config.start_weights)
            fill_weights(model, config.start_weights)

    trainer = Trainer(
        config,
        mesh,
        build_model=lambda: build_model(config.model, config.kernels, seed=config.run.seed),
        fill_start=fill_start,
        objective=PyramidFlowMatching(config.objective, normalization.normalize, mesh.device),
        loader=build_loader(config, cache, mesh.rank, mesh.world_size),
        stop_requests=stop_requests,
    )
    return asdict(trainer.run())


def newest_checkpoint(task: dict[str, Any]) -> str | None:
    """What a restart would go on from: it has brought nothing new if the one before it went on from the same."""
    return checkpoint.newest_committed(storage.join(config_from_json(task["config"]).run.folder, "checkpoints"))


def build_loader(config: RunConfig, cache: LatentCache, rank: int, world_size: int) -> LatentLoader:
    """The loader of one rank."""
    planner = SlotPlanner(
        cache,
        sources=config.sources,
        curriculum=config.curriculum,
        seed=config.run.seed,
        num_slots=config.trainer.global_batch_slots,
        group_size=config.trainer.sync_group,
        objective=config.objective,
        choose_unit=choose_unit,
        num_segment_tokens=num_segment_tokens,
        patch_size=config.model.patch_size,
    )
    return LatentLoader(
        planner,
        rank=rank,
        world_size=world_size,
        prefetch_steps=config.trainer.prefetch_steps,
        held_out_slots=config.trainer.held_out_slots,
        max_bad_fraction=config.precompute.max_bad_fraction,
    )


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Local folders as seen from here: workers stand in another working directory."""

    def absolute(path: str) -> str:
        return path if storage.is_remote(path) else os.path.abspath(path)

    run = config.run.model_copy(update={"folder": absolute(config.run.folder)})
    precompute = config.precompute.model_copy(update={"cache": absolute(config.precompute.cache)})
    warm_start = config.warm_start
    if warm_start.weights is not None:
        warm_start = warm_start.model_copy(update={"weights": absolute(warm_start.weights)})
    return config.model_copy(update={"run": run, "precompute": precompute, "warm_start": warm_start})


def check_run_folder(config: RunConfig) -> int:
    """Find the step that the run folder stands at, and check that this config may go on from there.

    Raises:
        ConfigError: a remote folder, or another run's.
        DataError: its newest checkpoint is damaged.
    """
    folder = config.run.folder
    if storage.is_remote(folder):
        raise ConfigError(
            f"run.folder={folder}: training writes to local or mounted folders so far; the cache may be on s3://."
        )
    newest = checkpoint.newest_committed(storage.join(folder, "checkpoints"))
    if newest is None:
        return 0
    checkpoint.check(newest)
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


def check_data(config: RunConfig) -> LatentLoader:
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
    loader = build_loader(config, cache, 0, config.launch.num_workers)
    for index in range(len(config.curriculum)):
        loader.enter(index, 0)
    loader.held_out()
    build_on_meta(config.model, config.kernels)
    return loader


def _require_short_texts(config: RunConfig, cache: LatentCache) -> None:
    """Refuse texts that this run's encoder would have cut: their tokens are planned and trained with as they are.

    The encoder's own are never longer. What the index says is what a record must hold (`LatentCache.read`).
    """
    limit = config.text_encoder.max_tokens
    rows = [row for source in config.sources for row in cache.rows(source.name) if row.num_text_tokens > limit]
    if rows:
        raise DataError(
            f"{cache.path}: {len(rows)} records have more text tokens than text_encoder.max_tokens={limit}, the first "
            f"is {rows[0].source}/{rows[0].key} with {rows[0].num_text_tokens}; another program wrote them: "
            f"{cache.how_to_redo(row.shard for row in rows)}."
        )


def plan_table(config: RunConfig, loader: LatentLoader, step: int) -> str:
    """Steps, slots, tokens, parameters and memory of each stage, as text."""
    workers, slots = config.launch.num_workers, config.trainer.global_batch_slots
    named = [(name, p.numel()) for name, p in build_on_meta(config.model, config.kernels).named_parameters()]
    total = sum(size for _, size in named)
    lines = [
        f"{'stage':<16}{'steps':>14}{'slots':>7}{'micro-batches':>15}{'latents':>9}{'tokens/step':>13}{'training':>14}"
    ]
    for curriculum_stage in curriculum_stages(config.curriculum):
        settings = curriculum_stage.settings
        loader.enter(curriculum_stage.index, 0)
        batches = [batch for batch, _ in zip(loader.steps(), range(_PLANNED_STEPS), strict=False)]
        tokens = sum(slot.num_tokens for b in batches for micro in b.micro_batches for slot in micro.slots)
        loader.load_state_dict({**loader.state_dict(), "next_step": 0, "cursors": {}})
        training = sum(size for name, size in named if not is_frozen(name, settings.freeze))
        span = f"{curriculum_stage.start}..{curriculum_stage.stop}"
        micro = f"{workers} x {num_micro_batches(slots, workers, settings.micro_batch_slots)}"
        lines.append(
            f"{settings.name:<16}{span:>14}{slots:>7}{micro:>15}{settings.num_latents:>9}"
            f"{round(tokens * workers / len(batches)):>13,}{training:>14,}"
        )
    loader.close()
    zero_stage, least = config.trainer.zero_stage, config.launch.least_workers
    states, most = (model_state_bytes(total, zero_stage, ranks) / 2**30 for ranks in (workers, least))
    fewer = f", {most:.2f} on {least} of launch.min_workers" if least < workers else ""
    lines.append(
        f"{total:,} parameters; weights, gradients, moments and average take {states:.2f} GiB a rank (ZeRO "
        f"{zero_stage}, {workers} ranks{fewer}); tokens from the first {_PLANNED_STEPS} steps of rank 0"
    )
    weights = f" with the weights of {config.start_weights}" if step == 0 and config.start_weights else ""
    lines.append(f"starts at step {step} of {config.total_steps}{weights}; folder {config.run.folder}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(cli.main("train", train, "Train the curriculum of a run on Ray workers."))
