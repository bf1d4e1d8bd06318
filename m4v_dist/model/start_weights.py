"""The file of a model's start weights in our own names: what an import writes, and a training run begins with.

A local safetensors file of every parameter in float32. Its metadata says what it was imported from and which seed drew
what the import left fresh, so that a training run whose config says otherwise does not begin with it unseen.
"""

import os

from torch import nn

from m4v_dist import storage
from m4v_dist.blocks.lora import is_adapter
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError
from m4v_dist.weights_file import read_layout, require_layout

_SOURCE, _SEED = "warm_start.source", "run.seed"


def write_start_weights(path: str, model: nn.Module, config: RunConfig) -> None:
    """Write all parameters of `model` but adapters, tensor by tensor, at once visible.

    Args:
        path: a local file.
        model: on the CPU.
        config: what the model was imported under.
    """
    base = {name: tensor for name, tensor in model.state_dict().items() if not is_adapter(name)}
    storage.stream_tensors(path, base, _metadata(config))


def check_start_weights(config: RunConfig, model: nn.Module) -> None:
    """Check the file that a run is to begin with, by its header.

    Args:
        config: of the run; its `start_weights` is the file.
        model: of the run; may be on the meta device.

    Raises:
        ConfigError: there is no such file, or it was imported from elsewhere or with another seed than the config says.
        DataError: damaged, or of another model.
    """
    path = config.start_weights
    assert path is not None, "asked only of a run with start weights"
    if not os.path.isfile(path):
        raise ConfigError(
            f"{path}: no such file, and the run is to begin with it (warm_start); run jobs.import_checkpoint with the "
            "same config first, or give warm_start.weights another path."
        )
    base = {name: tensor for name, tensor in model.state_dict().items() if not is_adapter(name)}
    require_layout(path, read_layout(path), base)
    found = storage.read_tensor_metadata(path)
    wanted = _metadata(config)
    differing = [
        f"{key}={found[key]!r}, the config says {wanted[key]!r}"
        for key in found.keys() & wanted.keys()
        if found[key] != wanted[key]
    ]
    if config.warm_start.source is not None and differing:
        raise ConfigError(
            f"{path}: was imported with {' and '.join(sorted(differing))}; run jobs.import_checkpoint again, or set it "
            "back."
        )


def _metadata(config: RunConfig) -> dict[str, str]:
    return {_SOURCE: str(config.warm_start.source), _SEED: str(config.run.seed)}
