"""Joint attention: equal to the dense mask, causal over time, tight between columns; rotary angles are relative."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from m4v_dist.blocks.attention import AttentionMixer, dense_joint_attention, joint_attention, rotate
from m4v_dist.blocks.embed import rope_table
from m4v_dist.blocks.layout import PackedLayout
from m4v_dist.model.build import initialize_weights
from tests.blocks.layouts import mixed_layout

Triple = tuple[Tensor, Tensor, Tensor]


def _triples(layout: PackedLayout) -> tuple[Triple, Triple]:
    def draw(length: int) -> Triple:
        q, k, v = torch.randn(3, length, 2, 8, dtype=torch.float64).unbind(0)
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()

    return draw(layout.num_text), draw(layout.num_video)


@pytest.mark.parametrize("has_temporal_mask", [True, False])
def test_prefix_attention_equals_the_dense_mask_with_gradients(has_temporal_mask: bool) -> None:
    columns = tuple(replace(shape, has_temporal_mask=has_temporal_mask) for shape in mixed_layout().columns)
    layout = PackedLayout(columns, torch.device("cpu"))
    text, video = _triples(layout)
    results = []
    for attend in (joint_attention, dense_joint_attention):
        out = torch.cat(attend(text, video, layout))
        results.append((out, torch.autograd.grad(out.square().sum(), [*text, *video])))
    torch.testing.assert_close(results[0], results[1])


def test_no_frame_reads_a_later_one_and_text_reads_the_first_frame_only() -> None:
    layout = mixed_layout()
    mixer = AttentionMixer(16, 2, (4, 2, 2))
    initialize_weights(mixer, seed=0)
    text, video = torch.randn(layout.num_text, 16), torch.randn(layout.num_video, 16)
    before = mixer(text, video, layout)
    span = layout.spans[0]
    for number, first in enumerate(span.frames):
        changed = video.clone()
        changed[first] += 1
        after = mixer(text, changed, layout)
        moved = (after[1] - before[1]).abs().amax(dim=-1) > 0
        assert moved[first : span.video[1]].all() and moved.sum() == span.video[1] - first
        text_moved = (after[0] - before[0]).abs().amax(dim=-1) > 0
        assert text_moved.sum() == (layout.text_lengths[0] if number == 0 else 0)


def test_rotary_scores_depend_on_the_difference_of_positions_only() -> None:
    layout = mixed_layout()
    cos, sin = rope_table(layout, (4, 2, 2))
    q, k = torch.randn(8), torch.randn(8)

    def score(a: int, b: int) -> Tensor:
        return (
            rotate(q.view(1, 1, 8), (cos[a : a + 1], sin[a : a + 1]))
            * rotate(k.view(1, 1, 8), (cos[b : b + 1], sin[b : b + 1]))
        ).sum()

    # The noisy frame of the first column is 8 x 12: one column right, wherever the pair stands.
    first, width = layout.spans[0].frames[-1], layout.columns[0].frames[-1].width
    torch.testing.assert_close(score(first, first + 1), score(first + 3 * width + 4, first + 3 * width + 5))
    assert abs(score(first, first + 1) - score(first, first + width)) > 1e-3
