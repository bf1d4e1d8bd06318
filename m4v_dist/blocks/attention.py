"""Joint attention of text and video: QK-norm, rotary positions, temporal causality; no column sees another.

Query and key meet only if the key's time is at most the query's; text has time 0, as frame 0 (without the temporal mask
all of a column meet). Tokens stand in the order of time, so the keys of each time are a prefix of the column. On a GPU
FlexAttention takes all columns in one kernel (`flex_attention.py`); on a CPU, where it has no backward, one unmasked
SDPA per time does, with no mask in memory and no wasted product. `dense_joint_attention` is the slow twin of both, with
the mask written out.

Under sequence parallelism each rank attends with its share of the heads over all tokens (Ulysses), so that masks and
kernels stay what they are: 4 l d / s (s - 1) / s numbers sent by each of s ranks in forward (queries, keys, values, and
the answer; l tokens of all ranks), as many in backward. The heads must be a multiple of s.

Source: PyramidFlow flux_modules/modeling_flux_block.py at 3040d71.

Legend: `l` tokens (`lt` text, `lv` video), `n` heads, `p` head width, `j` rotary pairs of a head, `d` width.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from m4v_dist.blocks.embed import rope_table
from m4v_dist.blocks.flex_attention import flex_joint_attention
from m4v_dist.blocks.layout import PackedLayout
from m4v_dist.parallel.sequence import heads_to_tokens, tokens_to_heads

Rotary = tuple[Tensor, Tensor]


class HeadNorm(nn.Module):
    """RMSNorm over one head's width, with weight, float32 also under autocast.

    Args:
        width: p.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def initialize(self, generator: torch.Generator) -> None:
        """Weight one."""
        nn.init.ones_(self.weight)

    def forward(self, heads: Tensor) -> Tensor:
        """l n p to l n p, float32."""
        return F.rms_norm(heads.float(), heads.shape[-1:], self.weight.float(), 1e-6)


