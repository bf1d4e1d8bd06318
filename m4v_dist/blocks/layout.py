"""The packed layout: where each text and video token of a batch of columns lies, as tables made on the host.

All columns' text tokens stand in one tensor, all their video tokens in another, each column after column, without
padding and without a batch axis. A layout is a pure function of the columns' shapes, so it is cached; the tables that
other files derive from it (scan orders, rotary angles, temporal rows) are kept in it, on the device.

Legend: `lt` text tokens of all columns, `lv` video tokens of all columns, `k` columns.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

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
class ColumnSpan:
    """Where a column lies.

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
    """Offsets and index tables of one batch of columns; make it with `packed_layout`."""

    def __init__(self, columns: tuple[ColumnShape, ...], device: torch.device) -> None:
        self.columns = columns
        self.device = device
        self.text_lengths = [column.num_text for column in columns]
        self.video_lengths = [column.num_video for column in columns]
        self.num_text, self.num_video = sum(self.text_lengths), sum(self.video_lengths)
        self.spans = _spans(columns)
        self.positions = torch.cat([_positions(column) for column in columns]).to(device)  # lv 3; t, h, w
        self.noisy = torch.cat(
            [
                torch.arange(span.video[1] - column.num_noisy_tokens, span.video[1])
                for column, span in zip(columns, self.spans, strict=True)
            ]
        ).to(device)
        self.noisy_lengths = [column.num_noisy_tokens for column in columns]
        self._tables: dict[Hashable, object] = {}

    def table(self, key: Hashable, build: Callable[["PackedLayout"], T]) -> T:
        """Return what `build(self)` gives, made once for `key`."""
        if key not in self._tables:
            # A table first asked for by a sampler must not be an inference tensor: training may ask for it next.
            with torch.inference_mode(False):
                self._tables[key] = build(self)
        return self._tables[key]  # type: ignore[return-value]


@lru_cache(maxsize=16)
def packed_layout(columns: tuple[ColumnShape, ...], device: torch.device) -> PackedLayout:
    """Return the layout of these columns on this device, from the cache where they came before.

    Args:
        columns: shapes of the columns.
        device: where the tables live.
    """
    with torch.inference_mode(False):  # as in `table`
        return PackedLayout(columns, device)


def _spans(columns: tuple[ColumnShape, ...]) -> tuple[ColumnSpan, ...]:
    spans = []
    text = video = 0
    for column in columns:
        starts, times, at = [], [], video
        for number, frame in enumerate(column.frames):
            starts.append(at)
            at += frame.num_tokens
            following = column.frames[number + 1 : number + 2]
            if not following or (column.has_temporal_mask and following[0].time != frame.time):
                times.append(at)
        spans.append(ColumnSpan((text, text + column.num_text), (video, at), tuple(starts), tuple(times)))
        text, video = text + column.num_text, at
    return tuple(spans)


def _positions(column: ColumnShape) -> Tensor:
    """Time index and grid position of each token, in steps of the noisy grid (PyramidFlow: interp_condition_pos)."""
    noisy = column.frames[-1]
    parts = []
    for frame in column.frames:
        rows, cols = _axis(noisy.height, frame.height), _axis(noisy.width, frame.width)
        time = torch.full((frame.num_tokens,), float(frame.time))
        parts.append(
            torch.stack([time, rows.repeat_interleave(frame.width), cols.repeat(frame.height)], dim=-1)  # h*w 3
        )
    return torch.cat(parts)


def _axis(size: int, count: int) -> Tensor:
    positions = torch.arange(size, dtype=torch.float32)
    return positions if size == count else F.interpolate(positions[None, None], count, mode="linear")[0, 0]
