"""What moves what in the whole model, to the last bit: nothing between columns, and inside one what the paper implies.

In a column, the double blocks and every single mixer are causal in time. M4V as a whole is not: the second text copy
has read all frames, its sum with the first is the next block's text, and that stands in front of the oldest frame. So
from the second MM-DiM block on, history moves with the newest frame. Only the newest frame is predicted, so no
prediction reads its own future; but history cannot be kept from one unit to the next, as attention's could.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m4v_dist.batch import Column, ModelInput, TextFeatures
from tests.model.test_pyramid import TINY, VARIANTS, _column, _columns, _perturbed


def _other(column: Column) -> Column:
    """Another column of the same shapes."""
    text = TextFeatures(-3 * column.text.tokens, -3 * column.text.pooled)
    return replace(column, clips=tuple(-3 * clip for clip in column.clips), text=text, timestep=column.timestep + 50)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_column_moves_another_by_a_single_bit(variant: str) -> None:
    model = _perturbed(TINY.model_copy(update=VARIANTS[variant]))
    columns = _columns()
    with torch.no_grad():
        before = model(ModelInput(columns))
        for number, column in enumerate(columns):
            after = model(ModelInput((*columns[:number], _other(column), *columns[number + 1 :])))
            moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
            assert moved == [other == number for other in range(len(columns))]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_column_that_is_not_finite_spoils_no_other_velocity(variant: str, bad: float) -> None:
    model = _perturbed(TINY.model_copy(update=VARIANTS[variant]))
    columns = _columns()
    spoilt = replace(columns[1], clips=(*columns[1].clips[:-1], torch.full_like(columns[1].clips[-1], bad)))
    with torch.no_grad():
        before = model(ModelInput(columns))
        after = model(ModelInput((columns[0], spoilt, *columns[2:])))
    same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert same == [number != 1 for number in range(len(columns))]


def _tokens_after_blocks(model: nn.Module, column: Column) -> list[tuple[Tensor, Tensor]]:
    """Text and video tokens after the double blocks, then after each unified block."""
    num_text = column.text.tokens.shape[0]
    seen: list[tuple[Tensor, Tensor]] = []

    def note(tokens: Tensor) -> None:
        seen.append((tokens[:num_text], tokens[num_text:]))

    handles = [block.register_forward_hook(lambda _m, _i, out: note(out)) for block in model.single_blocks]  # type: ignore[union-attr]
    handles.append(model.single_blocks[0].register_forward_pre_hook(lambda _m, inputs: note(inputs[0])))  # type: ignore[index, union-attr]
    with torch.no_grad():
        model(ModelInput((column,)))
    for handle in handles:
        handle.remove()
    return seen


def _moved_by_the_newest_frame(variant: str) -> list[tuple[bool, bool]]:
    """Whether the text, and whether history, moves after the double blocks and after each unified block."""
    model = _perturbed(TINY.model_copy(update=VARIANTS[variant]))
    column = _column(1, 2, 4, 5)
    changed = replace(column, clips=(*column.clips[:-1], -3 * column.clips[-1]))
    num_history = sum(clip[0].numel() // TINY.patch_size**2 for clip in column.clips[:-1])
    moved = []
    for (text, video), (text_after, video_after) in zip(
        _tokens_after_blocks(model, column), _tokens_after_blocks(model, changed), strict=True
    ):
        assert not torch.equal(video[num_history:], video_after[num_history:])
        history_moved = not torch.equal(video[:num_history], video_after[:num_history])
        moved.append((not torch.equal(text, text_after), history_moved))
    return moved


@pytest.mark.parametrize("variant", ["ssm", "mil", "mamba1", "parallel", "no_registers", "no_temporal_branch"])
def test_the_newest_frame_moves_text_after_one_block_and_history_after_two(variant: str) -> None:
    assert _moved_by_the_newest_frame(variant) == [(False, False), (True, False), (True, True)]


@pytest.mark.parametrize("variant", ["no_sandwich", "attention"])
def test_without_a_second_text_copy_the_newest_frame_moves_only_itself(variant: str) -> None:
    assert _moved_by_the_newest_frame(variant) == [(False, False)] * 3


def test_in_a_hybrid_attention_passes_the_moved_text_on_to_history() -> None:
    """pre_half: the SSM block moves the text, and the attention block after it shows history that text."""
    assert _moved_by_the_newest_frame("pre_half") == [(False, False), (True, False), (True, True)]
    assert _moved_by_the_newest_frame("post_half") == [(False, False), (False, False), (True, False)]


@pytest.mark.parametrize("variant", ["ssm", "mil", "mamba1", "attention"])
def test_in_a_noisy_clip_of_two_frames_the_earlier_prediction_follows_text_alone(variant: str) -> None:
    """Full-sequence clips: the earlier velocity moves with the later frame exactly where the text carries it."""
    first, last = _column(1, 1, 2, 5).clips[-1], _column(2, 1, 2, 5).clips[-1]
    results: dict[bool, Any] = {}
    for has_sandwich in (True, False):
        update = {**VARIANTS[variant], "has_text_sandwich": has_sandwich}
        model = _perturbed(TINY.model_copy(update=update))
        velocities = []
        for scale in (1, -3):
            clip = torch.cat([first, scale * last], dim=1)
            column = replace(_column(1, 1, 1, 5), clips=(clip,))
            with torch.no_grad():
                velocities.append(model(ModelInput((column,)))[0])
        results[has_sandwich] = not torch.equal(velocities[0][:, 0], velocities[1][:, 0])
        assert not torch.equal(velocities[0][:, 1], velocities[1][:, 1])
    assert results == {True: variant != "attention", False: False}
