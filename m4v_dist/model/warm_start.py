"""A model's start weights from PyramidFlow's miniFLUX: a plan of every parameter, strict, then the copying.

Outside the unified blocks' mixers all is PyramidFlow's and is loaded as it is. A mixer of attention is loaded as it is
too; an SSM's is filled by `attention_to_ssm.py`; in a parallel block attention is loaded, and the SSM beside it filled
with its output closed. What no weight of PyramidFlow's and no rule fills (registers, temporal branch, dt and A, of
mamba2 and mamba1 D and gate too) stays as `build_model` drew it from the seed.

The plan needs names and shapes only, so it is made, checked and reported before a tensor is read. Tensors are then read
one at a time: beside the model, memory holds the sources of one parameter.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from m4v_dist.blocks.attention import AttentionMixer, QueryKeyValue
from m4v_dist.blocks.mm_dim import ParallelMixer, SsmTokenMixer
from m4v_dist.config.model_settings import KernelSettings, LoraSettings
from m4v_dist.errors import DataError
from m4v_dist.model.attention_to_ssm import Part, as_it_is, attention_to_ssm
from m4v_dist.model.build import build_on_meta
from m4v_dist.model.checkpoint_names import OTHER_NETS, TRAINED_PREFIX, to_pyramidflow_name
from m4v_dist.model.checkpoint_sizes import check_sizes
from m4v_dist.model.pyramid import PyramidModel
from m4v_dist.weights_file import TensorLayout, require_layout


@dataclass(frozen=True)
class WarmStart:
    """What fills what; sources are names as they stand in the checkpoint.

    Args:
        parts: of all parameters that PyramidFlow's weights, or a rule, fill in part or whole.
        unused: weights of miniFLUX that no parameter of this model takes.
        other_nets: names of other networks in the same file.
    """

    parts: tuple[Part, ...]
    unused: tuple[str, ...]
    other_nets: tuple[str, ...]


def plan_warm_start(model: PyramidModel, layout: Mapping[str, TensorLayout], where: str) -> WarmStart:
    """Plan the start weights of a model; reads nothing.

    Args:
        model: may be on the meta device.
        layout: of the checkpoint, names with or without "dit.".
        where: the checkpoint, for messages.

    Raises:
        ConfigError: it has other sizes than the model's settings.
        DataError: it is not the checkpoint of this model with attention in every unified block: names missing or too
            many, other shapes or dtypes, each with both values; or that of PyramidFlow's other transformer.
    """
    full_names, other_nets = _strip(layout, where)
    check_sizes(where, {name: layout[full] for name, full in full_names.items()}, model.settings)
    twin = model.settings.model_copy(update={"mixer": "attention", "ablation": None, "lora": LoraSettings()})
    wanted = build_on_meta(twin, KernelSettings()).state_dict()
    require_layout(
        where,
        {name: layout[full] for name, full in full_names.items()},
        {to_pyramidflow_name(name): tensor for name, tensor in wanted.items()},
    )
    in_file = {name: full_names[to_pyramidflow_name(name)] for name in wanted}
    parts = [
        replace(part, sources=tuple(in_file[source] for source in part.sources))
        for part in _parts(model, wanted.keys())
    ]
    taken = {source for part in parts for source in part.sources}
    return WarmStart(tuple(parts), tuple(full for full in in_file.values() if full not in taken), other_nets)


def _strip(layout: Iterable[str], where: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Names without the trainer's prefix, to the names in the file; and the names of other networks."""
    full_names: dict[str, str] = {}
    for full in layout:
        name = full.removeprefix(TRAINED_PREFIX)
        if full.startswith(OTHER_NETS):
            continue
        if name in full_names:
            raise DataError(
                f"{where}: holds both {full_names[name]} and {full}, which name one parameter; remove one of the two."
            )
        full_names[name] = full
    return full_names, tuple(full for full in layout if full.startswith(OTHER_NETS))


def _parts(model: PyramidModel, attention_names: Iterable[str]) -> list[Part]:
    """What fills the model; sources are names of the same model with attention in every unified block."""
    ours = dict(model.named_parameters())
    parts = [as_it_is(name, name) for name in attention_names if name in ours]
    qkv = [name for name, _ in QueryKeyValue(model.settings.head_dim, 1).named_parameters()]
    for number, block in enumerate(model.single_blocks):
        prefix, mixer = f"single_blocks.{number}.mixer.", block.mixer
        assert isinstance(mixer, AttentionMixer | SsmTokenMixer | ParallelMixer)
        if isinstance(mixer, ParallelMixer):
            parts += [as_it_is(f"{prefix}attention.qkv.{name}", f"{prefix}qkv.{name}") for name in qkv]
            made = attention_to_ssm(mixer.ssm.ssm, model.settings.head_dim, is_closed=True)
            parts += [part.within(f"{prefix}ssm.ssm.", f"{prefix}qkv.") for part in made]
        elif isinstance(mixer, SsmTokenMixer):
            made = attention_to_ssm(mixer.ssm, model.settings.head_dim)
            parts += [part.within(f"{prefix}ssm.", f"{prefix}qkv.") for part in made]
    return parts


@torch.no_grad()
def apply_warm_start(model: nn.Module, plan: WarmStart, read: Callable[[str], Tensor]) -> None:
    """Fill a freshly built model in place.

    Args:
        model: the planned one, with memory and fresh weights.
        plan: of `plan_warm_start`.
        read: a tensor of the checkpoint by its name, float32; what it raises passes through.
    """
    for part in plan.parts:
        sources = [read(name) for name in part.sources]
        rows = model.get_parameter(part.target)[part.rows]
        values = part.fill(rows, *sources, *(model.get_parameter(name) for name in part.own))
        assert values.shape == rows.shape, f"{part.target}: {part.rule} gives {tuple(values.shape)}"
        rows.copy_(values)
