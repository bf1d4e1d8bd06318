"""Memory of activations by arithmetic: what autograd keeps of a forward, and what a backward needs beside it.

Counted is what the blocks' code saves for backward, tensor by tensor, with matmuls in bfloat16 under autocast or in
float32. Autocast casts the input of each linear anew, so q, k and v keep a copy each; norms, modulation and gates keep
float32. Left out are index tables, masks and what belongs to a column instead of a token: below one per cent together.

With selective recompute a block keeps its input and the outputs of the operators in `blocks/recompute.py`. Whether a
GPU's compiled attention is kept by it was not looked at; it counts as kept.

A frozen base keeps less than is counted here: a scale or a tap that does not train leaves its factor alone.

Held against torch's saved-tensor hooks, against what a forward leaves alive, and against the peak of a backward in
`tests/model/test_activations.py`. A GPU's attention pads its length to two sizes an octave, and its allocator rounds:
neither is in here.

Legend: d width, h heads, e inner width of an SSM, N state size, g groups, Q chunk, b bytes of a matmul's number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from m4v_dist.blocks.layout import ColumnShape
from m4v_dist.config.model_settings import BlockMixer, KernelSettings, ModelSettings, SsmSettings
from m4v_dist.model.adapters import AdaptedLinear, double_block_adapters, unified_block_adapters
from m4v_dist.model.flops import scanned_tokens, temporal_tokens

FLOAT32 = 4
WORKSPACE_TENSORS = 3
"""Temporaries of a block's backward, in tensors of the size of its largest: two gradients, and one in the making."""


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank.

    Args:
        saved: what is kept from the forward to the backward.
        block: what the largest block adds while its backward runs, if `saved` does not hold all of it (recompute).
        workspace: temporaries of the backward.
        weights: bfloat16 copies of the weights that are alive at the peak.
    """

    saved: int
    block: int
    workspace: int
    weights: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.saved + self.block + self.workspace + self.weights


@dataclass(frozen=True)
class _Kept:
    """Of one block.

    Args:
        bytes: kept beside weights.
        largest: bytes of its largest tensor.
        weights: of its matmuls, in numbers.
        outputs: bytes of what its linears, fused attention and scan kernels give: what "selective" keeps of it.
    """

    bytes: int
    largest: int
    weights: int
    outputs: int = 0

    def __add__(self, other: "_Kept") -> "_Kept":
        return _Kept(
            self.bytes + other.bytes,
            max(self.largest, other.largest),
            self.weights + other.weights,
            self.outputs + other.outputs,
        )


@dataclass(frozen=True)
class _Counts:
    """Of a micro-batch: tokens, rows and pairs of the temporal branch; of each column, what is scanned."""

    tokens: int
    video: int
    noisy: int
    scanned: tuple[int, ...]
    pooled: int
    pooled_pairs: int

    @classmethod
    def of(cls, settings: ModelSettings, columns: Sequence[ColumnShape]) -> "_Counts":
        rows = [temporal_tokens(column) for column in columns]
        return cls(
            tokens=sum(column.num_text + column.num_video for column in columns),
            video=sum(column.num_video for column in columns),
            noisy=sum(column.num_noisy_tokens for column in columns),
            scanned=tuple(scanned_tokens(settings, column) for column in columns),
            pooled=sum(count * positions for count, positions in rows),
            pooled_pairs=sum(count**2 for count, _ in rows),
        )


def activation_bytes(
    settings: ModelSettings, kernels: KernelSettings, columns: Sequence[ColumnShape], *, is_mixed: bool
) -> Activations:
    """Estimate what one forward and backward of a packed micro-batch takes beside parameters and their gradients.

    Args:
        settings: the model, its `recompute` too.
        kernels: the backend decides what a scan keeps.
        columns: of the micro-batch.
        is_mixed: matmuls in bfloat16 under autocast.
    """
    counts = _Counts.of(settings, columns)
    width, matmul_bytes = settings.hidden_size, 2 if is_mixed else FLOAT32
    doubles = [double_block(settings, counts, is_mixed)] * settings.num_double_blocks
    unified = [unified_block(settings, kernels, mixer, counts, is_mixed) for mixer in settings.block_mixers]
    blocks = [*doubles, *unified]
    block_input = counts.tokens * width * FLOAT32
    saved, largest_again = 0, 0
    for kind in (doubles, unified):
        for number, block in enumerate(kind):
            match settings.recompute_of(number, len(kind)):
                case "none":
                    saved += block.bytes
                case "blocks":
                    saved += block_input
                    largest_again = max(largest_again, block.bytes)
                case "selective":
                    saved += block_input + block.outputs
                    # Recomputing takes the kept outputs up into the block's graph, or lets them go.
                    largest_again = max(largest_again, block.bytes - block.outputs)
    ends = _ends(settings, columns, counts, matmul_bytes)
    # Autocast keeps the copies of all weights until the forward ends, and its last block is whole by then: so they
    # count beside the block, though in the backward a block's own would do.
    copied = 2 * (sum(block.weights for block in blocks) + ends.weights) if is_mixed else 0
    return Activations(
        saved=saved + ends.bytes,
        block=largest_again,
        workspace=WORKSPACE_TENSORS * max(block.largest for block in (*blocks, ends)),
        weights=copied,
    )


def _ends(settings: ModelSettings, columns: Sequence[ColumnShape], counts: _Counts, matmul_bytes: int) -> _Kept:
    """Embedders, rotary tables and the head; the loss keeps the difference of velocities."""
    width, patch = settings.hidden_size, settings.latent_channels * settings.patch_size**2
    num_text = sum(column.num_text for column in columns)
    embedded = matmul_bytes * (num_text * settings.text_width + counts.video * patch)
    rotary = FLOAT32 * settings.head_dim * counts.video
    head = counts.noisy * (3 * FLOAT32 * width + matmul_bytes * width + FLOAT32 * patch)
    weights = width * (settings.text_width + 2 * patch)
    return _Kept(embedded + rotary + head, FLOAT32 * counts.tokens * width, weights)


def double_block(settings: ModelSettings, counts: _Counts, is_mixed: bool) -> _Kept:
    """MM-DiT: two modulations, q k v with norms, joint attention, two gates, feed-forward; each token in one stream."""
    d, b = settings.hidden_size, 2 if is_mixed else FLOAT32
    modulated = 3 * FLOAT32 * d + 2 * FLOAT32
    # In float32 the linears share the modulated tokens; under autocast each keeps its own copy.
    inputs = (3 * b * d + b * d) if is_mixed else 2 * FLOAT32 * d
    per_token = 2 * modulated + inputs + _norms_and_core(settings, b) + b * d + 2 * 4 * b * d + 2 * 2 * FLOAT32 * d
    outputs = counts.tokens * (10 * b * d + FLOAT32 * settings.num_heads)
    block = _Kept(counts.tokens * per_token, counts.tokens * max(4 * b, FLOAT32) * d, 2 * (4 + 8) * d**2, outputs)
    return block + _adapters(settings, double_block_adapters(settings), counts, b, num_streams=2)


def unified_block(
    settings: ModelSettings, kernels: KernelSettings, mixer: BlockMixer, counts: _Counts, is_mixed: bool
) -> _Kept:
    """Modulation, mixer, temporal branch beside an SSM, feed-forward, gate."""
    d, b = settings.hidden_size, 2 if is_mixed else FLOAT32
    per_token = 3 * FLOAT32 * d + 2 * FLOAT32 + b * d + 4 * b * d + 5 * b * d + 2 * FLOAT32 * d
    kept = _Kept(counts.tokens * per_token, counts.tokens * 5 * b * d, (4 + 5) * d**2, counts.tokens * 5 * b * d)
    if mixer != "ssm":
        inputs = 3 * b * d if is_mixed else 0
        outputs = counts.tokens * (4 * b * d + FLOAT32 * settings.num_heads)
        kept += _Kept(counts.tokens * (inputs + _norms_and_core(settings, b)), 0, 3 * d**2, outputs)
    if mixer != "attention":
        kept += ssm_mixer(d, settings.ssm, kernels, counts.scanned, is_mixed)
        if settings.has_temporal_branch:
            kept += _temporal_branch(settings, counts, is_mixed)
    return kept + _adapters(settings, unified_block_adapters(settings, mixer), counts, b)


def _adapters(
    settings: ModelSettings, linears: Sequence[AdaptedLinear], counts: _Counts, matmul_bytes: int, num_streams: int = 1
) -> _Kept:
    """What adapters add, between down and up: they read what the linear beside them would keep, were it not frozen."""
    rank, kept, outputs, weights = settings.lora.rank, 0, 0, 0
    for adapted in linears:
        tokens = sum(counts.scanned) if adapted.is_scanned else counts.tokens
        kept += tokens * matmul_bytes * rank
        outputs += tokens * matmul_bytes * (rank + adapted.width_out)
        weights += num_streams * rank * (adapted.width_in + adapted.width_out)
    return _Kept(kept, 0, weights, outputs)


def _norms_and_core(settings: ModelSettings, matmul_bytes: int) -> int:
    """Of one token: q and k before and after their norms in float32, then q, k, v, output and its log-sum."""
    d, heads = settings.hidden_size, settings.num_heads
    return 4 * FLOAT32 * d + 2 * FLOAT32 * heads + 4 * matmul_bytes * d + FLOAT32 * heads


def _temporal_branch(settings: ModelSettings, counts: _Counts, is_mixed: bool) -> _Kept:
    """Pooled tokens (three copies under autocast), q k v in float32, the rows' softmax, and what to_out reads."""
    d, w, b = settings.hidden_size, settings.temporal_width, 2 if is_mixed else FLOAT32
    inputs = 3 * b * d if is_mixed else FLOAT32 * d
    kept = counts.pooled * (inputs + 3 * FLOAT32 * w + b * w)
    kept += FLOAT32 * settings.temporal_heads * counts.pooled_pairs
    return _Kept(kept, FLOAT32 * counts.pooled * d, 4 * d * w, counts.pooled * b * (3 * w + d))


