"""FLOPs of the pyramid backbone by arithmetic: the only source of FLOPs figures; nothing here runs a model.

Counted are matrix products (2 FLOPs a multiply-add), convolutions (likewise) and the selective scan's recurrence.
Left out are norms, rotations, activations, gates and index moves: one pass over the activations each. What a kernel
computes and throws away (masked halves of a chunk) counts as the algorithm has it; what the plain torch backend does on
top is `chunked_scan_overhead`.

Held against `torch.utils.flop_counter` in `tests/model/test_flops.py`. The paper's own figures: `model/paper_flops.py`.

Source: M4V paper, MM-DiM; PyramidFlow flux_modules/ at 3040d71 for the layers; Mamba-2 (Dao & Gu 2024), section 6, for
the chunked scan; Mamba (Gu & Dao 2023) for the recurrence.

Legend: d width, e inner width of an SSM, N state size, g groups, h heads of the scan, Q chunk, L tokens of a column.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import assert_never

from m4v_dist.blocks.embed import TIMESTEP_WIDTH
from m4v_dist.blocks.layout import ColumnShape
from m4v_dist.config.model_settings import BlockMixer, ModelSettings, SsmSettings
from m4v_dist.model.adapters import AdaptedLinear, double_block_adapters, unified_block_adapters

Flops = Counter[str]
"""FLOPs by part: the keys are `PARTS`."""
ColumnOf = Callable[[int, int], ColumnShape]
"""Gives the column of (unit from 1, pyramid stage)."""

PARTS = (
    "embedders",
    "double: modulation",
    "double: projections",
    "double: attention",
    "double: feed-forward",
    "unified: modulation",
    "unified: attention projections",
    "unified: attention",
    "unified: ssm projections",
    "unified: ssm convolution",
    "unified: ssm scan",
    "unified: temporal projections",
    "unified: temporal attention",
    "unified: feed-forward and out",
    "adapters",
    "out",
)
"""Parts in the order that a token passes them. The last linear of a unified block, 5d to d, is in its feed-forward."""

SELECTIVE_SCAN_FLOPS = 9
"""Of mamba1's recurrence, for each channel, state and token, as its authors count (state-spaces/mamba issue 110)."""

NOT_KEPT_BY_SELECTIVE = frozenset({"unified: ssm convolution", "unified: ssm scan", "unified: temporal attention"})
"""What `recompute = "selective"` computes again where the scan is plain torch; see `blocks/recompute.py`."""

WITHOUT_BASE_WEIGHTS = frozenset(
    {"double: attention", "unified: attention", "unified: ssm scan", "unified: temporal attention", "adapters"}
)
"""Parts whose backward is the same whatever of the base is frozen."""

MIXER_PARTS = frozenset(
    part for part in PARTS if part.startswith(("unified: attention", "unified: ssm", "unified: temporal"))
)
"""What the exchange of mixers changes; all else is the same in each architecture."""


def linear(width_in: int, width_out: int, tokens: int) -> int:
    """2 * in * out per token; the bias is left out."""
    return 2 * width_in * width_out * tokens


def attention_pairs(column: ColumnShape) -> int:
    """Pairs of query and key that meet: L^2 without the temporal mask; with it, each time reads all up to itself.

    Text has time 0, as frame 0: its queries read text and frame 0.
    """
    length = column.num_text + column.num_video
    if not column.has_temporal_mask:
        return length**2
    new_at: Counter[int] = Counter({0: column.num_text})
    for frame in column.frames:
        new_at[frame.time] += frame.num_tokens
    pairs = known = 0
    for time in sorted(new_at):
        known += new_at[time]
        pairs += new_at[time] * known
    return pairs


def attention_core(width: int, column: ColumnShape) -> int:
    """q k^T and the weighted sum of v: 4 d for each pair that meets."""
    return 4 * width * attention_pairs(column)


