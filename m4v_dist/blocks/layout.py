"""The packed layout: where each text and video token of a batch of columns lies, as tables made on the host.

All columns' text tokens stand in one tensor, all their video tokens in another, each column after column, without
padding and without a batch axis. A layout is a pure function of the columns' shapes, so it is cached; the tables that
other files derive from it (scan orders, rotary angles, temporal rows) are kept in it, on the device.

Legend: `lt` text tokens of all columns, `lv` video tokens of all columns, `k` columns.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from m4v_dist.blocks.cut import cut_evenly, imbalance
from m4v_dist.parallel.mesh import ALONE, SequenceGroup
from m4v_dist.parallel.sequence import Handover

T = TypeVar("T")


@dataclass(frozen=True)
class FrameShape:
    """One latent frame: grid in tokens, pyramid level of that grid (0 coarsest), running time index (0 oldest)."""

    height: int
    width: int
    level: int
    time: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the frame."""
        return self.height * self.width


@dataclass(frozen=True)
class ColumnShape:
    """One segment.

    Args:
        num_text: text tokens.
        frames: old to new.
        num_noisy: how many of the newest frames are noisy.
        has_temporal_mask: whether attention reads no later frame; False lets all tokens of the column meet.
    """

    num_text: int
    frames: tuple[FrameShape, ...]
    num_noisy: int = 1
    has_temporal_mask: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.num_noisy <= len(self.frames):
            raise ValueError(
                f"ColumnShape: {self.num_noisy} noisy frames out of {len(self.frames)}; need at least one."
            )

    @property
    def num_video(self) -> int:
        """Video tokens of the column."""
        return sum(frame.num_tokens for frame in self.frames)

    @property
    def num_noisy_tokens(self) -> int:
        """Video tokens whose velocity is predicted; the last ones of the column."""
        return sum(frame.num_tokens for frame in self.frames[-self.num_noisy :])


@dataclass(frozen=True)
class Piece:
    """The frames that one rank holds of one column: all of them, where nothing is cut.

    Args:
        number: of the column.
        column: the whole column.
        start, stop: frames start .. stop, at least one.
    """

    number: int
    column: ColumnShape
    start: int
    stop: int

    @property
    def is_first(self) -> bool:
        """Whether the column begins here; its text stands here too."""
        return self.start == 0

    @property
    def is_last(self) -> bool:
        """Whether the column ends here."""
        return self.stop == len(self.column.frames)

    @property
    def frames(self) -> tuple[FrameShape, ...]:
        """Old to new."""
        return self.column.frames[self.start : self.stop]

    @property
    def num_text(self) -> int:
        """Text tokens that stand here."""
        return self.column.num_text if self.is_first else 0

    @property
    def num_video(self) -> int:
        """Video tokens of these frames."""
        return sum(frame.num_tokens for frame in self.frames)

    @property
    def is_noisy(self) -> tuple[bool, ...]:
        """Of each frame, whether its velocity is predicted."""
        first = len(self.column.frames) - self.column.num_noisy
        return tuple(number >= first for number in range(self.start, self.stop))

    @property
    def num_noisy_tokens(self) -> int:
        """Video tokens whose velocity is predicted; the last ones of the piece."""
        flags = zip(self.frames, self.is_noisy, strict=True)
        return sum(frame.num_tokens for frame, is_noisy in flags if is_noisy)


@dataclass(frozen=True)
class ColumnSpan:
    """Where a piece of a column lies.

    Args:
        text: first text token and the one past the last.
        video: the same for video tokens.
        frames: first video token of each frame.
        times: the video token past the last one of each run of frames that attention lets meet.
    """

    text: tuple[int, int]
    video: tuple[int, int]
    frames: tuple[int, ...]
    times: tuple[int, ...]


