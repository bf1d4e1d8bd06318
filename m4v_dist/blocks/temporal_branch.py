"""The light temporal branch: every frame squeezed to the coarsest grid, causal attention over time.

A history frame is averaged down to the coarsest grid of its column; the noisy frame, K times finer per side, is split
into K^2 sub-images of that grid (each takes every K-th row and column), so that all rows have the same positions.
Space is folded into channels: a head's logit is the inner product over all positions. Sub-images of one frame share
its time and see each other. The answer goes back the same way (nearest) and is added to the mixer's; text gets zero.

Where a column lies on several sequence ranks, each of them gets the squeezed keys and values of the frames before its
own: 2 r w numbers for the r squeezed positions of those frames and the branch's width w. Later frames nobody reads.

Source: M4V paper, temporal branch. The paper says K sub-images; equal row widths need K^2, which is what is built.

Legend: `lv` video tokens, `r` pooled rows times positions of all columns, `f` tokens averaged into one, `t` rows of a
column (frames and sub-images), `s` positions of the coarsest grid, `n` heads, `p` head width, `d` width.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from m4v_dist.blocks.layout import ColumnShape, FrameShape, PackedLayout, Piece
from m4v_dist.parallel.sequence import Handover, hand_tail, tie


@dataclass(frozen=True)
class TemporalTables:
    """Index tables of one layout.

    Args:
        members: for each pooling factor, r' f: video tokens averaged into one position.
        order: r, brings the positions of all factors, one after the other, to the order column, row, position.
        row_of_token: lv, position (in that order) that each video token belongs to.
        columns: for each column, or what this rank holds of it, rows t and positions s.
        hidden: for each column, t t' bool: True where the key is newer than the query; the t' keys are those of earlier
            ranks, then this rank's.
        handover: where the cuts go, counted in r; None where nothing is cut.
    """

    members: tuple[Tensor, ...]
    order: Tensor
    row_of_token: Tensor
    columns: tuple[tuple[int, int], ...]
    hidden: tuple[Tensor, ...]
    handover: Handover | None


class TemporalBranch(nn.Module):
    """Causal attention over time on squeezed frames; the output projection starts at zero.

    Args:
        width: d.
        inner_width: width of queries, keys and values over all heads.
        num_heads: n.
    """

    def __init__(self, width: int, inner_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, inner_width)
        self.to_k = nn.Linear(width, inner_width)
        self.to_v = nn.Linear(width, inner_width)
        self.to_out = nn.Linear(inner_width, width)

    def initialize(self, generator: torch.Generator) -> None:
        """Zero the output projection: the branch starts silent."""
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    @torch.compiler.disable
    def forward(self, video: Tensor, layout: PackedLayout) -> Tensor:
        """lv d to lv d: what the branch adds to each video token."""
        tables = layout.table("temporal", _make_tables)
        pooled = pool(video, tables)  # r d
        lengths = [rows * positions for rows, positions in tables.columns]
        q, k, v = self.to_q(pooled), self.to_k(pooled), self.to_v(pooled)
        if tables.handover is not None:
            q, k, v = _with_earlier(q, k, v, tables.handover)
        num_earlier = k.shape[0] - q.shape[0]
        key_lengths = [num_earlier + lengths[0], *lengths[1:]] if lengths else []
        parts = zip(q.split(lengths), k.split(key_lengths), v.split(key_lengths), strict=True)
        outs = [
            _attend(q, k, v, hidden, self.num_heads)
            for (q, k, v), hidden in zip(parts, tables.hidden, strict=True)
        ]  # fmt: skip
        return unpool(self.to_out(torch.cat(outs) if outs else q), tables)


def _with_earlier(q: Tensor, k: Tensor, v: Tensor, handover: Handover) -> tuple[Tensor, Tensor, Tensor]:
    """Put the keys and values of earlier ranks in front (collective)."""
    earlier = hand_tail(torch.cat([k, v], dim=1), None, handover)
    if not handover.is_entered:
        return tie(q, earlier), k, v
    earlier_k, earlier_v = earlier.chunk(2, dim=1)
    return q, torch.cat([earlier_k, k]), torch.cat([earlier_v, v])


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, num_heads: int) -> Tensor:
    """Attention over the rows of one column, float32: q (t s) (n p), k and v (t' s) (n p), to the shape of q."""
    positions = q.shape[0] // hidden.shape[0]
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (rearrange(a.float(), "(t s) (n p) -> n t (s p)", s=positions, n=num_heads) for a in (q, k, v))
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        out = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ v
    return rearrange(out, "n t (s p) -> (t s) (n p)", s=positions)


def pool(video: Tensor, tables: TemporalTables) -> Tensor:
    """Average each position's tokens: lv d to r d."""
    if not tables.members:  # a rank without frames
        return video
    parts = [
        rearrange(video.index_select(0, members.flatten()), "(r f) d -> r f d", f=members.shape[1]).mean(dim=1)
        for members in tables.members
    ]
    return torch.cat(parts).index_select(0, tables.order)


def unpool(pooled: Tensor, tables: TemporalTables) -> Tensor:
    """Give each video token its position's value: r d to lv d."""
    return _Unpool.apply(pooled, tables)  # type: ignore[no-any-return]


class _Unpool(torch.autograd.Function):
    """A gather whose backward sums each position's tokens in a fixed order, so it is deterministic on every device."""

    @staticmethod
    def forward(ctx: Any, pooled: Tensor, tables: TemporalTables) -> Tensor:
        ctx.tables = tables
        return pooled.index_select(0, tables.row_of_token)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if not ctx.tables.members:
            return grads[0], None
        parts = [
            rearrange(grads[0].index_select(0, members.flatten()), "(r f) d -> r f d", f=members.shape[1]).sum(dim=1)
            for members in ctx.tables.members
        ]
        return torch.cat(parts).index_select(0, ctx.tables.order), None


def _make_tables(layout: PackedLayout) -> TemporalTables:
    by_factor: dict[int, list[Tensor]] = {}
    slots: dict[int, list[Tensor]] = {}
    row_of_token = torch.empty(layout.num_video, dtype=torch.int64)
    columns, hidden = [], []
    at = 0
    for piece, span in zip(layout.pieces, layout.spans, strict=True):
        times = _row_times(replace(piece, start=0, stop=piece.start))
        num_earlier = len(times)
        times += _row_times(piece)
        height, width = _coarsest(piece.number, piece.column)
        for frame, first, is_noisy in zip(piece.frames, span.frames, piece.is_noisy, strict=True):
            rows = first + _frame_rows(piece.number, frame, height, width, is_noisy)  # rows*positions f
            numbers = torch.arange(at, at + rows.shape[0])
            by_factor.setdefault(rows.shape[1], []).append(rows)
            slots.setdefault(rows.shape[1], []).append(numbers)
            row_of_token[rows] = numbers[:, None]
            at += rows.shape[0]
        columns.append((len(times) - num_earlier, height * width))
        time = torch.tensor(times)
        hidden.append((time[None, :] > time[num_earlier:, None]).to(layout.device))
    made = torch.cat([torch.empty(0, dtype=torch.int64), *(torch.cat(slots[factor]) for factor in by_factor)])
    return TemporalTables(
        members=tuple(torch.cat(rows).to(layout.device) for rows in by_factor.values()),
        order=torch.argsort(made).to(layout.device),
        row_of_token=row_of_token.to(layout.device),
        columns=tuple(columns),
        hidden=tuple(hidden),
        handover=layout.handover(_num_positions) if layout.sequence.size > 1 else None,
    )


def _row_times(piece: Piece) -> list[int]:
    """Time of each row: of a history frame once, of a noisy one for each of its sub-images."""
    height, _ = _coarsest(piece.number, piece.column)
    times: list[int] = []
    for frame, is_noisy in zip(piece.frames, piece.is_noisy, strict=True):
        times += [frame.time] * ((frame.height // height) ** 2 if is_noisy else 1)
    return times


def _num_positions(piece: Piece) -> int:
    """Rows times positions."""
    height, width = _coarsest(piece.number, piece.column)
    return len(_row_times(piece)) * height * width


def _coarsest(number: int, column: ColumnShape) -> tuple[int, int]:
    """Grid of level 0 of a column."""
    noisy = column.frames[-1]
    factor = 2**noisy.level
    if noisy.height % factor or noisy.width % factor:
        raise ValueError(
            f"temporal branch: column {number} has a noisy grid of {noisy.height} x {noisy.width} tokens at pyramid "
            f"level {noisy.level}, which {factor} does not divide; use a size whose coarsest grid is whole, or set "
            "model.has_temporal_branch = false."
        )
    return noisy.height // factor, noisy.width // factor


def _frame_rows(number: int, frame: FrameShape, height: int, width: int, is_noisy: bool) -> Tensor:
    """Tokens of a frame by pooled position: (rows positions) f, counted from the frame's first token."""
    factor = frame.height // height
    if (factor * height, factor * width) != (frame.height, frame.width):
        raise ValueError(
            f"temporal branch: column {number} holds a frame of {frame.height} x {frame.width} tokens, no multiple of "
            f"the column's coarsest grid {height} x {width}; give history whose grids are halves of the noisy one's."
        )
    grid = torch.arange(frame.num_tokens).view(frame.height, frame.width)
    pattern = "(h y) (w x) -> (y x h w) 1" if is_noisy else "(h y) (w x) -> (h w) (y x)"
    return rearrange(grid, pattern, y=factor, x=factor)
