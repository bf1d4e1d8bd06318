"""`python -m jobs.export --config run.toml`: a checkpoint's weights as one safetensors file, for use elsewhere.

`export.what = "model"` writes all weights in the model's own names, float32; of a run with LoRA the adapters are merged
in (W + alpha / rank U D), so that the file is that of a model without them. `"adapters"` writes the adapters alone, and
in the metadata which base they belong to: the SHA-256 of its weights, and the file that it began with. Tensors are
read, merged and written one at a time.
"""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import assert_never

import torch
from torch import Tensor

from jobs import cli
from jobs.sampled_weights import choose_checkpoint
from m4v_dist import storage, tensor_files
from m4v_dist.blocks.lora import DOWN, UP, adapter_of, is_adapter, merged_weight
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.model.build import build_on_meta
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.checkpoint_weights import CheckpointWeights
from m4v_dist.trainer.resume import changes
from m4v_dist.weights_file import WeightsFile

logger = logging.getLogger(__name__)

NO_MATTER = ("model.recompute", "model.recompute_fraction")


def export(config: RunConfig, dry_run: bool) -> str:
    """Check the checkpoint, and write the file.

    Raises:
        ConfigError: adapters are asked for of a run without them; the config's model is not the checkpoint's; its start
            weights are not the base that the adapters were trained on; or the output cannot be written.
        DataError: there is no such committed checkpoint, or it is damaged.
    """
    settings, has_adapters = config.export, config.model.lora.rank > 0
    if settings.what == "adapters" and not has_adapters:
        raise ConfigError(
            "export.what='adapters', but model.lora.rank=0: this run trains all weights and has no adapters; leave "
            "export.what out to write the model."
        )
    named = config.sampling.model_copy(update={"weights": "ema", "checkpoint": settings.checkpoint})
    path = choose_checkpoint(config.model_copy(update={"sampling": named}))
    _require_same_model(config, path)
    weights = CheckpointWeights(path, "ema" if settings.weights == "ema" else "weights")
    _require_shapes(config, weights)
    match settings.what:
        case "model":
            names = sorted(name for name in weights.shapes if not is_adapter(name))
        case "adapters":
            names = sorted(filter(is_adapter, weights.shapes))
        case _:
            assert_never(settings.what)
    out = settings.path or storage.join(
        config.run.folder, "export", f"{settings.what}_{settings.weights}_{checkpoint.step_of(path):08d}.safetensors"
    )
    size = 4 * sum(torch.Size(weights.shapes[name]).numel() for name in names)
    kinds = {"ema": "averaged", "raw": "trained"}
    merged = ", adapters merged in" if has_adapters and settings.what == "model" else ""
    told = f"{len(names)} {kinds[settings.weights]} tensors of {path}, {size / 1e6:,.1f} MB{merged}"
    if dry_run:
        return f"dry run: would write {out}: {told}; names and shapes checked, values not read, nothing was written"
    folder = out.rpartition("/")[0] or "."
    cli.check_writable(folder, setting="export.path")
    metadata = {
        "format": "pt",
        "checkpoint": path,
        "weights": settings.weights,
        "model": json.dumps(config.model.model_dump(mode="json"), sort_keys=True),
    }
    if has_adapters:
        metadata |= _base_metadata(config, weights)
    _write(out, names, weights, config, metadata)
    return f"{out}: {told}"


def _require_same_model(config: RunConfig, path: str) -> None:
    """By the settings, since scale, rotary widths and scan paths leave every shape as it is."""
    found = changes(
        checkpoint.read_config(path), config.model_dump(mode="json"), stage_index=len(config.curriculum)
    )  # fmt: skip
    refused = [str(change) for change in found if change.key.startswith("model.") and change.key not in NO_MATTER]
    if refused:
        raise ConfigError(
            f"{path} is of another model: {'; '.join(refused)} (checkpoint -> config). Export with the config that it "
            "was trained with."
        )


def _require_shapes(config: RunConfig, weights: CheckpointWeights) -> None:
    wanted = {name: tuple(p.shape) for name, p in build_on_meta(config.model, config.kernels).named_parameters()}
    differing = sorted(
        name for name in wanted.keys() | weights.shapes.keys() if wanted.get(name) != weights.shapes.get(name)
    )
    if differing:
        raise DataError(
            f"{weights.path}: {len(differing)} parameters differ in name or shape from the config's model "
            f"({', '.join(differing[:3])}), though the settings are the checkpoint's; it was written by other code."
        )


def fingerprint(names: Sequence[str], read: Callable[[str], Tensor]) -> str:
    """SHA-256 over name, shape and float32 bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(names):
        tensor = read(name)
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def _base_metadata(config: RunConfig, weights: CheckpointWeights) -> dict[str, str]:
    """Which base the adapters belong to, compared with the start weights where these still stand."""
    base = [name for name in weights.shapes if not is_adapter(name)]
    found, start = fingerprint(base, weights.read), config.start_weights
    lora = config.model.lora
    metadata = {"base_sha256": found, "lora_rank": str(lora.rank), "lora_alpha": str(lora.alpha)}
    if start is None:
        return metadata | {"base": f"drawn from run.seed={config.run.seed}"}
    if not os.path.isfile(start):
        logger.warning("%s is gone, so whether the checkpoint's base is that file was not looked at.", start)
        return metadata | {"base": start}
    file = WeightsFile(start)
    missing = sorted(set(base) - file.layout.keys())
    if missing or fingerprint(base, file.read) != found:
        what = f"lacks {missing[0]}" if missing else "holds other values"
        raise ConfigError(
            f"{weights.path}: its adapters were trained on another base than {start}, which {what}; name the "
            "start weights that the run began with, by warm_start.weights=..."
        )
    return metadata | {"base": start}


def _write(
    out: str, names: Sequence[str], weights: CheckpointWeights, config: RunConfig, metadata: dict[str, str]
) -> None:
    header = tensor_files.tensor_header({name: (weights.shapes[name], torch.float32) for name in names}, metadata)

    def chunks() -> Iterator[bytes | memoryview]:
        yield header
        for name in names:
            yield _raw(_merged(name, weights, config))

    size = len(header) + 4 * sum(torch.Size(weights.shapes[name]).numel() for name in names)
    storage.write_chunks(out, chunks, size)


def _merged(name: str, weights: CheckpointWeights, config: RunConfig) -> Tensor:
    """A parameter as it goes out: with its adapter, if it has one."""
    tensor, adapter = weights.read(name), adapter_of(name)
    if config.export.what == "adapters" or f"{adapter}.{UP}" not in weights.shapes or not name.endswith(".weight"):
        return tensor
    return merged_weight(
        tensor, weights.read(f"{adapter}.{DOWN}"), weights.read(f"{adapter}.{UP}"), config.model.lora
    )  # fmt: skip


def _raw(tensor: Tensor) -> memoryview:
    raw: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return raw


if __name__ == "__main__":
    sys.exit(
        cli.main("export", export, "Write a checkpoint's weights as one file.", preflight=cli.require_run_folder)
    )  # fmt: skip