def ssm_mixer(width: int, ssm: SsmSettings, kernels: KernelSettings, lengths: Sequence[int], is_mixed: bool) -> _Kept:
    """The SSM of one block on a re-composed sequence: projections, convolution, scan, gate and norm.

    Args:
        width: d.
        ssm: variant and sizes.
        kernels: which scan backend keeps its intermediates.
        lengths: tokens of each segment, one a column.
        is_mixed: matmuls in bfloat16.
    """
    if ssm.variant == "mamba1":
        return _mamba1(width, ssm, kernels, lengths, is_mixed)
    tokens, b = sum(lengths), 2 if is_mixed else FLOAT32
    e, bc = width * ssm.expand, ssm.num_groups * ssm.state_dim
    heads, channels = e // ssm.head_dim, e + 2 * bc
    projected = e + channels + heads
    # The convolution keeps its input once for each tap. In float32 the first is in_proj's output, z and dt in it.
    convolved = FLOAT32 * (ssm.conv_width - 1) * channels + FLOAT32 * (channels if is_mixed else projected)
    match ssm.variant, is_mixed:
        case "mamba2", True:
            # silu's input; x in float32 for the scan
            convolved += b * channels + FLOAT32 * e
        case "mamba2", False:
            # silu's input and output, which x, B and C share
            convolved += 2 * FLOAT32 * channels
        case "mil", True:
            # x; B and C before and after their norms
            convolved += FLOAT32 * (e + 4 * bc + 2 * ssm.num_groups)
        case "mil", False:
            # x, B and C share the convolution's output
            convolved += FLOAT32 * (channels + 2 * bc + 2 * ssm.num_groups)
    # y in float32, silu(z), and z unless it is in in_proj's output; what is normed, and the norm's output.
    gate = FLOAT32 * e * (3 if is_mixed else 2) if ssm.gate == "silu" else 0
    gate += FLOAT32 * (2 * e + ssm.num_groups)
    out = b * e if ssm.variant == "mamba2" else 0
    per_token = b * width + convolved + gate + out + 2 * FLOAT32 * heads
    scan = _Kept(0, 0, 0)
    for length in lengths:
        scan += _scan(ssm, kernels, length, inner_width=e, heads=heads)
    weights = width * projected + (width * e if ssm.variant == "mamba2" else 0)
    outputs = tokens * b * (projected + (width if ssm.variant == "mamba2" else 0))
    return _Kept(tokens * per_token, FLOAT32 * tokens * channels, weights, outputs) + scan


