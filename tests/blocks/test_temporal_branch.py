"""The temporal branch: silent at the start, causal over time, tight between columns, adjoint pooling."""

import pytest
import torch

from m4v_dist.blocks.layout import ColumnShape, FrameShape, PackedLayout
from m4v_dist.blocks.temporal_branch import TemporalBranch, _make_tables, pool, unpool
from m4v_dist.model.build import initialize_weights
from tests.blocks.layouts import column, mixed_layout


def _branch(width: int = 6) -> TemporalBranch:
    branch = TemporalBranch(width, 8, 2)
    initialize_weights(branch, seed=0)
    return branch


def _loud(width: int = 6) -> TemporalBranch:
    branch = _branch(width)
    torch.nn.init.normal_(branch.to_out.weight)
    return branch


def test_branch_starts_silent() -> None:
    layout = mixed_layout()
    assert torch.count_nonzero(_branch()(torch.randn(layout.num_video, 6), layout)) == 0


def test_temporal_branch_ignores_later_frames_and_other_columns() -> None:
    layout, branch = mixed_layout(), _loud()
    video = torch.randn(layout.num_video, 6)
    before = branch(video, layout)
    for span, shape in zip(layout.spans, layout.columns, strict=True):
        for first, frame in zip(span.frames, shape.frames, strict=True):
            changed = video.clone()
            changed[first : first + frame.num_tokens] += torch.randn(frame.num_tokens, 6)
            moved = (branch(changed, layout) - before).abs().amax(dim=-1) > 1e-7
            assert moved[first : span.video[1]].all() and moved.sum() == span.video[1] - first


def test_rows_are_history_frames_and_the_sub_images_of_the_noisy_one() -> None:
    tables = _make_tables(mixed_layout())
    # (stage 2, unit 4), (stage 0, unit 3), (stage 1, unit 2), (stage 2, unit 1): history plus 4^stage rows of 2 x 3.
    assert tables.columns == ((3 + 16, 6), (2 + 1, 6), (1 + 4, 6), (0 + 16, 6))
    hidden = tables.hidden[0]
    assert not hidden[3:, :].any(), "sub-images of the newest frame see everything"
    assert hidden[:3].tolist() == [[False] * (t + 1) + [True] * (18 - t) for t in range(3)]


def test_history_is_averaged_and_the_noisy_frame_split_by_stride() -> None:
    """4 x 4 history (level 1) and 8 x 8 noisy (level 2) on a coarsest grid of 2 x 2."""
    frames = (FrameShape(4, 4, 1, 0), FrameShape(8, 8, 2, 1))
    layout = PackedLayout((ColumnShape(1, frames),), torch.device("cpu"))
    tables = _make_tables(layout)
    history, noisy = torch.randn(4, 4), torch.randn(8, 8)
    pooled = pool(torch.cat([history.flatten(), noisy.flatten()])[:, None], tables)[:, 0].view(17, 2, 2)
    torch.testing.assert_close(pooled[0], torch.nn.functional.avg_pool2d(history[None], 2)[0])
    for y in range(4):
        for x in range(4):
            assert torch.equal(pooled[1 + 4 * y + x], noisy[y::4, x::4])
    back_history, back_noisy = unpool(pooled.flatten()[:, None], tables)[:, 0].split([16, 64])
    assert torch.equal(back_noisy.view(8, 8), noisy)
    nearest = torch.nn.functional.interpolate(pooled[None, :1], scale_factor=2, mode="nearest")[0, 0]
    assert torch.equal(back_history.view(4, 4), nearest)


def test_gradients_of_pool_and_unpool_are_exact() -> None:
    layout = mixed_layout()
    tables = _make_tables(layout)
    video = torch.randn(layout.num_video, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: unpool(pool(v, tables).square(), tables), (video,), fast_mode=True)


def test_branch_equals_attention_written_out_for_one_column() -> None:
    """Stage 0, three frames: no pooling, so the branch is attention over frames with space in the channels."""
    layout, branch = PackedLayout((column(0, 3, 1),), torch.device("cpu")), _loud()
    video = torch.randn(layout.num_video, 6)
    q, k, v = (linear(video).view(3, 6, 2, 4) for linear in (branch.to_q, branch.to_k, branch.to_v))  # t s n p
    expected = torch.zeros(3, 6, 2, 4)
    for head in range(2):
        for t in range(3):
            logits = torch.stack([(q[t, :, head] * k[u, :, head]).sum() for u in range(t + 1)]) / (4 * 6) ** 0.5
            weights = logits.softmax(dim=0)
            expected[t, :, head] = sum(weights[u] * v[u, :, head] for u in range(t + 1))
    torch.testing.assert_close(branch(video, layout), branch.to_out(expected.reshape(18, 8)))


def test_a_grid_that_cannot_be_pooled_is_refused_with_its_size() -> None:
    odd = ColumnShape(1, (FrameShape(6, 6, 2, 0),))
    with pytest.raises(ValueError, match="6 x 6 tokens at pyramid level 2"):
        _branch()(torch.randn(36, 6), PackedLayout((odd,), torch.device("cpu")))
