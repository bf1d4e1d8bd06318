"""The file of a model's start weights in our own names: what an import writes, and a training run begins with.

A local safetensors file of every parameter in float32. Its metadata says what it was imported from, for which model,
and which seed drew what the import left fresh, so that a run whose config says otherwise does not begin with it unseen:
rotary widths, scan paths and masks leave every shape as it is.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from m4v_dist import storage, tensor_files
from m4v_dist.blocks.lora import is_adapter
from m4v_dist.config.model_settings import ModelSettings
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError
from m4v_dist.weights_file import read_layout, require_layout

_SOURCE, _SEED, _MODEL = "warm_start.source", "run.seed", "m4v_dist.model"
_NO_MATTER = {"model.preset", "model.ablation", "model.recompute", "model.recompute_fraction", "model.ssm.chunk_size"}
"""Settings that change no output: names of other settings, and how the same is computed."""


def write_start_weights(path: str, model: nn.Module, config: RunConfig) -> None:
    """Write all parameters of `model` but adapters, tensor by tensor, at once visible.

    Args:
        path: a local file.
        model: on the CPU.
        config: what the model was imported under.
    """
    base = {name: tensor for name, tensor in model.state_dict().items() if not is_adapter(name)}
    tensor_files.stream_tensors(path, base, _metadata(config))


def check_start_weights(config: RunConfig, model: nn.Module) -> None:
    """Check the file that a run is to begin with, by its header.

    Args:
        config: of the run; its `start_weights` is the file.
        model: of the run; may be on the meta device.

    Raises:
        ConfigError: there is no such file, or it was imported from elsewhere, for another model or with another seed
            than the config says; each setting that differs is named with both values.
        DataError: damaged, or no start weights of this model.
    """
    path = config.start_weights
    assert path is not None, "asked only of a run with start weights"
    if not os.path.isfile(path):
        raise ConfigError(
            f"{storage.shown(path)}: no such file, and the run is to begin with it (warm_start); run "
            "jobs.import_checkpoint with the same config first, or give warm_start.weights another path."
        )
    layout = read_layout(path)
    base = {name: tensor for name, tensor in model.state_dict().items() if not is_adapter(name)}
    found = tensor_files.read_tensor_metadata(path)
    _require_same_model(path, json.loads(found.get(_MODEL, "{}")), config.model)
    require_layout(path, layout, base, "Run jobs.import_checkpoint again with this config.")
    wanted = _metadata(config)
    differing = [
        f"{key}={found[key]!r}, the config says {wanted[key]!r}"
        for key in (_SOURCE, _SEED)
        if key in found and found[key] != wanted[key]
    ]
    if config.warm_start.source is not None and differing:
        raise ConfigError(
            f"{path}: was imported with {' and '.join(sorted(differing))}; run jobs.import_checkpoint again, or set it "
            "back."
        )


def _require_same_model(path: str, found: Mapping[str, Any], model: ModelSettings) -> None:
    wanted = _flat("model", model.model_dump(mode="json"))
    differing = [
        f"{key}: {found[key]!r} -> {wanted[key]!r}"
        for key in wanted
        if key in found and key not in _NO_MATTER and found[key] != wanted[key]
    ]
    if differing:
        raise ConfigError(
            f"{path}: was imported for another model: {'; '.join(differing)} (file -> config). Run "
            "jobs.import_checkpoint again with this config, or set the keys back."
        )


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by their dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}.{name}"
        flat |= _flat(key, value) if isinstance(value, dict) else {key: value}
    return flat


def _metadata(config: RunConfig) -> dict[str, str]:
    model = _flat("model", config.model.model_dump(mode="json"))
    return {_SOURCE: str(config.warm_start.source), _SEED: str(config.run.seed), _MODEL: json.dumps(model)}
