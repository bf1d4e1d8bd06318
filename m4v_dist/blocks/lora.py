"""Low-rank adapters beside linears: the base is frozen, two thin matrices a linear train, and merging undoes them.

An adapted linear gives W x + b + (alpha / rank) U D x. U starts at zero, so that the model starts as its base; W keeps
its name, so weights of the base fit as they are. Forty lines of our own: a package for it would wrap the model, and
with it all names that checkpoints are keyed by.

Source: LoRA (Hu et al. 2021).

Legend: `i` `o` widths in and out of a linear, `r` rank.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m4v_dist.config.model_settings import LoraSettings

DOWN, UP = "lora_down", "lora_up"
TARGETS: dict[str, frozenset[str]] = {
    "attention": frozenset({"to_q", "to_k", "to_v", "to_out"}),
    "ssm": frozenset({"in_proj", "x_proj", "dt_proj", "out_proj"}),
    "feed_forward": frozenset({"ff_in", "ff_out", "proj_mlp", "proj_out"}),
}
"""The names of the linears that a target stands for; the temporal branch is left out: it is small."""


class LoraLinear(nn.Linear):
    """A linear with an adapter.

    Args:
        base: its sizes, bias and device.
        rank: r.
        scale: of the adapter's output: alpha / rank.
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device=base.weight.device)
        self.scale = scale
        self.lora_down = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))  # r i
        self.lora_up = nn.Parameter(torch.empty(base.out_features, rank, device=base.weight.device))  # o r

    def initialize(self, generator: torch.Generator) -> None:
        """Down uniform in +-1 / sqrt(i), up zero."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.lora_down, -bound, bound, generator=generator)
        nn.init.zeros_(self.lora_up)

    def forward(self, input: Tensor) -> Tensor:
        """Widths i to o."""
        adapted = F.linear(F.linear(input, self.lora_down), self.lora_up)
        return super().forward(input) + self.scale * adapted


def add_adapters(model: nn.Module, settings: LoraSettings) -> None:
    """Put adapters beside the targeted linears, in place; before the model has weights.

    Args:
        model: on the meta device.
        settings: a rank of 0 adds none.
    """
    if not settings.rank:
        return
    names = frozenset().union(*(TARGETS[target] for target in settings.targets))
    scale = settings.alpha / settings.rank
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if isinstance(module, nn.Linear) and name in names and "temporal_branch" not in parent.split("."):
            setattr(model.get_submodule(parent), name, LoraLinear(module, settings.rank, scale))


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.rpartition(".")[2] in (DOWN, UP)


@torch.no_grad()
def merge_adapters(state: Mapping[str, Tensor], settings: LoraSettings) -> dict[str, Tensor]:
    """Weights of the base with the adapters in them: what the model without adapters loads, and gives the same.

    Args:
        state: of the adapted model, float32.
        settings: what the adapters were made with.
    """
    merged = {name: tensor for name, tensor in state.items() if not is_adapter(name)}
    for name, up in state.items():
        if name.rpartition(".")[2] == UP:
            path = adapter_of(name)
            weight = f"{path}.weight"
            merged[weight] = merged_weight(merged[weight], state[f"{path}.{DOWN}"], up, settings)
    return merged


@torch.no_grad()
def merged_weight(weight: Tensor, down: Tensor, up: Tensor, settings: LoraSettings) -> Tensor:
    """W + alpha / rank U D: o i, float32.

    Args:
        weight: of the base, o i.
        down: r i.
        up: o r.
        settings: what the adapter was made with.
    """
    return weight + settings.alpha / settings.rank * (up @ down)


def adapter_of(name: str) -> str:
    """The linear that a parameter belongs to, its own or an adapter's."""
    return name.rpartition(".")[0]
