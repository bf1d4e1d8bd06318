"""What needs more than one section of a run to check; it reads plain values and changes nothing."""

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
    _validate_batch(config)
    _validate_sizes(config)
    train_names = {source.name for source in config.train_sources}
    cached = set(config.precompute.buckets)
    for stage in config.curriculum:
        unknown = sorted(set(stage.weights) - train_names)
        if unknown:
            raise ConfigError(
                f"curriculum {stage.name!r}: weights name {unknown}, but the training sources are "
                f'{sorted(train_names)}; add the source with split = "train", or drop the weight.'
            )
        missing = [bucket for bucket in stage.buckets if bucket not in cached]
        if missing:
            sizes = [f"{bucket.height_px}x{bucket.width_px}" for bucket in missing]
            raise ConfigError(
                f"curriculum {stage.name!r}: bucket {', '.join(sizes)} is not among precompute.buckets; add it there."
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
    if (
        len(config.sampling.first_unit_steps) != config.objective.num_pyramid_stages
        or len(config.sampling.later_unit_steps) != config.objective.num_pyramid_stages
    ):
        raise ConfigError(
            f"sampling: first_unit_steps and later_unit_steps need one number for each of the "
            f"{config.objective.num_pyramid_stages} pyramid stages."
        )


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
                f"(8 px a latent, patches of {config.model.patch_size}, halved at each stage)."
            )