def _scan(ssm: SsmSettings, kernels: KernelSettings, tokens: int, *, inner_width: int, heads: int) -> _Kept:
    """What a backend of `ssd_scan` keeps of one segment beside x and dt, which the mixer's own count holds."""
    e, n, groups = inner_width, ssm.state_dim, ssm.num_groups
    chunk = min(ssm.chunk_size, tokens)
    num_chunks = -(-tokens // chunk)
    state = FLOAT32 * e * n
    match kernels.backend:
        case "reference":
            # The loop keeps, for each token, the state before it and after it, decayed, and B and C for each head.
            return _Kept(tokens * (2 * state + FLOAT32 * (2 * heads * n + 3 * e + heads)), state, 0)
        case "reference_chunked":
            pairs = FLOAT32 * chunk * heads
            # Decay and decay * scores of all pairs of a chunk, the scores of a group; B and C for each group and, where
            # heads share them, for each head; x four times; three decays a head.
            per_token = 2 * pairs + FLOAT32 * (chunk * groups + 2 * groups * n + 4 * e + 2 * heads)
            per_token += FLOAT32 * 2 * heads * n + chunk
            states = 2 * state * (num_chunks + 1) + (FLOAT32 + 8) * heads * (num_chunks + 1) ** 2
            filled = num_chunks * chunk
            return _Kept(filled * per_token + states, max(filled * pairs, filled * FLOAT32 * heads * n), 0)
        case "triton" | "mamba_ssm":
            # A fused kernel keeps its inputs, its output and a state for each chunk.
            outputs = tokens * FLOAT32 * e + state * num_chunks
            return _Kept(tokens * FLOAT32 * (e + 2 * groups * n) + state * num_chunks, state * num_chunks, 0, outputs)
        case _:
            assert_never(kernels.backend)


def _mamba1(width: int, ssm: SsmSettings, kernels: KernelSettings, lengths: Sequence[int], is_mixed: bool) -> _Kept:
    """Mamba-1: the chunked form computes a chunk's states again, and keeps its inputs and the states at its ends."""
    b, e, n, rank = 2 if is_mixed else FLOAT32, width * ssm.expand, ssm.state_dim, ssm.dt_rank
    tokens, chunk = sum(lengths), min(ssm.chunk_size, max(lengths))
    taps = FLOAT32 * e * (ssm.conv_width - 1) + FLOAT32 * (e if is_mixed else 2 * e)
    # silu's input and output, the latter in float32 for the scan as well; step sizes before softplus and after it
    per_token = b * width + taps + (2 * b * e + FLOAT32 * e if is_mixed else 2 * FLOAT32 * e)
    per_token += b * (rank + 2 * n) + 2 * FLOAT32 * e + (2 * FLOAT32 * n if is_mixed else 0)
    # The gate: y and silu(z), z unless it is in in_proj's output; then what out_proj reads.
    per_token += FLOAT32 * e * (3 if is_mixed else 2) * (ssm.gate == "silu") + b * e
    state = FLOAT32 * e * n
    weights = width * 3 * e + e * (2 * rank + 2 * n)
    outputs = tokens * b * (3 * e + rank + 2 * n + width)
    if kernels.backend == "reference":
        return _Kept(tokens * (per_token + 4 * state), state * chunk, weights, outputs)
    num_chunks = sum(-(-length // ssm.chunk_size) for length in lengths)
    # The backward of a chunk has its states after each of the log2(Q) doublings.
    largest = state * chunk * max(1, (chunk - 1).bit_length())
    return _Kept(tokens * per_token + state * num_chunks, largest, weights, outputs)
