"""Whether a run folder may go on under a config: what changed since its checkpoint, and what may change.

May change: where things are and how they run (run.name, run.folder, launch, logging, sampling, export, precompute,
kernels, ZeRO stage, micro-batch, what is saved and validated when), and curriculum stages that have not begun. The rest
decides weights or the order of the data, so a run that goes on must keep it: the start weights (warm_start) too, though
their files are read at step 0 alone and need not stand any more.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from m4v_dist.errors import ConfigError

logger = logging.getLogger(__name__)

FREE_SECTIONS = (
    "launch", "logging", "sampling", "benchmark", "export", "trainer.profile",
    "precompute", "kernels", "codec.weights", "text_encoder.weights",
)  # fmt: skip
"""Of codec and text encoder the paths may move: the cache's fingerprint holds the content."""
FREE_KEYS = (
    "run.name",
    "run.folder",
    "model.recompute",
    "model.recompute_fraction",
    "trainer.zero_stage",
    "trainer.hpz_partition_size",
    "trainer.reduce_gradients",
    "trainer.offload",
    "trainer.compile",
    "trainer.checkpoint_every_steps",
    "trainer.checkpoint_folder",
    "trainer.max_failed_saves",
    "trainer.save_timeout_s",
    "trainer.lease_timeout_s",
    "trainer.keep_last",
    "trainer.keep_every_steps",
    "trainer.validate_every_steps",
    "trainer.held_out_slots",
    "trainer.max_skipped_steps",
    "trainer.sample_every_steps",
    "trainer.replica_check_every_steps",
    "trainer.stall_timeout_s",
    "trainer.stall_start_timeout_s",
    "trainer.stall_abort_s",
    "trainer.num_threads",
    "trainer.prefetch_steps",
    "trainer.reads_in_flight",
    "trainer.share_reads_mib",
)


@dataclass(frozen=True)
class Change:
    """One setting that differs: dotted key, value at the checkpoint, value now, and whether that is allowed."""

    key: str
    before: Any
    now: Any
    is_allowed: bool

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.now!r}"


def changes(before: Mapping[str, Any], now: Mapping[str, Any], *, stage_index: int) -> list[Change]:
    """List what differs between two resolved configs.

    Args:
        before: JSON values of the checkpoint's config.
        now: of this submission.
        stage_index: curriculum stage of the checkpoint; later ones have not begun.
    """
    old, new = _flat(_comparable(before)), _flat(_comparable(now))
    # Any other key that only one of them has was added or removed by the code, not by the user.
    gone = [key for key in old if key.startswith("sources.") and key not in new]
    differing = [key for key in old if key in new and old[key] != new[key]]
    return [Change(key, old[key], new.get(key), _is_free(key, stage_index)) for key in [*gone, *differing]]


def require_same_run(before: Mapping[str, Any], now: Mapping[str, Any], *, stage_index: int, where: str) -> None:
    """Log what differs and refuse what would change weights or the order of the data.

    Args:
        before, now, stage_index: see `changes`.
        where: the checkpoint, for messages.

    Raises:
        ConfigError: with each refused key and both values.
    """
    found = changes(before, now, stage_index=stage_index)
    for change in found:
        logger.info("config differs from %s: %s%s", where, change, "" if change.is_allowed else " (refused)")
    refused = [str(change) for change in found if not change.is_allowed]
    if refused:
        raise ConfigError(
            f"{where} was trained with other settings, which decide weights or the order of the data: "
            f"{'; '.join(refused)}. Set them back to go on, or give another run.folder for a new run."
        )


def _is_free(key: str, stage_index: int) -> bool:
    if key in FREE_KEYS or any(key == section or key.startswith(f"{section}.") for section in FREE_SECTIONS):
        return True
    section, _, rest = key.partition(".")
    if section != "curriculum":
        return False
    index, _, field = rest.partition(".")
    # The stage of the checkpoint may be lengthened or cut; that it is not cut below the step is checked elsewhere.
    return (
        int(index) > stage_index or field == "micro_batch_slots" or (int(index) == stage_index and field == "num_steps")
    )


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with its sources by name, and of each only what training reads: their shards may move."""
    sources = {item["name"]: f"{item['media']}, {item['split']}" for item in config["sources"]}
    return {**config, "sources": sources}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections to dotted keys; of lists only those of sections are walked.

    A mix of sources and a stage's buckets are one value each: one more or less decides what is drawn.
    """
    if prefix.endswith((".weights", ".buckets")):
        return {prefix: value}
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        items = {str(position): item for position, item in enumerate(value)}.items()
    else:
        return {prefix: value}
    return {key: leaf for name, item in items for key, leaf in _flat(item, f"{prefix}.{name}".strip(".")).items()}