def attention_mixer(width: int, column: ColumnShape, num_projections: int = 3) -> Flops:
    """Attention of a unified block: q, k, v (2 d^2 each per token) and the core.

    Args:
        width: d.
        column: what it reads.
        num_projections: 3; 4 with an output projection of its own, which a unified block does not have.
    """
    tokens = column.num_text + column.num_video
    return Counter(
        {
            "unified: attention projections": num_projections * linear(width, width, tokens),
            "unified: attention": attention_core(width, column),
        }
    )


def scanned_tokens(settings: ModelSettings, column: ColumnShape) -> int:
    """Tokens of a column after re-composition: text once or twice, frames, a register for each frame."""
    text = column.num_text * (2 if settings.has_text_sandwich else 1)
    return text + column.num_video + (len(column.frames) if settings.has_registers else 0)


def ssm_mixer(width: int, ssm: SsmSettings, tokens: int) -> Flops:
    """The SSM of one unified block on one re-composed column.

    mamba2 and mil, per token: in_proj 2 d (2 e + 2 g N + h), convolution 2 k (e + 2 g N), chunked scan
    2 Q g N + 2 Q e + 4 N e (scores C B^T, their product with x, states in, states out), out_proj 2 e d; mil has none.
    mamba1, of dt rank r: in_proj 2 d 2 e, convolution 2 k e, x_proj 2 e (r + 2 N), dt_proj 2 r e, recurrence 9 e N,
    out_proj 2 e d.

    Args:
        width: d.
        ssm: variant and sizes.
        tokens: length of the sequence; a chunk is never longer.
    """
    inner, chunk = width * ssm.expand, min(ssm.chunk_size, tokens)
    bc_width = ssm.num_groups * ssm.state_dim
    match ssm.variant:
        case "mamba2" | "mil":
            num_heads = inner // ssm.head_dim
            projections = linear(width, 2 * inner + 2 * bc_width + num_heads, tokens)
            if ssm.variant == "mamba2":
                projections += linear(inner, width, tokens)
            channels = inner + 2 * bc_width
            scan = (2 * chunk * (bc_width + inner) + 4 * ssm.state_dim * inner) * tokens
        case "mamba1":
            projections = linear(width, 2 * inner, tokens) + linear(inner, width, tokens)
            projections += linear(inner, ssm.dt_rank + 2 * ssm.state_dim, tokens) + linear(ssm.dt_rank, inner, tokens)
            channels = inner
            scan = SELECTIVE_SCAN_FLOPS * inner * ssm.state_dim * tokens
        case _:
            assert_never(ssm.variant)
    return Counter(
        {
            "unified: ssm projections": projections,
            "unified: ssm convolution": 2 * ssm.conv_width * channels * tokens,
            "unified: ssm scan": scan,
        }
    )


