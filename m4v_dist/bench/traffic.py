"""Bytes that training hands to collectives, by arithmetic: ZeRO's in a step, sequence parallelism's in a forward.

As DeepSpeed 0.19 has it with float32 parameters and gradients: ZeRO 1 and 2 both sum whole gradients by all-reduce, and
gather the weights that AdamW moved; ZeRO 3 gathers weights for each forward and backward and scatters gradients. hpZ
gathers over the world once a step, and from the second copy inside a node for what follows. What ZeRO 3 keeps gathered
from one use to the next (up to 10^9 elements) is not taken off: an upper bound.

Held against what two and four gloo ranks handed to torch.distributed in `tests/bench/test_traffic.py`.

Legend: d width, e inner width of an SSM, N state size, g groups, h heads of the scan, w width of the temporal branch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

from m4v_dist.blocks.layout import ColumnShape, Piece, cut_columns
from m4v_dist.config.model_settings import ModelSettings
from m4v_dist.model.flops import temporal_tokens

FLOAT32 = 4
Operation = Literal["all-reduce", "reduce-scatter", "all-gather"]


@dataclass(frozen=True)
class Collective:
    """What one kind of collective moves in a step.

    Args:
        operation: which.
        size_bytes: of the whole tensors, all calls of a step together.
        num_ranks: that take part in each call.
    """

    operation: Operation
    size_bytes: int
    num_ranks: int

    @property
    def sent_bytes(self) -> float:
        """What each rank sends, and receives, by rings: all-reduce is a reduce-scatter and an all-gather."""
        once = self.size_bytes * (self.num_ranks - 1) / self.num_ranks
        match self.operation:
            case "all-reduce":
                return 2 * once
            case "reduce-scatter" | "all-gather":
                return once
            case _:
                assert_never(self.operation)


def zero_collectives(
    num_parameters: int,
    num_trained: int,
    *,
    zero_stage: int,
    num_ranks: int,
    num_micro_batches: int,
    hpz_partition_size: int = 1,
    is_reduced_per_micro_batch: bool = False,
) -> list[Collective]:
    """What a step of a rank hands to collectives; norms and counters are left out.

    Args:
        num_parameters, num_trained: of the model, and those that are not frozen.
        zero_stage: 1, 2 or 3.
        num_ranks: of the world.
        num_micro_batches: of a step, on each rank.
        hpz_partition_size: ranks of a node that hold a second copy at ZeRO 3; 1: none.
        is_reduced_per_micro_batch: gradients are summed in each micro-batch (ZeRO 1: in the last alone).
    """
    weights, gradients = FLOAT32 * num_parameters, FLOAT32 * num_trained
    sums = num_micro_batches if is_reduced_per_micro_batch and zero_stage > 1 else 1
    if zero_stage < 3:
        return [
            Collective("all-reduce", sums * gradients, num_ranks),
            Collective("all-gather", gradients, num_ranks),
        ]
    gathers = 2 * num_micro_batches
    scattered = Collective("reduce-scatter", sums * gradients, num_ranks)
    if hpz_partition_size == 1:
        return [scattered, Collective("all-gather", gathers * weights, num_ranks)]
    return [
        scattered,
        Collective("all-gather", weights, num_ranks),
        Collective("all-gather", (gathers - 1) * weights, hpz_partition_size),
    ]


@dataclass(frozen=True)
class SequenceTraffic:
    """Bytes that all sequence ranks together send to one another in a forward; a backward sends as much but the answer.

    Args:
        attention: heads for tokens and back (Ulysses), double blocks and attention mixers.
        scan: tails of convolutions, states, and the text that is scanned twice.
        temporal: squeezed keys and values of earlier ranks.
        answer: velocities, which every rank gets whole.
    """

    attention: int
    scan: int
    temporal: int
    answer: int

    def step(self, num_recomputed: int) -> int:
        """Of a forward and a backward, with the forward of the blocks `num_recomputed` times more."""
        return (2 + num_recomputed) * (self.attention + self.scan + self.temporal) + self.answer


def sequence_traffic(
    settings: ModelSettings, columns: Sequence[ColumnShape], num_ranks: int, *, is_mixed: bool
) -> SequenceTraffic:
    """What a forward of a packed micro-batch sends over its cuts.

    Args:
        settings: the model; mamba1's scan is not counted here.
        columns: of the micro-batch.
        num_ranks: sequence ranks.
        is_mixed: matmuls in bfloat16.
    """
    assert settings.ssm.variant != "mamba1" or all(kind == "attention" for kind in settings.block_mixers)
    d, b, s = settings.hidden_size, 2 if is_mixed else FLOAT32, num_ranks
    by_rank = cut_columns(tuple(columns), s)
    tokens = [sum(piece.num_text + piece.num_video for piece in pieces) for pieces in by_rank]
    # q, k, v to the ranks of their heads, and the answers of their heads back to the ranks of their tokens.
    attention = b * (3 * d + d) * sum(tokens) * (s - 1) // s
    scan = temporal = 0
    ssm, e = settings.ssm, d * settings.ssm.expand
    heads, channels = e // ssm.head_dim, e + 2 * ssm.num_groups * ssm.state_dim
    for number, column in enumerate(columns):
        holders = [sum(p.num_video + p.num_text for p in ps if p.number == number) for ps in by_rank]
        parts = [rank for rank, count in enumerate(holders) if count]
        if len(parts) < 2:
            continue
        pairs = len(parts) * (len(parts) - 1) // 2
        scan += (len(parts) - 1) * (ssm.conv_width - 1) * channels * b
        scan += pairs * FLOAT32 * (heads + heads * ssm.head_dim * ssm.state_dim)
        if settings.has_text_sandwich:
            scan += column.num_text * d * (FLOAT32 + b)
        temporal += sum(
            (len(parts) - 1 - place) * _positions(column, by_rank, number, rank) * 2 * settings.temporal_width * b
            for place, rank in enumerate(parts)
        )
    noisy = sum(column.num_noisy_tokens for column in columns)
    mixers = settings.block_mixers
    num_ssm = sum(kind != "attention" for kind in mixers)
    return SequenceTraffic(
        attention=attention * (settings.num_double_blocks + sum(kind != "ssm" for kind in mixers)),
        scan=scan * num_ssm,
        temporal=temporal * num_ssm if settings.has_temporal_branch else 0,
        answer=(s - 1) * noisy * FLOAT32 * settings.latent_channels * settings.patch_size**2,
    )


def _positions(column: ColumnShape, by_rank: Sequence[Sequence[Piece]], number: int, rank: int) -> int:
    """Squeezed positions of what a rank holds of a column: of a noisy frame all its tokens, of history the coarsest."""
    _, coarsest = temporal_tokens(column)
    (piece,) = (piece for piece in by_rank[rank] if piece.number == number)
    frames = zip(piece.frames, piece.is_noisy, strict=True)
    return sum(frame.num_tokens if is_noisy else coarsest for frame, is_noisy in frames)
