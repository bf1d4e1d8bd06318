"""How long joint attention takes on the columns of a run, beside its twins: medians of whole calls, as markdown.

Legend: `l` tokens of all columns, `n` heads, `p` head width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m4v_dist.bench.flops_tables import LATENT_STRIDE, column_of
from m4v_dist.bench.hardware import describe
from m4v_dist.bench.markdown import table
from m4v_dist.bench.stopwatch import NUM_TIMED, NUM_WARM_UP, median_ms, peak_bytes
from m4v_dist.blocks.attention import joint_attention, prefix_joint_attention
from m4v_dist.blocks.flex_attention import key_runs, padded_length
from m4v_dist.blocks.layout import ColumnShape, PackedLayout
from m4v_dist.config.schema import RunConfig

MAX_DENSE_TOKENS = 45_000
"""The dense mask takes a byte a pair of tokens; past this it is left out, and said to be."""

Streams = tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """Columns that are timed together; `name` says which."""

    name: str
    columns: tuple[ColumnShape, ...]


def attention_report(config: RunConfig, device: torch.device) -> str:
    """Time forward, and forward with backward, of each form of joint attention on this device.

    Args:
        config: its model's heads, the largest bucket and the length of its last curriculum stage.
        device: where; on a GPU the inputs are bfloat16 and the fused kernel is among the forms, else float32.
    """
    rows = [_row(case, config, device) for case in cases(config)]
    heads = ["columns", "tokens (padded)", "joint_attention", "one SDPA per time", "dense mask"]
    note = (
        f"ms, forward / forward and backward, and peak GiB beside the inputs; median of {NUM_TIMED} calls after "
        f"{NUM_WARM_UP}; {config.model.num_heads} heads of {config.model.head_dim}; {describe(device)}"
    )
    return f"{note}\n\n{table(heads, rows)}"


def cases(config: RunConfig) -> tuple[Case, ...]:
    """An image, the last unit at the coarsest and the full size, and whole training rows half way and at the end."""
    stage, objective = config.curriculum[-1], config.objective
    bucket = max(stage.buckets, key=lambda bucket: bucket.height_px * bucket.width_px)
    grid = (bucket.height_px // LATENT_STRIDE, bucket.width_px // LATENT_STRIDE)
    column = column_of(
        grid,
        config.text_encoder.max_tokens,
        patch_size=config.model.patch_size,
        num_pyramid_stages=objective.num_pyramid_stages,
        has_temporal_mask=config.model.has_temporal_mask,
    )
    last, full = stage.num_latents, objective.num_pyramid_stages - 1
    half = max(1, last // 2)
    return (
        Case("one image, full size", (column(1, full),)),
        Case(f"unit {last}, coarsest size", (column(last, 0),)),
        Case(f"unit {last}, full size", (column(last, full),)),
        Case(f"row at unit {half}", tuple(column(half, s) for s in objective.pyramid_stage_columns)),
        Case(f"row at unit {last}", tuple(column(last, s) for s in objective.pyramid_stage_columns)),
    )


def _row(case: Case, config: RunConfig, device: torch.device) -> list[str]:
    layout = PackedLayout(case.columns, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(config.run.seed)

    def draw(length: int) -> tuple[Tensor, Tensor, Tensor]:
        shape = (3, length, config.model.num_heads, config.model.head_dim)
        q, k, v = torch.randn(shape, generator=generator, device=device).to(dtype).unbind(0)
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()

    streams = draw(layout.num_text), draw(layout.num_video)
    num_tokens = layout.num_text + layout.num_video
    cells = [case.name, f"{num_tokens:,} ({padded_length(num_tokens):,})"]
    for attend in (joint_attention, prefix_joint_attention):
        cells.append(_time(lambda attend=attend: torch.cat(attend(*streams, layout)), streams, device))  # type: ignore[misc]
    if num_tokens > MAX_DENSE_TOKENS:
        return [*cells, f"not run: more than {MAX_DENSE_TOKENS:,} tokens"]
    first, last = (run[:num_tokens].to(device) for run in key_runs(layout, padded_length(num_tokens)))
    keys = torch.arange(num_tokens, device=device)
    mask = (keys >= first[:, None]) & (keys < last[:, None])

    # The order of the tokens is not the columns', but for the time that is one.
    def dense() -> Tensor:
        q, k, v = (torch.cat(pair).transpose(0, 1)[None] for pair in zip(*streams, strict=True))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return [*cells, _time(dense, streams, device)]


def _time(forward: Callable[[], Tensor], streams: Streams, device: torch.device) -> str:
    inputs = [*streams[0], *streams[1]]

    def only_forward() -> None:
        with torch.no_grad():
            forward()

    def both() -> None:
        out = forward()
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    both()
    before = peak_bytes(device, reset=True)
    times = [median_ms(call, device) for call in (only_forward, both)]
    peak = f", {(peak_bytes(device) - before) / 2**30:.2f}" if device.type == "cuda" else ""
    return " / ".join(f"{value:.3g}" for value in times) + peak
