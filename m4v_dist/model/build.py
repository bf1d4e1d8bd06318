"""Build a model from its settings: on the meta device first, then each parameter drawn from a seed of its own name."""

import torch
from torch import nn

from m4v_dist.batch import derive_seed
from m4v_dist.config.model_settings import KernelSettings, ModelSettings
from m4v_dist.errors import ConfigError
from m4v_dist.kernels.scan import BackendUnavailable, require_backend
from m4v_dist.kernels.selective_scan import require_selective_backend
from m4v_dist.model.pyramid import PyramidModel


def build_model(model: ModelSettings, kernels: KernelSettings, *, seed: int) -> nn.Module:
    """Return the model with fresh float32 weights on the CPU.

    A module's weights depend on (seed, its name) alone: the same block is the same in a deeper model or with another
    switch elsewhere.

    Args:
        model: sizes and switches.
        kernels: which scan backend runs.
        seed: seed of the weights.

    Raises:
        ConfigError: the scan backend cannot run here.
    """
    built = build_on_meta(model, kernels)
    built.to_empty(device="cpu")
    initialize_weights(built, seed)
    return built


def build_on_meta(model: ModelSettings, kernels: KernelSettings) -> PyramidModel:
    """Return the model with shapes and no memory.

    Raises:
        ConfigError: the scan backend cannot run here.
    """
    if any(kind != "attention" for kind in model.block_mixers):
        try:
            require = require_selective_backend if model.ssm.variant == "mamba1" else require_backend
            require(kernels.backend)
        except BackendUnavailable as error:
            raise ConfigError(str(error)) from error
    with torch.device("meta"):
        return PyramidModel(model, kernels)


def initialize_weights(model: nn.Module, seed: int) -> None:
    """Fill all parameters in place: Xavier for linears, then what a module's own `initialize` says.

    Args:
        model: any of our models, with memory.
        seed: seed of the weights.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            generator = torch.Generator(module.weight.device).manual_seed(derive_seed("weights", seed, name))
            nn.init.xavier_uniform_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    # After the linears: a module may zero, or draw anew, what it owns.
    for name, module in model.named_modules():
        initialize = getattr(module, "initialize", None)
        if initialize is not None:
            initialize(torch.Generator("cpu").manual_seed(derive_seed("weights", seed, name, "own")))
