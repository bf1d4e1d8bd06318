"""What needs more than one section of a run to check; it reads plain values and changes nothing."""

from collections.abc import Sequence

from m4v_dist.config.data_settings import BucketSettings
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError


def validate(config: RunConfig) -> None:
    """Check what needs more than one section; change nothing.

    Raises:
        ConfigError: the sections contradict one another; the message holds the values and the way out.
    """
    names = [source.name for source in config.sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"sources: {twice} stand twice; give each source its own name.")
    _validate_sequence(config)
    _validate_batch(config)
    _validate_sizes(config)
    for stage in config.curriculum:
        rank = config.model.lora.rank
        if ("base" in stage.freeze) != (rank > 0):
            raise ConfigError(
                f"curriculum {stage.name!r}: freeze={list(stage.freeze)}, but model.lora.rank={rank}; "
                'adapters train on a frozen base and nothing trains without them: give every stage freeze = ["base"] '
                "and a rank, or neither."
            )
    hpz, workers = config.trainer.hpz_partition_size, config.launch.num_workers
    if hpz > 1 and (config.trainer.zero_stage != 3 or workers % hpz):
        raise ConfigError(
            f"trainer.hpz_partition_size={hpz} needs trainer.zero_stage=3 and must divide launch.num_workers; they are "
            f"{config.trainer.zero_stage} and {workers}: use the number of GPUs in a node, or 1."
        )
    _validate_elastic(config)
    _validate_windows(config)
    if config.trainer.compile == "blocks" and config.model.recompute == "selective":
        raise ConfigError(
            'trainer.compile="blocks" hides the linears from model.recompute="selective", which would keep nothing of '
            'them; set model.recompute="blocks", or trainer.compile="none".'
        )
    if config.kernels.backend in ("triton", "mamba_ssm") and not config.launch.use_gpu:
        raise ConfigError(
            f'kernels.backend="{config.kernels.backend}" runs on GPUs, but launch.use_gpu=false; set it to true, or '
            'kernels.backend="reference_chunked".'
        )
    train_names = {source.name for source in config.train_sources}
    cached = set(config.precompute.buckets)
    for source in config.sources:
        stray = [bucket for bucket in source.buckets if bucket not in cached]
        if stray:
            raise ConfigError(
                f"sources {source.name!r}: bucket {_sizes(stray)} is not among precompute.buckets "
                f"({_sizes(config.precompute.buckets)}); add it there, or take one of them."
            )
    own_buckets = {source.name: source.buckets or config.precompute.buckets for source in config.sources}
    for stage in config.curriculum:
        unknown = sorted(set(stage.weights) - train_names)
        if unknown:
            raise ConfigError(
                f"curriculum {stage.name!r}: weights name {unknown}, but the training sources are "
                f'{sorted(train_names)}; add the source with split = "train", or drop the weight.'
            )
        missing = [bucket for bucket in stage.buckets if bucket not in cached]
        if missing:
            raise ConfigError(
                f"curriculum {stage.name!r}: bucket {_sizes(missing)} is not among precompute.buckets; add it there."
            )
        for name in stage.weights:
            if not set(own_buckets[name]) & set(stage.buckets):
                raise ConfigError(
                    f"curriculum {stage.name!r}: reads {_sizes(stage.buckets)}, but the clips of source {name!r} go to "
                    f"{_sizes(own_buckets[name])}; name a source that has these sizes, or drop the weight."
                )
        longest = (config.precompute.num_frames - 1) // 8 + 1
        if stage.num_latents > longest:
            raise ConfigError(
                f"curriculum {stage.name!r}: num_latents={stage.num_latents} is longer than the cache's {longest} "
                f"({config.precompute.num_frames} frames); raise precompute.num_frames to "
                f"{(stage.num_latents - 1) * 8 + 1} or shorten the stage."
            )
    if config.trainer.sample_every_steps and not config.sampling.prompts:
        raise ConfigError(
            f"trainer.sample_every_steps={config.trainer.sample_every_steps}, but sampling.prompts is empty; name the "
            "prompts that are sampled beside training, or set it to 0."
        )
    stages, sampling = config.objective.num_pyramid_stages, config.sampling
    steps = {"first_unit_steps": sampling.first_unit_steps, "later_unit_steps": sampling.later_unit_steps}
    wrong = [f"{name}={list(given)} has {len(given)}" for name, given in steps.items() if len(given) != stages]
    if wrong:
        raise ConfigError(
            f"sampling: {', '.join(wrong)}, but it needs one number for each of the {stages} pyramid stages."
        )