class QueryKeyValue(nn.Module):
    """Projections of one stream to queries, keys and values, with norms on queries and keys.

    Args:
        width: d.
        num_heads: n.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.norm_q = HeadNorm(width // num_heads)
        self.norm_k = HeadNorm(width // num_heads)

    def forward(self, tokens: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """l d to queries, keys, values l n p; queries and keys rotated where `rotary` is given."""
        q, k, v = (
            rearrange(linear(tokens), "l (n p) -> l n p", n=self.num_heads)
            for linear in (self.to_q, self.to_k, self.to_v)
        )
        q, k = self.norm_q(q), self.norm_k(k)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q.to(v.dtype), k.to(v.dtype), v


def rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """Turn each pair of neighbouring channels by its angle: l n p to l n p."""
    cos, sin = rotary
    even, odd = heads[..., 0::2], heads[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


@torch.compiler.disable
def joint_attention(
    text: tuple[Tensor, Tensor, Tensor], video: tuple[Tensor, Tensor, Tensor], layout: PackedLayout
) -> tuple[Tensor, Tensor]:
    """Attend within each column, over text and all frames up to the query's own.

    Args:
        text: queries, keys, values, each lt n p.
        video: the same, each lv n p.
        layout: where the columns and their frames lie.

    Returns:
        text: lt d; video: lv d.
    """
    if layout.sequence.size > 1:
        return _attend_by_heads(text, video, layout)
    if text[0].is_cuda:
        return flex_joint_attention(text, video, layout)
    return prefix_joint_attention(text, video, layout)


def _attend_by_heads(
    text: tuple[Tensor, Tensor, Tensor], video: tuple[Tensor, Tensor, Tensor], layout: PackedLayout
) -> tuple[Tensor, Tensor]:
    """`joint_attention` of a layout that is cut over ranks (collective)."""
    num_heads, sequence = text[0].shape[1], layout.sequence
    # text and video of each rank in turn
    runs = [length for pair in zip(layout.text_by_rank, layout.video_by_rank, strict=True) for length in pair]
    lengths = [sum(pair) for pair in zip(runs[0::2], runs[1::2], strict=True)]
    tokens = torch.cat([torch.stack(text, dim=2), torch.stack(video, dim=2)])  # l n 3 p
    parts = tokens_to_heads(tokens, lengths, sequence).split(runs)
    q, k, v = torch.cat(parts[0::2]).unbind(dim=2)
    whole_video = torch.cat(parts[1::2]).unbind(dim=2)
    attended = joint_attention((q, k, v), whole_video, layout.whole)  # type: ignore[arg-type]
    texts, videos = attended[0].split(runs[0::2]), attended[1].split(runs[1::2])
    rows = torch.cat([part for pair in zip(texts, videos, strict=True) for part in pair])
    heads = rearrange(rows, "l (n p) -> l n p", n=num_heads // sequence.size)
    own = rearrange(heads_to_tokens(heads, lengths, sequence), "l n p -> l (n p)")
    return own[: layout.num_text], own[layout.num_text :]


def prefix_joint_attention(
    text: tuple[Tensor, Tensor, Tensor], video: tuple[Tensor, Tensor, Tensor], layout: PackedLayout
) -> tuple[Tensor, Tensor]:
    """`joint_attention` on a CPU: one SDPA for each time of each column."""
    texts: list[Tensor] = []
    videos: list[Tensor] = []
    for span in layout.spans:
        q, k, v = (
            torch.cat([a[slice(*span.text)], b[slice(*span.video)]]).transpose(0, 1)[None]  # 1 n l p
            for a, b in zip(text, video, strict=True)
        )
        num_text = span.text[1] - span.text[0]
        start = 0
        for end in (num_text + time - span.video[0] for time in span.times):
            out = F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end])
            out = rearrange(out, "1 n l p -> l (n p)")
            if start == 0:
                texts.append(out[:num_text])
                out = out[num_text:]
            videos.append(out)
            start = end
    return torch.cat(texts), torch.cat(videos)


def dense_joint_attention(
    text: tuple[Tensor, Tensor, Tensor], video: tuple[Tensor, Tensor, Tensor], layout: PackedLayout
) -> tuple[Tensor, Tensor]:
    """The slow twin of `joint_attention`: one mask over all tokens of all columns."""
    column, time = (torch.cat(parts) for parts in zip(*_token_ids(layout), strict=True))
    mask = ((column[:, None] == column[None, :]) & (time[:, None] >= time[None, :])).to(layout.device)
    q, k, v = (torch.cat([a, b]).transpose(0, 1) for a, b in zip(text, video, strict=True))  # n l p
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    out = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v
    out = rearrange(out, "n l p -> l (n p)")
    return out[: layout.num_text], out[layout.num_text :]


def _token_ids(layout: PackedLayout) -> list[tuple[Tensor, Tensor]]:
    """Column and time of each text token, then of each video token."""
    number = torch.arange(len(layout.columns))
    text = number.repeat_interleave(torch.tensor(layout.text_lengths))
    video = number.repeat_interleave(torch.tensor(layout.video_lengths))
    is_masked = torch.tensor([column.has_temporal_mask for column in layout.columns])
    return [(text, torch.zeros(layout.num_text)), (video, layout.positions[:, 0].cpu() * is_masked[video])]


class AttentionMixer(nn.Module):
    """The mixer of a FLUX single block: one set of projections for both streams, and no output projection.

    Args:
        width: d.
        num_heads: n.
        rope_axes: rotary width of t, h, w.
    """

    def __init__(self, width: int, num_heads: int, rope_axes: tuple[int, int, int]) -> None:
        super().__init__()
        self.rope_axes = rope_axes
        self.qkv = QueryKeyValue(width, num_heads)

    def forward(self, text: Tensor, video: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor]:
        """Text lt d and video lv d to the same."""
        return joint_attention(self.qkv(text, None), self.qkv(video, rope_table(layout, self.rope_axes)), layout)
