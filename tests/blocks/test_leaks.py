"""What may move what in one mixer: no column another, no later frame an earlier one, the second text copy anything.

"Not" means a difference of exactly 0, and NaN and infinity stay in their column too.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m4v_dist.blocks.layout import PackedLayout
from m4v_dist.blocks.mm_dim import build_mixer
from m4v_dist.config.model_settings import KernelSettings, ModelSettings
from m4v_dist.model.build import initialize_weights
from tests.blocks.layouts import column, mixed_layout

WIDTH = 32
SIZES: dict[str, dict[str, Any]] = {
    "mamba2": {"head_dim": 8, "state_dim": 8},
    "mil": {"variant": "mil"},
    "mamba1": {"variant": "mamba1", "state_dim": 4},
}
CASES = [("ssm", variant) for variant in SIZES] + [("parallel", "mamba2"), ("attention", "mamba2")]


def _mixer(kind: Any, variant: str, **switches: Any) -> nn.Module:
    settings = ModelSettings(
        hidden_size=WIDTH, num_heads=4, rope_axes=(4, 2, 2), temporal_width=8,
        ssm={"chunk_size": 16, **SIZES[variant]}, **switches,
    )  # fmt: skip
    mixer = build_mixer(kind, settings, KernelSettings(), 3)
    initialize_weights(mixer, seed=0)
    for name, parameter in mixer.named_parameters():
        if "bias" in name and "dt" not in name:
            torch.nn.init.normal_(parameter)
    return mixer


def _tokens(layout: PackedLayout) -> tuple[Tensor, Tensor]:
    return torch.randn(layout.num_text, WIDTH), torch.randn(layout.num_video, WIDTH)


def _moved(before: Tensor, after: Tensor) -> Tensor:
    return (before != after).any(dim=-1)


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_no_column_moves_another_by_a_single_bit(kind: str, variant: str) -> None:
    layout, mixer = mixed_layout(), _mixer(kind, variant)
    text, video = _tokens(layout)
    before = mixer(text, video, layout)
    for span in layout.spans:
        changed_text, changed_video = text.clone(), video.clone()
        changed_text[slice(*span.text)] *= -3
        changed_video[slice(*span.video)] *= -3
        after = mixer(changed_text, changed_video, layout)
        for part, mine in ((0, span.text), (1, span.video)):
            moved = _moved(before[part], after[part])
            assert moved[slice(*mine)].all()
            assert moved.sum() == mine[1] - mine[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_nan_and_overflow_stay_in_their_column_forward_and_backward(kind: str, variant: str, bad: float) -> None:
    layout, mixer = mixed_layout(), _mixer(kind, variant)
    text, video = _tokens(layout)
    span = layout.spans[1]

    def run(spoil: float | None) -> list[Tensor]:
        """Outputs and input gradients of all tokens that are not the column's."""
        inputs = [tokens.clone() for tokens in (text, video)]
        if spoil is not None:
            inputs[0][span.text[0]] = inputs[1][span.video[0]] = spoil
        inputs = [tokens.requires_grad_() for tokens in inputs]
        outputs = mixer(*inputs, layout)
        sum(output.square().sum() for output in outputs).backward()
        kept = []
        for tensors in (outputs, [tokens.grad for tokens in inputs]):
            for tokens, mine in zip(tensors, (span.text, span.video), strict=True):
                kept.append(torch.cat([tokens[: mine[0]], tokens[mine[1] :]]))
        return kept

    for clean, spoilt in zip(run(None), run(bad), strict=True):
        assert torch.equal(clean, spoilt)


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_no_column_pulls_a_gradient_from_another(kind: str, variant: str) -> None:
    layout, mixer = mixed_layout(), _mixer(kind, variant)
    text, video = (tokens.requires_grad_() for tokens in _tokens(layout))
    out_text, out_video = mixer(text, video, layout)
    span = layout.spans[1]
    (out_text[slice(*span.text)].square().sum() + out_video[slice(*span.video)].square().sum()).backward()
    for tokens, mine in ((text, span.text), (video, span.video)):
        assert tokens.grad is not None
        has_grad = (tokens.grad != 0).any(dim=-1)
        assert has_grad[slice(*mine)].all() and has_grad.sum() == mine[1] - mine[0]


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_a_frame_moves_itself_and_later_ones_and_the_text_only_by_its_second_copy(kind: str, variant: str) -> None:
    layout = PackedLayout((column(2, 4, 5), column(1, 2, 3)), torch.device("cpu"))
    for has_sandwich in (True, False):
        mixer = _mixer(kind, variant, has_text_sandwich=has_sandwich)
        text, video = _tokens(layout)
        before = mixer(text, video, layout)
        span = layout.spans[0]
        for number, first in enumerate(span.frames[1:], start=1):
            changed = video.clone()
            changed[first : [*span.frames, span.video[1]][number + 1]] *= -3
            after = mixer(text, changed, layout)
            moved = _moved(before[1], after[1])
            assert not moved[:first].any() and not moved[span.video[1] :].any()
            assert moved[first : span.video[1]].all()
            # Attention lets text read frame 0 only, so of the mixers it is the scan that moves text.
            assert _moved(before[0], after[0]).sum() == (5 if has_sandwich and kind != "attention" else 0)
