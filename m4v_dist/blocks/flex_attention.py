"""Joint attention on a GPU by FlexAttention: one fused kernel over all columns, its mask never written out.

Tokens stand column after column, text first and frames in the order of time. So the keys that a token may read are one
run: from its column's first token to the end of its own time. Two numbers a token are the whole mask, and which blocks
of 128 x 128 are empty, full or cut follows from them on the host. The length is padded to a few sizes, so that the
kernel is compiled a few times only; the padding is a segment of its own, which nothing reads.

`attention.joint_attention` chooses this on a GPU; `attention.dense_joint_attention` is the slow twin of both.

Legend: `l` tokens of all columns and padding, `n` heads, `p` head width, `q` `k` blocks of queries and keys.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from m4v_dist.blocks.layout import PackedLayout

BLOCK = 128
SMALLEST = 512
MAX_COMPILATIONS = 64


@dataclass(frozen=True)
class FlexTables:
    """What one layout needs, made once and shared by all blocks of the model.

    Args:
        mask: blocks, and the rule within a cut block.
        padded_length: l.
    """

    mask: BlockMask
    padded_length: int


def padded_length(num_tokens: int) -> int:
    """The next of 512, 768, 1024, 1536, 2048, ...: two sizes an octave."""
    size = SMALLEST
    while size < num_tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def key_runs(layout: PackedLayout, length: int) -> tuple[Tensor, Tensor]:
    """First key that each query reads and the one past its last: two int32 tensors of `length`, on the CPU.

    Args:
        layout: where the columns lie.
        length: l, at least the layout's tokens; the rest is one segment that reads itself.
    """
    first, last = torch.empty(length, dtype=torch.int32), torch.empty(length, dtype=torch.int32)
    start = 0
    for span in layout.spans:
        num_text = span.text[1] - span.text[0]
        query = start
        for time in span.times:
            end = start + num_text + time - span.video[0]
            first[query:end], last[query:end] = start, end
            query = end
        start = query
    first[start:], last[start:] = start, length
    return first, last


def block_table(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Which blocks hold an allowed pair, and which hold no other: two q k bool, from the runs of `key_runs`."""
    starts, ends = first.view(-1, BLOCK), last.view(-1, BLOCK)  # q BLOCK
    block_start = torch.arange(0, first.numel(), BLOCK, dtype=torch.int32)
    block_end = block_start + BLOCK
    touched = ((starts[:, :, None] < block_end) & (ends[:, :, None] > block_start)).any(dim=1)
    full = (starts.amax(dim=1)[:, None] <= block_start) & (ends.amin(dim=1)[:, None] >= block_end)
    return touched, full


def make_tables(layout: PackedLayout) -> FlexTables:
    """Mask of a layout, on its device."""
    length = padded_length(layout.num_text + layout.num_video)
    first, last = key_runs(layout, length)
    touched, full = block_table(first, last)
    first, last = first.to(layout.device), last.to(layout.device)

    def is_read(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[query]) & (key < last[query])

    cut = _as_lists(touched & ~full, layout.device)
    whole = _as_lists(full, layout.device)
    mask = BlockMask.from_kv_blocks(*cut, *whole, BLOCK_SIZE=BLOCK, mask_mod=is_read, seq_lengths=(length, length))
    return FlexTables(mask, length)


def _as_lists(table: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """FlexAttention's form of a q k bool: 1 1 q, how many, and 1 1 q k, which ones first; int32."""
    order = torch.argsort(table.to(torch.int32), dim=1, descending=True, stable=True)
    counts = table.sum(dim=1)
    return counts.to(device, torch.int32)[None, None], order.to(device, torch.int32)[None, None]


@cache
def _compiled() -> Any:
    # fullgraph: past its limit of recompilations torch would fall back, without a word, to the unfused form, whose
    # scores take l x l; so it is an error instead.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def flex_joint_attention(
    text: tuple[Tensor, Tensor, Tensor], video: tuple[Tensor, Tensor, Tensor], layout: PackedLayout
) -> tuple[Tensor, Tensor]:
    """As `attention.joint_attention`, on a GPU.

    Args:
        text: queries, keys, values, each lt n p.
        video: the same, each lv n p.
        layout: where the columns and their frames lie.

    Returns:
        text: lt d; video: lv d.
    """
    tables = layout.table("flex_attention", make_tables)
    lengths = [size for pair in zip(layout.text_lengths, layout.video_lengths, strict=True) for size in pair]
    q, k, v = (_pack(a, b, layout, tables.padded_length) for a, b in zip(text, video, strict=True))
    # One compilation for each padded length, with and without gradients: more than torch's own limit of 8.
    with torch._dynamo.config.patch(recompile_limit=MAX_COMPILATIONS):
        attended = _compiled()(q, k, v, block_mask=tables.mask)
    out = rearrange(attended, "1 n l p -> l (n p)")
    parts = out[: sum(lengths)].split(lengths)
    return torch.cat(parts[0::2]), torch.cat(parts[1::2])


def _pack(text: Tensor, video: Tensor, layout: PackedLayout, length: int) -> Tensor:
    """Column after column, padded with zeros: 1 n l p."""
    parts = [
        part
        for pair in zip(text.split(layout.text_lengths), video.split(layout.video_lengths), strict=True)
        for part in pair
    ]
    packed = torch.cat(parts)
    return rearrange(F.pad(packed, (0, 0, 0, 0, 0, length - packed.shape[0])), "l n p -> 1 n l p")
