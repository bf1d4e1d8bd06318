"""The mask of FlexAttention from two numbers a token: equal to the dense one; on a GPU the kernel to its slow twin."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from m4v_dist.blocks.attention import dense_joint_attention, joint_attention, prefix_joint_attention
from m4v_dist.blocks.flex_attention import BLOCK, _compiled, block_table, key_runs, make_tables, padded_length
from m4v_dist.blocks.layout import ColumnShape, FrameShape, PackedLayout
from tests.blocks.layouts import mixed_layout


def _pyramid_layout(device: str = "cpu", *, has_temporal_mask: bool = True) -> PackedLayout:
    """Columns of several blocks each, as a training row has: history coarse, the newest frames finer."""

    def column(num_text: int, grids: list[tuple[int, int, int]], num_noisy: int = 1) -> ColumnShape:
        frames = tuple(FrameShape(*grid, time) for time, grid in enumerate(grids))
        return ColumnShape(num_text, frames, num_noisy, has_temporal_mask)

    quarter, half, full = (4, 6, 0), (8, 12, 1), (16, 24, 2)
    columns = (column(5, [quarter] * 9), column(77, [quarter, half, full, full]), column(128, [full] * 3, 3))
    return PackedLayout(columns, torch.device(device))


def _dense_mask(layout: PackedLayout, length: int) -> Tensor:
    """Column and time compared pair by pair: l l bool, column after column, the padding a column of its own."""
    column, time = torch.full((length,), -1.0), torch.zeros(length)
    at = 0
    for number, (shape, span) in enumerate(zip(layout.columns, layout.spans, strict=True)):
        num_text = span.text[1] - span.text[0]
        end = at + num_text + shape.num_video
        column[at:end] = number
        if shape.has_temporal_mask:
            time[at + num_text : end] = layout.positions[slice(*span.video), 0].cpu()
        at = end
    return (column[:, None] == column) & (time[:, None] >= time)


@pytest.mark.parametrize("has_temporal_mask", [True, False])
def test_runs_and_blocks_say_what_the_dense_mask_says(has_temporal_mask: bool) -> None:
    layout = _pyramid_layout(has_temporal_mask=has_temporal_mask)
    length = padded_length(layout.num_text + layout.num_video)
    assert length > layout.num_text + layout.num_video and length % BLOCK == 0
    first, last = key_runs(layout, length)
    keys = torch.arange(length)
    mask = _dense_mask(layout, length)
    assert torch.equal((keys >= first[:, None]) & (keys < last[:, None]), mask)
    blocks = mask.view(length // BLOCK, BLOCK, length // BLOCK, BLOCK).transpose(1, 2).flatten(2)  # q k pairs
    touched, full = block_table(first, last)
    assert torch.equal(touched, blocks.any(dim=-1)) and torch.equal(full, blocks.all(dim=-1))
    assert full.any() and not touched.all()


def test_there_are_two_sizes_an_octave() -> None:
    sizes = sorted({padded_length(tokens) for tokens in range(1, 50_000)})
    assert sizes[:6] == [512, 768, 1024, 1536, 2048, 3072] and len(sizes) == 15
    assert all(padded_length(size) == size and size % BLOCK == 0 for size in sizes)


def test_the_kernel_s_mask_equals_the_dense_one_where_it_runs_unfused() -> None:
    layout = mixed_layout()
    tables = make_tables(layout)
    q, k, v = torch.randn(3, 1, 2, tables.padded_length, 8, dtype=torch.float64).unbind(0)
    mask = _dense_mask(layout, tables.padded_length)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=tables.mask), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("has_temporal_mask", [True, False])
def test_a_gpu_attends_as_the_dense_mask_with_gradients(
    dtype: torch.dtype, tolerance: float, has_temporal_mask: bool
) -> None:
    layout = _pyramid_layout("cuda", has_temporal_mask=has_temporal_mask)
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(length: int) -> list[Tensor]:
        return [
            torch.randn(length, 3, 64, device="cuda", generator=generator).to(dtype).requires_grad_() for _ in range(3)
        ]

    text, video = draw(layout.num_text), draw(layout.num_video)
    weight = torch.randn(layout.num_text + layout.num_video, 192, device="cuda", generator=generator)
    results: list[list[Tensor]] = []
    for attend, cast in ((joint_attention, dtype), (dense_joint_attention, torch.float64)):
        parts = attend(tuple(a.to(cast) for a in text), tuple(a.to(cast) for a in video), layout)  # type: ignore[arg-type]
        out = torch.cat(parts)
        results.append([out, *torch.autograd.grad((out * weight).sum(), [*text, *video])])
    for fused, dense in zip(*results, strict=True):
        assert (fused.double() - dense.double()).abs().max() <= tolerance * dense.double().abs().max()


@pytest.mark.gpu
def test_layouts_of_one_padded_size_share_one_compiled_kernel() -> None:
    from torch._dynamo.utils import counters

    def attend(num_text: int) -> None:
        columns = tuple(replace(shape, num_text=num_text) for shape in _pyramid_layout().columns)
        layout = PackedLayout(columns, torch.device("cuda"))
        shape = (3, 2, 64)
        text, video = (
            torch.randn(3, length, *shape[1:], device="cuda").unbind(0)
            for length in (layout.num_text, layout.num_video)
        )
        torch.testing.assert_close(
            torch.cat(joint_attention(text, video, layout)),
            torch.cat(prefix_joint_attention(text, video, layout)),
            atol=5e-3,
            rtol=5e-3,
        )

    _compiled()
    attend(7)
    before = counters["stats"]["unique_graphs"]
    for num_text in (9, 30, 64):
        attend(num_text)
    assert counters["stats"]["unique_graphs"] == before
