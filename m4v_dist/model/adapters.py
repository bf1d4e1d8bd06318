"""Widths of the linears that LoRA adapts in each kind of block: what FLOPs and memory of adapters are counted from.

Held against the adapters of a built model in `tests/model/test_adapters.py`.
"""

from dataclasses import dataclass

from m4v_dist.blocks.lora import TARGETS
from m4v_dist.config.model_settings import BlockMixer, ModelSettings


@dataclass(frozen=True)
class AdaptedLinear:
    """One linear with an adapter.

    Args:
        name: of the linear in its module.
        width_in, width_out: its widths.
        is_scanned: whether it runs on the re-composed sequence of an SSM, else on the block's tokens.
    """

    name: str
    width_in: int
    width_out: int
    is_scanned: bool = False


def double_block_adapters(settings: ModelSettings) -> list[AdaptedLinear]:
    """Of an MM-DiT block; each token passes those of one of its two streams."""
    d = settings.hidden_size
    attention = [AdaptedLinear(name, d, d) for name in ("to_q", "to_k", "to_v", "to_out")]
    return _chosen(settings, [*attention, AdaptedLinear("ff_in", d, 4 * d), AdaptedLinear("ff_out", 4 * d, d)])


def unified_block_adapters(settings: ModelSettings, mixer: BlockMixer) -> list[AdaptedLinear]:
    """Of a unified block with this mixer."""
    d, ssm = settings.hidden_size, settings.ssm
    linears = [AdaptedLinear("proj_mlp", d, 4 * d), AdaptedLinear("proj_out", 5 * d, d)]
    if mixer != "ssm":
        linears += [AdaptedLinear(name, d, d) for name in ("to_q", "to_k", "to_v")]
    if mixer != "attention":
        e, bc = d * ssm.expand, ssm.num_groups * ssm.state_dim
        if ssm.variant == "mamba1":
            projected = 2 * e
            linears.append(AdaptedLinear("x_proj", e, ssm.dt_rank + 2 * ssm.state_dim, is_scanned=True))
            linears.append(AdaptedLinear("dt_proj", ssm.dt_rank, e, is_scanned=True))
        else:
            projected = 2 * e + 2 * bc + settings.ssm_num_heads
        linears.append(AdaptedLinear("in_proj", d, projected, is_scanned=True))
        if ssm.variant != "mil":
            linears.append(AdaptedLinear("out_proj", e, d, is_scanned=True))
    return _chosen(settings, linears)


def _chosen(settings: ModelSettings, linears: list[AdaptedLinear]) -> list[AdaptedLinear]:
    names = frozenset().union(*(TARGETS[target] for target in settings.lora.targets))
    return [linear for linear in linears if linear.name in names] if settings.lora.rank else []
