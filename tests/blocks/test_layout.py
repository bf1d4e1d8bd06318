"""The packed layout: spans tile the tokens, positions follow the noisy grid, tables are made once."""

import pytest
import torch

from m4v_dist.blocks.layout import ColumnShape, FrameShape, packed_layout
from tests.blocks.layouts import column, mixed_layout


def test_spans_tile_text_and_video_without_gaps() -> None:
    layout = mixed_layout()
    text = [span.text for span in layout.spans]
    video = [span.video for span in layout.spans]
    for spans, total in ((text, layout.num_text), (video, layout.num_video)):
        assert spans[0][0] == 0 and spans[-1][1] == total
        assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
    for span, shape in zip(layout.spans, layout.columns, strict=True):
        ends = [*span.frames[1:], span.video[1]]
        assert [b - a for a, b in zip(span.frames, ends, strict=True)] == [f.num_tokens for f in shape.frames]


def test_noisy_tokens_are_the_last_of_each_column() -> None:
    layout = mixed_layout()
    parts = layout.noisy.split(layout.noisy_lengths)
    for part, span, shape in zip(parts, layout.spans, layout.columns, strict=True):
        assert part.tolist() == list(range(span.video[1] - shape.frames[-1].num_tokens, span.video[1]))


def test_history_positions_lie_in_the_middle_of_the_noisy_tokens_they_cover() -> None:
    layout = packed_layout((column(1, 3, 1, height=2, width=2),), torch.device("cpu"))
    history, newest, noisy = layout.positions.split([4, 16, 16])
    assert history.tolist() == [[0, 0.5, 0.5], [0, 0.5, 2.5], [0, 2.5, 0.5], [0, 2.5, 2.5]]
    assert newest.tolist() == [[1, row, col] for row in range(4) for col in range(4)]
    assert noisy.tolist() == [[2, row, col] for row in range(4) for col in range(4)]


def test_a_layout_and_its_tables_are_made_once_for_equal_shapes() -> None:
    shapes = (column(1, 2, 3),)
    layout = packed_layout(shapes, torch.device("cpu"))
    assert packed_layout((column(1, 2, 3),), torch.device("cpu")) is layout
    calls: list[int] = []
    for _ in range(2):
        assert layout.table("test", lambda made: calls.append(made.num_text) or "table") == "table"
    assert calls == [3]


def test_a_column_without_a_noisy_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="0 noisy frames out of 1"):
        ColumnShape(1, (FrameShape(1, 1, 0, 0),), num_noisy=0)
