"""The unified block: FLUX's single block whose mixer is attention, MM-DiM, or both, plus the temporal branch.

A mixer is `mixer(text, video, layout) -> (text, video)`. With attention and no temporal branch the block is
PyramidFlow's single block; with `SsmTokenMixer` it is the paper's MM-DiM block, whose three branches are the feed-
forward, the re-composed scan, and the temporal branch.

Source: M4V paper, MM-DiM block; PyramidFlow flux_modules/modeling_flux_block.py at 3040d71 (single block).

Legend: `lt` `lv` text and video tokens, `l` both, `k` columns, `d` width.
"""

from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m4v_dist.blocks.attention import AttentionMixer
from m4v_dist.blocks.layout import PackedLayout
from m4v_dist.blocks.modulation import Modulation, gated, modulate
from m4v_dist.blocks.recompose import invert, recompose, recomposition_plan
from m4v_dist.blocks.ssm_mixer import build_ssm_mixer
from m4v_dist.blocks.temporal_branch import TemporalBranch
from m4v_dist.config.model_settings import BlockMixer, KernelSettings, ModelSettings

NUM_REGISTERS = 3
"""One register per pyramid level: quarter, half, full."""


class SsmTokenMixer(nn.Module):
    """Re-compose, scan, undo: the mixer of MM-DiM.

    Args:
        settings: width, SSM sizes, switches.
        kernels: which scan backend runs.
        path: zigzag path of this block, 0 .. 7.
    """

    def __init__(self, settings: ModelSettings, kernels: KernelSettings, path: int) -> None:
        super().__init__()
        self.path = path
        self.has_text_sandwich = settings.has_text_sandwich
        self.ssm = build_ssm_mixer(settings.hidden_size, settings.ssm, kernels)
        self.registers = (
            nn.Parameter(torch.empty(NUM_REGISTERS, settings.hidden_size)) if settings.has_registers else None
        )

    def initialize(self, generator: torch.Generator) -> None:
        """Registers from N(0, 0.02)."""
        if self.registers is not None:
            nn.init.normal_(self.registers, std=0.02, generator=generator)

    def forward(self, text: Tensor, video: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor]:
        """Text lt d and video lv d, modulated, to the same shapes."""
        plan = recomposition_plan(
            layout, self.path, has_text_sandwich=self.has_text_sandwich, has_registers=self.registers is not None
        )
        tokens = recompose(text, video, self.registers, plan)
        handover = None if plan.cut is None else plan.cut.handover
        return invert(self.ssm(tokens[None], cu_seqlens=plan.cu_seqlens, handover=handover)[0], plan)


class ParallelMixer(nn.Module):
    """Attention and MM-DiM side by side, summed ("Parallel" in the paper's ablation).

    Args:
        attention: the one.
        ssm: the other.
    """

    def __init__(self, attention: AttentionMixer, ssm: SsmTokenMixer) -> None:
        super().__init__()
        self.attention = attention
        self.ssm = ssm

    def forward(self, text: Tensor, video: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor]:
        """Text lt d and video lv d to the same shapes."""
        attended_text, attended_video = self.attention(text, video, layout)
        scanned_text, scanned_video = self.ssm(text, video, layout)
        return attended_text + scanned_text, attended_video + scanned_video


def build_mixer(kind: BlockMixer, settings: ModelSettings, kernels: KernelSettings, path: int) -> nn.Module:
    """Return the mixer of one block, whose zigzag path is `path`."""
    match kind:
        case "attention":
            return AttentionMixer(settings.hidden_size, settings.num_heads, settings.rope_axes)
        case "ssm":
            return SsmTokenMixer(settings, kernels, path)
        case "parallel":
            attention = AttentionMixer(settings.hidden_size, settings.num_heads, settings.rope_axes)
            return ParallelMixer(attention, SsmTokenMixer(settings, kernels, path))
        case _:
            assert_never(kind)


def zigzag_path(settings: ModelSettings, number: int) -> int:
    """Path of block `number`: the SSMs take the paths in turn, so a hybrid of every second block meets all of them."""
    return sum(kind != "attention" for kind in settings.block_mixers[:number]) % settings.num_zigzag_paths


class UnifiedBlock(nn.Module):
    """One residual block on the joint stream [text of all columns, video of all columns].

    Args:
        settings: widths and switches.
        kernels: which scan backend runs.
        number: index among the unified blocks; picks the mixer and the zigzag path.
    """

    def __init__(self, settings: ModelSettings, kernels: KernelSettings, number: int) -> None:
        super().__init__()
        width = settings.hidden_size
        self.modulation = Modulation(width, 3)
        kind = settings.block_mixers[number]
        self.mixer = build_mixer(kind, settings, kernels, zigzag_path(settings, number))
        # The branch belongs to MM-DiM: an attention block stays PyramidFlow's.
        has_branch = settings.has_temporal_branch and kind != "attention"
        self.temporal_branch = (
            TemporalBranch(width, settings.temporal_width, settings.temporal_heads) if has_branch else None
        )
        self.proj_mlp = nn.Linear(width, 4 * width)
        self.proj_out = nn.Linear(5 * width, width)

    def forward(self, tokens: Tensor, conditioning: Tensor, layout: PackedLayout) -> Tensor:
        """Run the block.

        Args:
            tokens: l d, float32, text then video.
            conditioning: k d, float32.
            layout: where the columns lie.

        Returns:
            l d, float32.
        """
        lengths = layout.text_lengths + layout.video_lengths
        shift, scale, gate = (torch.cat([chunk, chunk]) for chunk in self.modulation(conditioning))
        normed = modulate(tokens, shift, scale, lengths)
        text, video = normed.split([layout.num_text, layout.num_video])
        mixed_text, mixed_video = self.mixer(text, video, layout)
        if self.temporal_branch is not None:
            mixed_video = mixed_video + self.temporal_branch(video, layout)
        hidden = F.gelu(self.proj_mlp(normed), approximate="tanh")
        mixed = torch.cat([mixed_text, mixed_video]).to(hidden.dtype)
        return gated(tokens, self.proj_out(torch.cat([mixed, hidden], dim=-1)), gate, lengths)
