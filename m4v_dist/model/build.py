"""Build a model from its settings: on the meta device first, then each parameter drawn from a seed of its own name.

Memory is given part by part (a block, an embedder), so that whoever builds may cut up each part before the next one
exists: under ZeRO 3 no rank ever holds more whole weights than those of the largest part.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from m4v_dist.batch import TextFeatures, derive_seed
from m4v_dist.blocks.lora import add_adapters
from m4v_dist.config.model_settings import KernelSettings, ModelSettings
from m4v_dist.errors import ConfigError
from m4v_dist.kernels.backend import BackendUnavailable, require_backend
from m4v_dist.kernels.selective_scan import require_selective_backend
from m4v_dist.model.pyramid import PyramidModel
from m4v_dist.parallel.mesh import ALONE, SequenceGroup

Place = Callable[[str, nn.Module], None]
"""Is given each part's name and the part, once it has its fresh weights and before the next part has memory."""


def build_model(
    model: ModelSettings,
    kernels: KernelSettings,
    *,
    seed: int,
    sequence: SequenceGroup = ALONE,
    place: Place = lambda _name, _part: None,
) -> nn.Module:
    """Return the model with fresh float32 weights on the CPU.

    A module's weights depend on (seed, its name) alone: the same block is the same in a deeper model or with another
    switch elsewhere.

    Args:
        model: sizes and switches.
        kernels: which scan backend runs.
        seed: seed of the weights.
        sequence: the ranks that cut the model's sequences among them; the weights are the same.
        place: may fill each part with other weights, and partition it.

    Raises:
        ConfigError: the scan backend cannot run here.
    """
    built = build_on_meta(model, kernels, sequence)
    for name, part in model_parts(built):
        part.to_empty(device="cpu")
        initialize_weights(part, seed, name)
        place(name, part)
    return built


def model_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts that hold all parameters: the model's children, with its lists of blocks taken apart."""
    assert not [*model.parameters(recurse=False), *model.buffers()], "a parameter of the model itself is in no part"
    assert not hasattr(model, "initialize"), "no part may be initialized by the whole"
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{number}", block) for number, block in enumerate(child))
        else:
            yield name, child


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
        built = PyramidModel(model, kernels, sequence)
        add_adapters(built, model.lora)
    return built


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


def initialize_weights(part: nn.Module, seed: int, prefix: str = "") -> None:
    """Fill all parameters in place: Xavier for linears, then what a module's own `initialize` says.

    Args:
        part: any of our models or a part of one, with memory.
        seed: seed of the weights.
        prefix: the part's name in the model.
    """
    for name, module in part.named_modules(prefix=prefix):
        if isinstance(module, nn.Linear):
            generator = torch.Generator(module.weight.device).manual_seed(derive_seed("weights", seed, name))
            nn.init.xavier_uniform_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    # After the linears: a module may zero, or draw anew, what it owns.
    for name, module in part.named_modules(prefix=prefix):
        initialize = getattr(module, "initialize", None)
        if initialize is not None:
            initialize(torch.Generator("cpu").manual_seed(derive_seed("weights", seed, name, "own")))