def _validate_sequence(config: RunConfig) -> None:
    size, workers, model = config.launch.sequence_parallel, config.launch.num_workers, config.model
    if workers % size:
        raise ConfigError(
            f"launch.sequence_parallel={size} does not divide launch.num_workers={workers}; use one of "
            f"{_divisors(workers)}, or {(workers // size + 1) * size} workers."
        )
    has_attention = model.num_double_blocks > 0 or any(kind != "ssm" for kind in model.block_mixers)
    if has_attention and model.num_heads % size:
        raise ConfigError(
            f"launch.sequence_parallel={size} does not divide model.num_heads={model.num_heads}, and in attention each "
            f"sequence rank takes an equal share of the heads; use one of {_divisors(model.num_heads)}."
        )


def _validate_elastic(config: RunConfig) -> None:
    """Ray starts an elastic run on any number of ranks from the fewest to the most, multiples of nothing."""
    launch = config.launch
    groups = {
        "launch.sequence_parallel": launch.sequence_parallel,
        "trainer.hpz_partition_size": config.trainer.hpz_partition_size,
    }
    for name, size in groups.items():
        if launch.min_workers is not None and size > 1:
            raise ConfigError(
                f"launch.min_workers={launch.min_workers} does not go with {name}={size}: a node that is lost may "
                f"leave any number of ranks, and groups of {size} need a multiple; leave out launch.min_workers, or "
                f"set {name}=1."
            )


def _validate_windows(config: RunConfig) -> None:
    """What would never come, and is missed only when it was needed."""
    trainer, last = config.trainer, config.total_steps - 1
    if trainer.profile is not None:
        stray = [rank for rank in trainer.profile.ranks if not 0 <= rank < config.launch.num_workers]
        if stray:
            raise ConfigError(
                f"trainer.profile.ranks names {stray}, but launch.num_workers={config.launch.num_workers} has ranks 0 "
                f"to {config.launch.num_workers - 1}; name ranks that there are."
            )
        if trainer.profile.start_step > last:
            raise ConfigError(
                f"trainer.profile.start_step={trainer.profile.start_step} is past the curriculum's last step {last}; "
                "begin the window earlier."
            )
    if trainer.keep_every_steps % trainer.checkpoint_every_steps:
        raise ConfigError(
            f"trainer.keep_every_steps={trainer.keep_every_steps} is no multiple of trainer.checkpoint_every_steps="
            f"{trainer.checkpoint_every_steps}, so most of what should stay is never saved; use "
            f"{(trainer.keep_every_steps // trainer.checkpoint_every_steps + 1) * trainer.checkpoint_every_steps}."
        )


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)


def _sizes(buckets: Sequence[BucketSettings]) -> str:
    return ", ".join(f"{bucket.height_px}x{bucket.width_px}" for bucket in buckets)


def _validate_batch(config: RunConfig) -> None:
    slots, group = config.trainer.global_batch_slots, config.trainer.sync_group
    if slots % group:
        raise ConfigError(
            f"trainer.global_batch_slots={slots} is no multiple of trainer.sync_group={group}; "
            f"use {(slots // group + 1) * group}, or a smaller group."
        )


def _validate_sizes(config: RunConfig) -> None:
    """Every grid must halve evenly down to one patch of the coarsest pyramid stage."""
    multiple = 8 * config.model.patch_size * 2 ** (config.objective.num_pyramid_stages - 1)
    sizes = [(f"curriculum {p.name!r}", b.height_px, b.width_px) for p in config.curriculum for b in p.buckets]
    sizes.append(("sampling", config.sampling.height_px, config.sampling.width_px))
    for where, height_px, width_px in sizes:
        if height_px % multiple or width_px % multiple:
            raise ConfigError(
                f"{where}: {height_px}x{width_px} px does not divide into patches at all "
                f"{config.objective.num_pyramid_stages} pyramid stages; both sides must be multiples of {multiple} "
                f"(8 px a latent, patches of {config.model.patch_size}, halved at each stage), as "
                f"{_nearest(height_px, multiple)} high and {_nearest(width_px, multiple)} wide."
            )


def _nearest(size_px: int, multiple: int) -> str:
    """The multiples next to a size, or the size itself where it is one."""
    below = size_px // multiple * multiple
    if below == size_px:
        return str(size_px)
    return f"{below} or {below + multiple}" if below else str(multiple)