class PackedLayout:
    """Offsets and index tables of one rank's tokens; make it with `packed_layout`.

    Args:
        columns: of the whole batch.
        device: where the tables live.
        sequence: the ranks that the batch is cut over.
    """

    def __init__(self, columns: tuple[ColumnShape, ...], device: torch.device, sequence: SequenceGroup = ALONE) -> None:
        self.columns = columns
        self.device = device
        self.sequence = sequence
        self.pieces_by_rank = cut_columns(columns, sequence.size)
        self.pieces = self.pieces_by_rank[sequence.rank]
        # One entry for each column of the batch, 0 where it is not here: as many as there are vectors of conditioning.
        self.text_lengths = _by_column(columns, self.pieces, lambda piece: piece.num_text)
        self.video_lengths = _by_column(columns, self.pieces, lambda piece: piece.num_video)
        self.num_text, self.num_video = sum(self.text_lengths), sum(self.video_lengths)
        self.spans = _spans(self.pieces)
        self.positions = torch.cat([torch.empty(0, 3), *(_positions(piece) for piece in self.pieces)]).to(device)
        self.noisy = torch.cat(
            [
                torch.empty(0, dtype=torch.int64),
                *(
                    torch.arange(span.video[1] - piece.num_noisy_tokens, span.video[1])
                    for piece, span in zip(self.pieces, self.spans, strict=True)
                ),
            ]
        ).to(device)
        self.noisy_lengths = _by_column(columns, self.pieces, lambda piece: piece.num_noisy_tokens)
        self._tables: dict[Hashable, object] = {}

    @property
    def whole(self) -> "PackedLayout":
        """The layout of all ranks' tokens."""
        return self if self.sequence.size == 1 else self._whole

    @cached_property
    def _whole(self) -> "PackedLayout":
        return packed_layout(self.columns, self.device)

    @cached_property
    def text_by_rank(self) -> list[int]:
        """Text tokens of each sequence rank; this rank's tokens lie in the whole batch behind those before it."""
        return [sum(piece.num_text for piece in pieces) for pieces in self.pieces_by_rank]

    @cached_property
    def video_by_rank(self) -> list[int]:
        """The same for video tokens."""
        return [sum(piece.num_video for piece in pieces) for pieces in self.pieces_by_rank]

    @cached_property
    def noisy_by_rank(self) -> list[int]:
        """The same for video tokens whose velocity is predicted."""
        return [sum(piece.num_noisy_tokens for piece in pieces) for pieces in self.pieces_by_rank]

    def own(self, tokens: Tensor, by_rank: list[int]) -> Tensor:
        """This rank's part of a tensor of all ranks' tokens, which `by_rank` counts."""
        rank = self.sequence.rank
        return tokens.narrow(0, sum(by_rank[:rank]), by_rank[rank])

    def handover(self, length: Callable[[Piece], int]) -> Handover:
        """Where the cuts go through the columns.

        Args:
            length: tokens of a piece, as the caller counts them.
        """
        ranks = self.pieces_by_rank
        return Handover(
            self.sequence,
            entering=tuple(p[0].number if p and not p[0].is_first else None for p in ranks),
            leaving=tuple(p[-1].number if p and not p[-1].is_last else None for p in ranks),
            entering_lengths=tuple(length(p[0]) if p else 0 for p in ranks),
            leaving_lengths=tuple(length(p[-1]) if p else 0 for p in ranks),
        )

    def table(self, key: Hashable, build: Callable[["PackedLayout"], T]) -> T:
        """Return what `build(self)` gives, made once for `key`."""
        if key not in self._tables:
            # A table first asked for by a sampler must not be an inference tensor: training may ask for it next.
            with torch.inference_mode(False):
                self._tables[key] = build(self)
        return self._tables[key]  # type: ignore[return-value]


@lru_cache(maxsize=16)
def packed_layout(
    columns: tuple[ColumnShape, ...], device: torch.device, sequence: SequenceGroup = ALONE
) -> PackedLayout:
    """Return the layout of these columns on this device, from the cache where they came before.

    Args:
        columns: shapes of the columns.
        device: where the tables live.
        sequence: the ranks that the columns are cut over.
    """
    with torch.inference_mode(False):  # as in `table`
        return PackedLayout(columns, device, sequence)


def cut_columns(columns: tuple[ColumnShape, ...], num_ranks: int) -> tuple[tuple[Piece, ...], ...]:
    """What each sequence rank holds, in order.

    Args:
        columns: of the whole batch.
        num_ranks: sequence ranks.
    """
    if num_ranks == 1:
        return (tuple(Piece(number, column, 0, len(column.frames)) for number, column in enumerate(columns)),)
    bounds = cut_evenly(_frame_weights(columns), num_ranks)
    ranks: list[tuple[Piece, ...]] = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        pieces, first = [], 0
        for number, column in enumerate(columns):
            count = len(column.frames)
            inside = max(start - first, 0), min(stop - first, count)
            if inside[0] < inside[1]:
                pieces.append(Piece(number, column, *inside))
            first += count
        ranks.append(tuple(pieces))
    return tuple(ranks)


def cut_imbalance(columns: Sequence[ColumnShape], num_ranks: int) -> float:
    """Tokens of the fullest sequence rank over the mean; a column's text counts at both ends, as it is scanned."""
    weights = _frame_weights(columns)
    return imbalance(weights, cut_evenly(weights, num_ranks))


def _frame_weights(columns: Sequence[ColumnShape]) -> list[int]:
    weights = []
    for column in columns:
        own = [frame.num_tokens for frame in column.frames]
        own[0] += column.num_text
        own[-1] += column.num_text
        weights += own
    return weights


def _by_column(columns: tuple[ColumnShape, ...], pieces: tuple[Piece, ...], count: Callable[[Piece], int]) -> list[int]:
    counts = [0] * len(columns)
    for piece in pieces:
        counts[piece.number] = count(piece)
    return counts


def _spans(pieces: tuple[Piece, ...]) -> tuple[ColumnSpan, ...]:
    spans = []
    text = video = 0
    for piece in pieces:
        starts, times, at = [], [], video
        for number, frame in enumerate(piece.frames):
            starts.append(at)
            at += frame.num_tokens
            following = piece.frames[number + 1 : number + 2]
            if not following or (piece.column.has_temporal_mask and following[0].time != frame.time):
                times.append(at)
        spans.append(ColumnSpan((text, text + piece.num_text), (video, at), tuple(starts), tuple(times)))
        text, video = text + piece.num_text, at
    return tuple(spans)


def _positions(piece: Piece) -> Tensor:
    """Time index and grid position of each token, in steps of the noisy grid (PyramidFlow: interp_condition_pos)."""
    noisy = piece.column.frames[-1]
    parts = []
    for frame in piece.frames:
        rows, cols = _axis(noisy.height, frame.height), _axis(noisy.width, frame.width)
        time = torch.full((frame.num_tokens,), float(frame.time))
        parts.append(
            torch.stack([time, rows.repeat_interleave(frame.width), cols.repeat(frame.height)], dim=-1)  # h*w 3
        )
    return torch.cat(parts)


def _axis(size: int, count: int) -> Tensor:
    positions = torch.arange(size, dtype=torch.float32)
    return positions if size == count else F.interpolate(positions[None, None], count, mode="linear")[0, 0]