def chunked_scan_overhead(tokens: int, *, inner_width: int, state_dim: int, num_groups: int, chunk_size: int) -> int:
    """FLOPs of the backend `reference_chunked` past the algorithm's own, for one block and one segment.

    It fills the last chunk, and carries states by one product over all pairs of chunks (a kernel has a recurrence).

    Args:
        tokens: of the segment.
        inner_width, state_dim, num_groups, chunk_size: e, N, g, Q.
    """
    chunk = min(chunk_size, tokens)
    num_chunks = -(-tokens // chunk)
    per_token = 2 * chunk * (num_groups * state_dim + inner_width) + 4 * state_dim * inner_width
    filling = (num_chunks * chunk - tokens) * per_token
    carrying = 2 * (num_chunks + 1) ** 2 * inner_width * state_dim
    return filling + carrying


def temporal_tokens(column: ColumnShape) -> tuple[int, int]:
    """Rows and positions of the temporal branch: a row for each history frame, 4^level for each noisy one.

    Positions are the tokens of the coarsest grid, so rows * positions tokens are projected.
    """
    noisy = column.frames[-1]
    positions = noisy.num_tokens // 4**noisy.level
    return len(column.frames) - column.num_noisy + column.num_noisy * 4**noisy.level, positions


def temporal_branch(width: int, inner_width: int, column: ColumnShape) -> Flops:
    """Four projections d to w and back (8 d w per pooled token), and 4 w for each pair of rows and position.

    Pairs behind the mask are computed too: the rows are few.
    """
    rows, positions = temporal_tokens(column)
    return Counter(
        {
            "unified: temporal projections": 4 * linear(width, inner_width, rows * positions),
            "unified: temporal attention": 4 * rows**2 * positions * inner_width,
        }
    )


def embedders(settings: ModelSettings, column: ColumnShape) -> int:
    """Timestep and pooled text (once a column), text and patches (each token)."""
    width = settings.hidden_size
    conditioning = (
        linear(TIMESTEP_WIDTH, width, 1) + linear(settings.pooled_width, width, 1) + 2 * linear(width, width, 1)
    )
    patch = settings.latent_channels * settings.patch_size**2
    return conditioning + linear(settings.text_width, width, column.num_text) + linear(patch, width, column.num_video)


def adapters(settings: ModelSettings, linears: Sequence[AdaptedLinear], column: ColumnShape) -> Flops:
    """Down and up of a block's adapters: 2 r (i + o) per token of each adapted linear; none without LoRA."""
    tokens, scanned = column.num_text + column.num_video, scanned_tokens(settings, column)
    rank = settings.lora.rank
    flops: Flops = Counter()
    for adapted in linears:
        count = scanned if adapted.is_scanned else tokens
        flops["adapters"] += linear(adapted.width_in, rank, count) + linear(rank, adapted.width_out, count)
    return flops


def double_block(width: int, column: ColumnShape) -> Flops:
    """MM-DiT: modulation of both streams (2 d 6 d, once a column), q k v o (8 d^2), core, feed-forward (16 d^2)."""
    tokens = column.num_text + column.num_video
    return Counter(
        {
            "double: modulation": 2 * linear(width, 6 * width, 1),
            "double: projections": 4 * linear(width, width, tokens),
            "double: attention": attention_core(width, column),
            "double: feed-forward": 2 * linear(width, 4 * width, tokens),
        }
    )


def unified_block(settings: ModelSettings, mixer: BlockMixer, column: ColumnShape) -> Flops:
    """Modulation (2 d 3 d), mixer, temporal branch beside an SSM, d to 4 d and 5 d to d (18 d^2 per token).

    Args:
        settings: widths and switches.
        mixer: of this block.
        column: what it reads.
    """
    width = settings.hidden_size
    tokens = column.num_text + column.num_video
    flops: Flops = Counter(
        {
            "unified: modulation": linear(width, 3 * width, 1),
            "unified: feed-forward and out": linear(width, 4 * width, tokens) + linear(5 * width, width, tokens),
        }
    )
    if mixer != "ssm":
        flops += attention_mixer(width, column)
    if mixer != "attention":
        flops += ssm_mixer(width, settings.ssm, scanned_tokens(settings, column))
        if settings.has_temporal_branch:
            flops += temporal_branch(width, settings.temporal_width, column)
    return flops + adapters(settings, unified_block_adapters(settings, mixer), column)


def forward_flops(settings: ModelSettings, column: ColumnShape) -> Flops:
    """FLOPs of one forward of one column, by part."""
    width = settings.hidden_size
    patch = settings.latent_channels * settings.patch_size**2
    out = linear(width, 2 * width, 1) + linear(width, patch, column.num_noisy_tokens)
    flops: Flops = Counter({"embedders": embedders(settings, column), "out": out})
    in_double = double_block_adapters(settings)
    for _ in range(settings.num_double_blocks):
        flops += double_block(width, column) + adapters(settings, in_double, column)
    for mixer in settings.block_mixers:
        flops += unified_block(settings, mixer, column)
    return flops


def mixer_flops(settings: ModelSettings, column: ColumnShape) -> int:
    """Mixers and temporal branches of all unified blocks in one forward: the layers that M4V replaces."""
    return sum(count for part, count in forward_flops(settings, column).items() if part in MIXER_PARTS)


def training_flops(settings: ModelSettings, column: ColumnShape, freeze: Sequence[str] = ()) -> Flops:
    """Forward and backward of one column: three forwards, and what the blocks compute again.

    A linear's backward is two products of its forward's size, so is attention's. Too high by the input gradients of the
    embedders, which nobody asks for; too low by the scores that a fused attention computes again.

    Args:
        settings: the model.
        column: what it reads.
        freeze: sets that do not train: their linears have no weight gradient, one forward less. Of a frozen base the
            embedders and modulations, before which nothing trains, have no backward at all.
    """
    flops: Flops = Counter()
    for part, count in forward_flops(settings, column).items():
        flops[part] = count * (1 + _num_gradients(part, freeze))
    if "base" in freeze:
        flops["out"] -= linear(settings.hidden_size, 2 * settings.hidden_size, 1)
    return flops + recomputed_flops(settings, column)


def _num_gradients(part: str, freeze: Sequence[str]) -> int:
    """Products of a forward's size in the backward of a part: for inputs, for weights or what stands for them."""
    if part in WITHOUT_BASE_WEIGHTS:
        return 2
    if "base" in freeze:
        return 0 if part == "embedders" or part.endswith("modulation") else 1
    return 1 if "double_blocks" in freeze and part.startswith("double:") else 2


def recomputed_flops(settings: ModelSettings, column: ColumnShape) -> Flops:
    """What the blocks of one column compute again in backward."""
    flops: Flops = Counter()
    for number in range(settings.num_double_blocks):
        if settings.recompute_of(number, settings.num_double_blocks) == "blocks":
            flops += double_block(settings.hidden_size, column)
            flops += adapters(settings, double_block_adapters(settings), column)
    for number, mixer in enumerate(settings.block_mixers):
        recompute = settings.recompute_of(number, settings.num_single_blocks)
        if recompute != "none":
            block = unified_block(settings, mixer, column)
            kept = () if recompute == "blocks" else block.keys() - NOT_KEPT_BY_SELECTIVE
            flops += Counter({part: count for part, count in block.items() if part not in kept})
    return flops


def row_flops(settings: ModelSettings, column_of: ColumnOf, units: Sequence[int], stages: Sequence[int]) -> Flops:
    """Forward and backward of a training row.

    Args:
        settings: the model.
        column_of: gives each column.
        units: of each column.
        stages: pyramid stage of each column; PyramidFlow's row is (0, 1, 1, 2).
    """
    total: Flops = Counter()
    for unit, stage in zip(units, stages, strict=True):
        total += training_flops(settings, column_of(unit, stage))
    return total


def mean_row_flops(settings: ModelSettings, column_of: ColumnOf, num_units: int, stages: Sequence[int]) -> float:
    """FLOPs of a training row in the mean over all turns: each stage walks through all units equally often."""
    means = {
        stage: sum(training_flops(settings, column_of(unit, stage)).total() for unit in range(1, num_units + 1))
        / num_units
        for stage in set(stages)
    }
    return sum(means[stage] for stage in stages)


def clip_flops(
    settings: ModelSettings,
    column_of: ColumnOf,
    num_units: int,
    *,
    first_unit_steps: Sequence[int],
    later_unit_steps: Sequence[int],
    num_columns: Callable[[int], int] = lambda unit: 2,
    first_unit: int = 1,
) -> Flops:
    """FLOPs of one generated clip: every unit, every pyramid stage, every step; the codec is left out.

    Args:
        settings: the model.
        column_of: gives each column.
        num_units: latents of the clip.
        first_unit_steps: steps of each stage for unit 1.
        later_unit_steps: the same for all later units.
        num_columns: columns of one evaluation of a unit: 2 with classifier-free guidance, whose empty prompt is counted
            with as many tokens as the prompt; 1 without.
        first_unit: that is sampled; the latents before it are given.
    """
    total: Flops = Counter()
    for unit in range(first_unit, num_units + 1):
        for stage, steps in enumerate(first_unit_steps if unit == 1 else later_unit_steps):
            for part, count in forward_flops(settings, column_of(unit, stage)).items():
                total[part] += count * steps * num_columns(unit)
    return total
