"""Build a model from its settings: on the meta device first, then each parameter drawn from a seed of its own name."""

import torch
from torch import nn

from m4v_dist.batch import TextFeatures, derive_seed
from m4v_dist.config.model_settings import KernelSettings, ModelSettings
from m4v_dist.errors import ConfigError
from m4v_dist.kernels.scan import BackendUnavailable, require_backend
from m4v_dist.kernels.selective_scan import require_selective_backend
from m4v_dist.model.pyramid import PyramidModel
from m4v_dist.parallel.mesh import ALONE, SequenceGroup


def build_model(
    model: ModelSettings, kernels: KernelSettings, *, seed: int, sequence: SequenceGroup = ALONE
) -> nn.Module:
    """Return the model with fresh float32 weights on the CPU.

    A module's weights depend on (seed, its name) alone: the same block is the same in a deeper model or with another
    switch elsewhere.

    Args:
        model: sizes and switches.
        kernels: which scan backend runs.
        seed: seed of the weights.
        sequence: the ranks that cut the model's sequences among them; the weights are the same.

    Raises:
        ConfigError: the scan backend cannot run here.
    """
    built = build_on_meta(model, kernels, sequence)
    built.to_empty(device="cpu")
    initialize_weights(built, seed)
    return built


def build_on_meta(model: ModelSettings, kernels: KernelSettings, sequence: SequenceGroup = ALONE) -> PyramidModel:
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
        return PyramidModel(model, kernels, sequence)


def require_channels(model: ModelSettings, latent_channels: int, codec: str) -> None:
    """Check that the latents of a codec, named `codec`, are the model's.

    Raises:
        ConfigError: with both numbers.
    """
    if latent_channels != model.latent_channels:
        raise ConfigError(
            f"model.latent_channels={model.latent_channels}, but codec {codec} makes {latent_channels}; set "
            f"model.latent_channels={latent_channels}, or take the codec (codec.kind) that the model is made for."
        )


def require_text_widths(model: ModelSettings, text: TextFeatures, whose: str) -> None:
    """Check that text is as wide as the model's.

    Args:
        model: sizes of the model.
        text: any features of the text encoder; all of them are of its widths.
        whose: what the features are, for messages.

    Raises:
        ConfigError: with both widths of both.
    """
    widths = (text.tokens.shape[-1], text.pooled.shape[-1])
    if widths != (model.text_width, model.pooled_width):
        raise ConfigError(
            f"model.text_width={model.text_width}, model.pooled_width={model.pooled_width}, but {whose} is "
            f"{widths[0]} and {widths[1]} wide; set them to that, or take the text encoder (text_encoder.kind) that "
            "the model is made for."
        )


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
