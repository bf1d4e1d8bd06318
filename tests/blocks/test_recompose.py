"""Re-composition: the paper's order, its exact inverse, gradients, and the padded form as the slow twin."""

from typing import Any

import pytest
import torch
from torch import Tensor

from m4v_dist.blocks.layout import ColumnShape, FrameShape, PackedLayout
from m4v_dist.blocks.recompose import invert, recompose, recompose_padded, recomposition_plan
from m4v_dist.blocks.ssm_mixer import build_ssm_mixer
from m4v_dist.blocks.zigzag import zigzag_order
from m4v_dist.config.model_settings import KernelSettings, ModelSettings
from m4v_dist.model.build import initialize_weights
from tests.blocks.layouts import mixed_layout


def _tokens(layout: PackedLayout, width: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(layout.num_text, width), torch.randn(layout.num_video, width), torch.randn(3, width)


def test_order_is_text_then_register_and_frame_old_to_new_then_text() -> None:
    frames = (FrameShape(1, 2, 0, 0), FrameShape(2, 2, 1, 1))
    layout = PackedLayout((ColumnShape(2, frames),), torch.device("cpu"))
    text, video = torch.tensor([[1.0], [2.0]]), torch.arange(10.0, 16.0)[:, None]
    registers = torch.tensor([[-1.0], [-2.0], [-3.0]])
    plan = recomposition_plan(layout, 0, has_text_sandwich=True, has_registers=True)
    out = recompose(text, video, registers, plan)[:, 0].tolist()
    assert out == [1, 2, -1, 10, 11, -2, 12, 13, 15, 14, 1, 2]
    assert plan.cu_seqlens.tolist() == [0, 12]


@pytest.mark.parametrize("path", range(8))
def test_invert_undoes_recompose_exactly(path: int) -> None:
    layout = mixed_layout()
    text, video, registers = _tokens(layout)
    for sandwich in (True, False):
        for has_registers in (True, False):
            plan = recomposition_plan(layout, path, has_text_sandwich=sandwich, has_registers=has_registers)
            out_text, out_video = invert(recompose(text, video, registers, plan), plan)
            assert torch.equal(out_text, 2 * text if sandwich else text)
            assert torch.equal(out_video, video)


def test_each_column_holds_its_own_tokens_only() -> None:
    layout = mixed_layout()
    text = torch.cat([torch.full((n, 1), float(k)) for k, n in enumerate(layout.text_lengths)])
    video = torch.cat([torch.full((n, 1), float(k)) for k, n in enumerate(layout.video_lengths)])
    plan = recomposition_plan(layout, 5, has_text_sandwich=True, has_registers=False)
    parts = recompose(text, video, None, plan).split(plan.cu_seqlens.diff().tolist())
    assert [part.unique().tolist() for part in parts] == [[0], [1], [2], [3]]


def test_a_frame_is_announced_by_the_register_of_its_level() -> None:
    layout = mixed_layout()
    text, video, _ = _tokens(layout, 1)
    registers = torch.tensor([[1000.0], [2000.0], [3000.0]])
    plan = recomposition_plan(layout, 0, has_text_sandwich=True, has_registers=True)
    out = recompose(text, video, registers, plan)[:, 0]
    levels = [frame.level for shape in layout.columns for frame in shape.frames]
    assert out[out >= 1000].tolist() == [1000.0 * (level + 1) for level in levels]


def test_gradients_are_the_adjoint_of_both_maps() -> None:
    layout = mixed_layout()
    inputs = tuple(part.double().requires_grad_() for part in _tokens(layout, 2))
    plan = recomposition_plan(layout, 2, has_text_sandwich=True, has_registers=True)

    def both(text: Tensor, video: Tensor, registers: Tensor) -> tuple[Tensor, ...]:
        tokens = recompose(text, video, registers, plan)
        return tokens, *invert(tokens.square(), plan)

    assert torch.autograd.gradcheck(both, inputs, fast_mode=True)


def test_tokens_of_another_layout_are_refused() -> None:
    layout = mixed_layout()
    text, video, registers = _tokens(layout)
    plan = recomposition_plan(layout, 0, has_text_sandwich=True, has_registers=True)
    with pytest.raises(ValueError, match=f"lv={layout.num_video - 1} video tokens"):
        recompose(text, video[1:], registers, plan)


def _mixer(ssm: dict[str, Any], width: int) -> torch.nn.Module:
    settings = ModelSettings(
        hidden_size=width, num_heads=2, rope_axes=(0, 2, 2), temporal_width=8, ssm={"chunk_size": 16, **ssm}
    )
    mixer = build_ssm_mixer(width, settings.ssm, KernelSettings())
    initialize_weights(mixer, seed=3)
    return mixer


@pytest.mark.parametrize("path", [0, 6])
@pytest.mark.parametrize("ssm", [{"head_dim": 4, "state_dim": 4}, {"variant": "mil"}, {"variant": "mamba1"}], ids=str)
def test_the_padded_form_of_the_paper_gives_the_same_outputs(ssm: dict[str, Any], path: int) -> None:
    """Pads before the first text copy never touch the state of the text, although biases, convolution and D do them."""
    width, padded_length = 8, 12
    mixer = _mixer(ssm, width)
    for name, parameter in mixer.named_parameters():
        if name.endswith("bias") and name != "dt_bias":
            torch.nn.init.normal_(parameter)
    layout = mixed_layout()
    text, video, registers = _tokens(layout, width)
    plan = recomposition_plan(layout, path, has_text_sandwich=True, has_registers=True)
    packed_text, packed_video = invert(
        mixer(recompose(text, video, registers, plan)[None], cu_seqlens=plan.cu_seqlens)[0], plan
    )
    texts, videos = [], []
    for shape, span in zip(layout.columns, layout.spans, strict=True):
        frames = [
            (video[first : first + frame.num_tokens], frame.height, frame.width)
            for frame, first in zip(shape.frames, span.frames, strict=True)
        ]
        tokens, cu_seqlens = recompose_padded(
            text[slice(*span.text)], frames, [registers[frame.level] for frame in shape.frames],
            path=path, padded_length=padded_length,
        )  # fmt: skip
        mixed = mixer(tokens[None], cu_seqlens=cu_seqlens)[0]
        left, middle, right = mixed.split([padded_length, len(mixed) - 2 * padded_length, padded_length])
        texts.append(left[padded_length - shape.num_text :] + right[: shape.num_text])
        for part, frame in zip(
            middle.split([1 + frame.num_tokens for frame in shape.frames]), shape.frames, strict=True
        ):
            out = torch.empty_like(part[1:])
            out[zigzag_order(frame.height, frame.width, path)] = part[1:]
            videos.append(out)
    torch.testing.assert_close(packed_text, torch.cat(texts), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed_video, torch.cat(videos), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ssm", [{"head_dim": 4, "state_dim": 4}, {"variant": "mil"}, {"variant": "mamba1"}], ids=str)
def test_what_modulation_makes_of_the_pads_moves_nothing_and_zeroing_them_after_it_is_the_same(
    ssm: dict[str, Any],
) -> None:
    """The trap of the padded form: adaLN's shift makes pads non-zero, and junk in front of the text would feed it."""
    width, padded_length, num_text = 8, 12, 5
    mixer, text, frame = _mixer(ssm, width), torch.randn(num_text, width), torch.randn(6, width)
    shift, scale = torch.randn(width), torch.randn(width)
    tokens, cu_seqlens = recompose_padded(
        text, [(frame, 2, 3)], [torch.randn(width)], path=0, padded_length=padded_length
    )
    is_pad = torch.zeros(len(tokens), dtype=torch.bool)
    is_pad[: padded_length - num_text] = is_pad[len(tokens) - padded_length + num_text :] = True
    shifted = torch.nn.functional.layer_norm(tokens, (width,)) * (1 + scale) + shift
    assert shifted[is_pad].any()
    junk = torch.where(is_pad[:, None], 100 * torch.randn_like(shifted), shifted)
    zeroed = shifted.masked_fill(is_pad[:, None], 0)
    packed = shifted[~is_pad]
    of_shifted, of_junk, of_zeroed = (
        mixer(sequence[None], cu_seqlens=cu_seqlens)[0][~is_pad] for sequence in (shifted, junk, zeroed)
    )
    assert torch.equal(of_junk, of_shifted) and torch.equal(of_zeroed, of_shifted)
    alone = mixer(packed[None], cu_seqlens=torch.tensor([0, len(packed)], dtype=torch.int32))[0]
    torch.testing.assert_close(alone, of_shifted, rtol=1e-5, atol=1e-6)
    # Without the border at the first text token the pads do move it: what the border is for.
    no_border = torch.tensor([0, len(tokens)], dtype=torch.int32)
    assert not torch.equal(
        mixer(junk[None], cu_seqlens=no_border)[0][~is_pad], mixer(zeroed[None], cu_seqlens=no_border)[0][~is_pad]
    )
