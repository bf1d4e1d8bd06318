"""Multi-modal token re-composition and its exact inverse (M4V paper, section on MM-DiM).

A column [text] [frame, frame, ...] becomes the scanned sequence

    text | register, frame | register, frame | ... | text

with each frame in zigzag order behind the register of its resolution. The text goes in twice, so that the state that
reads the frames has read the text, and the second copy has read the frames; the inverse drops the registers, undoes
the order and sums the two copies. Padding is left out: a state starts at the first text token. The padded form that
the paper draws is `recompose_padded`, the slow twin that a test holds to this one.

Where a column lies on several sequence ranks, the text stands in front of the frames on the first of them and behind
the frames on the last: the last borrows the text, n d numbers, and gives back what its copy became.

Legend: `lt` `lv` text and video tokens of all columns, `l` re-composed tokens, `f` frames, `d` width, `k` columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from m4v_dist.blocks.layout import PackedLayout, Piece
from m4v_dist.blocks.zigzag import zigzag_order
from m4v_dist.parallel.sequence import Counts, Handover, exchange, transposed


@dataclass(frozen=True)
class RecompositionPlan:
    """Index tables of one layout, path and set of switches; int64 on the device but for `cu_seqlens`.

    Args:
        source: l, row of [text; borrowed text; video; one register row per frame] that each scanned position reads.
        text_left: lt, position of the first copy.
        text_right: position of the second copy, first that of borrowed text, then of this rank's own as far as its
            columns end here (all lt, where nothing is cut); None without the sandwich.
        video: lv, position of each video token.
        register_levels: f, which register stands before each frame; None without registers.
        cu_seqlens: int32 on the host, where the columns, or what this rank holds of them, start; and the end.
        cut: what goes from rank to rank; None where nothing is cut.
    """

    source: Tensor
    text_left: Tensor
    text_right: Tensor | None
    video: Tensor
    register_levels: Tensor | None
    cu_seqlens: Tensor
    cut: "RecompositionCut | None" = None


@dataclass(frozen=True)
class RecompositionCut:
    """What a plan's ranks owe one another.

    Args:
        handover: where the cuts go through the scanned sequence.
        text: counts of borrowed text tokens; a rank lends the last ones that it has.
    """

    handover: Handover
    text: Counts

    @property
    def num_lent(self) -> int:
        """Text tokens that this rank lends."""
        return sum(self.text[self.handover.sequence.rank])

    @property
    def num_borrowed(self) -> int:
        """Text tokens that this rank borrows."""
        return sum(given[self.handover.sequence.rank] for given in self.text)


@torch.compiler.disable
def recomposition_plan(
    layout: PackedLayout, path: int, *, has_text_sandwich: bool, has_registers: bool
) -> RecompositionPlan:
    """Return the tables, made once per layout.

    Args:
        layout: shapes of the columns.
        path: zigzag path, 0 .. 7.
        has_text_sandwich: text before and after the frames, instead of before only.
        has_registers: a register in front of each frame.
    """
    return layout.table(
        ("recompose", path, has_text_sandwich, has_registers),
        lambda made: _make_plan(made, path, has_text_sandwich, has_registers),
    )


def _make_plan(layout: PackedLayout, path: int, has_text_sandwich: bool, has_registers: bool) -> RecompositionPlan:
    cut = _make_cut(layout, has_text_sandwich, has_registers) if layout.sequence.size > 1 else None
    num_text = layout.num_text + (cut.num_borrowed if cut is not None else 0)
    nothing = torch.empty(0, dtype=torch.int64)
    source, lefts, rights = [nothing], [nothing], [nothing]
    starts, levels = [0], list[int]()
    length = 0

    def append(rows: Tensor) -> Tensor:
        nonlocal length
        source.append(rows)
        length += rows.numel()
        return torch.arange(length - rows.numel(), length)

    for piece, span in zip(layout.pieces, layout.spans, strict=True):
        text = torch.arange(*span.text)
        if piece.is_first:
            lefts.append(append(text))
        for frame, first in zip(piece.frames, span.frames, strict=True):
            if has_registers:
                append(torch.tensor([num_text + layout.num_video + len(levels)]))
                levels.append(frame.level)
            append(num_text + first + zigzag_order(frame.height, frame.width, path))
        if has_text_sandwich and piece.is_last:
            rights.append(append(text if piece.is_first else torch.arange(layout.num_text, num_text)))
        starts.append(length)
    rows = torch.cat(source)
    video = torch.empty(layout.num_video, dtype=torch.int64)
    is_video = (rows >= num_text) & (rows < num_text + layout.num_video)
    video[rows[is_video] - num_text] = is_video.nonzero()[:, 0]
    device = layout.device
    return RecompositionPlan(
        source=rows.to(device),
        text_left=torch.cat(lefts).to(device),
        text_right=torch.cat(rights).to(device) if has_text_sandwich else None,
        video=video.to(device),
        register_levels=torch.tensor(levels, dtype=torch.int64, device=device) if has_registers else None,
        # A scan in plain torch walks the segments in Python: from a GPU it would wait for these numbers in every block.
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        cut=cut,
    )


def _make_cut(layout: PackedLayout, has_text_sandwich: bool, has_registers: bool) -> RecompositionCut:
    ranks = layout.pieces_by_rank

    def length(piece: Piece) -> int:
        text = piece.num_text + piece.column.num_text * (has_text_sandwich and piece.is_last)
        return text + piece.num_video + len(piece.frames) * has_registers

    text = [[0] * len(ranks) for _ in ranks]
    for taker, pieces in enumerate(ranks):
        if has_text_sandwich and pieces and pieces[0].is_last and not pieces[0].is_first:
            column = pieces[0].number
            (giver,) = (r for r, p in enumerate(ranks) if p and p[-1].number == column and p[-1].is_first)
            text[giver][taker] = pieces[0].column.num_text
    return RecompositionCut(layout.handover(length), tuple(map(tuple, text)))


def recompose(text: Tensor, video: Tensor, registers: Tensor | None, plan: RecompositionPlan) -> Tensor:
    """Gather the scanned sequence.

    Args:
        text: lt d.
        video: lv d.
        registers: levels d, one per pyramid level; None where the plan has none.
        plan: tables of this layout.

    Returns:
        l d.

    Collective where the layout is cut.

    Raises:
        ValueError: the tokens do not fit the plan's layout.
    """
    if text.shape[0] != plan.text_left.numel() or video.shape[0] != plan.video.numel():
        raise ValueError(
            f"recompose: got lt={text.shape[0]} text and lv={video.shape[0]} video tokens, but the layout has "
            f"{plan.text_left.numel()} and {plan.video.numel()}; pass the layout of the latents that were patchified."
        )
    rows = [text, video]
    if plan.cut is not None:
        lent = text[text.shape[0] - plan.cut.num_lent :]
        rows = [text, exchange(lent, plan.cut.text, plan.cut.handover.sequence), video]
    if plan.register_levels is not None:
        if registers is None:
            raise ValueError("recompose: the plan has registers, but none were given; pass registers, levels d.")
        rows.append(registers.to(video.dtype)[plan.register_levels])
    return torch.cat(rows).index_select(0, plan.source)


def invert(tokens: Tensor, plan: RecompositionPlan) -> tuple[Tensor, Tensor]:
    """Undo `recompose`: drop registers, undo the order, sum the copies of the text; collective where it is.

    Args:
        tokens: l d.
        plan: the plan that made them.

    Returns:
        text: lt d (the sum of both copies); video: lv d.
    """
    text = tokens.index_select(0, plan.text_left)
    if plan.text_right is not None:
        right = tokens.index_select(0, plan.text_right)
        if plan.cut is not None:
            borrowed, own = right.tensor_split([plan.cut.num_borrowed])
            right = torch.cat([own, exchange(borrowed, transposed(plan.cut.text), plan.cut.handover.sequence)])
        text = text + right
    return text, tokens.index_select(0, plan.video)


def recompose_padded(
    text: Tensor,  # n d, the text of one column
    frames: list[tuple[Tensor, int, int]],  # (h*w d, height, width) of each frame, old to new
    registers: list[Tensor],  # one d-vector per frame
    *,
    path: int,
    padded_length: int,
) -> tuple[Tensor, Tensor]:
    """The form that the paper draws, one column at a time: pads before the first text copy and after the second.

    Pads are zero rows. The returned `cu_seqlens` starts a new segment at the first text token, so that the state there
    is zero although convolution and projection biases have touched the pads.

    Returns:
        tokens: 2 padded_length + visual tokens + frames, d; cu_seqlens: int32, pads (if any), then the rest.
    """
    num_pads = padded_length - text.shape[0]
    pads = text.new_zeros(num_pads, text.shape[1])
    parts = [pads, text]
    for (tokens, height, width), register in zip(frames, registers, strict=True):
        parts += [register[None], tokens[zigzag_order(height, width, path)]]
    sequence = torch.cat([*parts, text, pads])
    starts = sorted({0, num_pads, sequence.shape[0]})
    return sequence, torch.tensor(starts, dtype=torch.int32)
