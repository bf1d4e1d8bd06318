"""The unified block: paths by number, switches, and which branch each mixer gets."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from m4v_dist.blocks.attention import AttentionMixer
from m4v_dist.blocks.layout import PackedLayout
from m4v_dist.blocks.mm_dim import ParallelMixer, SsmTokenMixer, UnifiedBlock, build_mixer
from m4v_dist.config.model_settings import KernelSettings, ModelSettings
from m4v_dist.model.build import initialize_weights
from tests.blocks.layouts import mixed_layout

KERNELS = KernelSettings()


def _settings(**options: Any) -> ModelSettings:
    return ModelSettings(
        hidden_size=16, num_heads=2, rope_axes=(4, 2, 2), temporal_width=8,
        ssm={"expand": 2, "head_dim": 4, "state_dim": 4, "chunk_size": 16}, **options,
    )  # fmt: skip


def test_block_number_l_takes_path_l_modulo_the_number_of_paths() -> None:
    def paths(count: Any) -> list[int]:
        settings = _settings(num_zigzag_paths=count, num_single_blocks=16)
        blocks = [UnifiedBlock(settings, KERNELS, number) for number in range(16)]
        return [block.mixer.path for block in blocks]  # type: ignore[union-attr, misc]

    assert paths(8) == [*range(8), *range(8)]
    assert paths(1) == [0] * 16


@pytest.mark.parametrize("mixer", ["post_half", "pre_half", "interleaved"])
def test_in_a_hybrid_the_ssms_take_all_paths_and_attention_blocks_have_no_branch(mixer: str) -> None:
    settings = _settings(mixer=mixer, num_single_blocks=16)
    blocks = [UnifiedBlock(settings, KERNELS, number) for number in range(16)]
    scans = [block.mixer for block in blocks if isinstance(block.mixer, SsmTokenMixer)]
    assert [scan.path for scan in scans] == list(range(8))
    for block, kind in zip(blocks, settings.block_mixers, strict=True):
        assert isinstance(block.mixer, SsmTokenMixer if kind == "ssm" else AttentionMixer)
        assert (block.temporal_branch is not None) == (kind == "ssm")


@pytest.mark.parametrize(
    ("mixer", "kind", "has_branch"),
    [("attention", AttentionMixer, False), ("ssm", SsmTokenMixer, True), ("parallel", ParallelMixer, True)],
)
def test_the_mixer_is_the_one_that_the_settings_name(mixer: str, kind: type, has_branch: bool) -> None:
    block = UnifiedBlock(_settings(mixer=mixer), KERNELS, 0)
    assert isinstance(block.mixer, kind)
    assert (block.temporal_branch is not None) == has_branch
    without = UnifiedBlock(_settings(mixer=mixer, has_temporal_branch=False), KERNELS, 0)
    assert without.temporal_branch is None


@pytest.mark.parametrize("variant", ["mamba2", "mil", "mamba1"])
def test_a_scan_asks_the_device_for_no_number(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would make the host wait for the GPU, in every block; the meta device has none to give."""
    # Which knows no autocast.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    settings = ModelSettings.model_validate({**_settings().model_dump(exclude={"ssm"}), "ssm": {"variant": variant}})
    device, cpu = torch.device("meta"), mixed_layout()
    layout = PackedLayout(cpu.columns, device)
    mixer = build_mixer("ssm", settings, KERNELS, 3).to(device)
    text, video = (torch.empty(n, 16, device=device, requires_grad=True) for n in (layout.num_text, layout.num_video))
    out_text, out_video = mixer(text, video, layout)
    (out_text.sum() + out_video.sum()).backward()
    assert out_video.device.type == "meta" and out_video.shape == video.shape == video.grad.shape  # type: ignore[union-attr]


def test_parallel_is_the_sum_of_both_mixers() -> None:
    layout = mixed_layout()
    mixer = build_mixer("parallel", _settings(), KERNELS, 3)
    initialize_weights(mixer, seed=0)
    assert isinstance(mixer, ParallelMixer)
    text, video = torch.randn(layout.num_text, 16), torch.randn(layout.num_video, 16)
    both, one, other = (part(text, video, layout) for part in (mixer, mixer.attention, mixer.ssm))
    for number in (0, 1):
        torch.testing.assert_close(both[number], one[number] + other[number])


def test_the_second_text_copy_reads_the_frames_and_the_first_does_not() -> None:
    layout = mixed_layout()
    for has_sandwich in (True, False):
        mixer = build_mixer("ssm", _settings(has_text_sandwich=has_sandwich), KERNELS, 0)
        initialize_weights(mixer, seed=0)
        text, video = torch.randn(layout.num_text, 16), torch.randn(layout.num_video, 16)
        moved = (mixer(text, video + 1, layout)[0] - mixer(text, video, layout)[0]).abs().max() > 0
        assert bool(moved) == has_sandwich


def test_a_fresh_block_is_the_identity() -> None:
    layout, block = mixed_layout(), UnifiedBlock(_settings(), KERNELS, 0)
    initialize_weights(block, seed=0)
    tokens = torch.randn(layout.num_text + layout.num_video, 16)
    assert torch.equal(block(tokens, torch.randn(4, 16), layout), tokens)
