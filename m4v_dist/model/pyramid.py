"""The pyramid backbone: PyramidFlow's miniFLUX, or M4V when the unified blocks mix with MM-DiM.

Patches and text of all columns are packed without padding, pass the MM-DiT blocks as two streams and the unified
blocks as one, and each column's noisy frames are read out as a velocity. Knows no sigma and no loss.

With sequence ranks (`parallel/sequence.py`) every rank is given the same columns, embeds and mixes its own tokens, and
gets all velocities, so that its loss is the same number as on one rank; gradients add up over the ranks. Conditioning
is computed on each of them. `blocks/cut.py` says who holds what.

Source: M4V paper; PyramidFlow flux_modules/modeling_pyramid_flux.py at 3040d71.

Legend: `c` latent channels, `t` `h` `w` latent frames and grid, `lt` `lv` text and video tokens, `l` both, `k`
columns, `d` width.
"""

import torch
from torch import Tensor, nn

from m4v_dist.batch import Column, ModelInput
from m4v_dist.blocks.embed import ConditioningEmbedding, patchify, rope_table, unpatchify
from m4v_dist.blocks.layout import ColumnShape, FrameShape, packed_layout
from m4v_dist.blocks.mm_dim import NUM_REGISTERS, UnifiedBlock
from m4v_dist.blocks.mm_dit import DoubleBlock
from m4v_dist.blocks.modulation import Modulation, modulate
from m4v_dist.blocks.recompute import run_block
from m4v_dist.config.model_settings import KernelSettings, ModelSettings
from m4v_dist.parallel.mesh import ALONE, SequenceGroup
from m4v_dist.parallel.sequence import share_rows

MAX_TIMESTEP = 1000


class VelocityOut(nn.Linear):
    """The output layer; starts at zero, so that the first prediction is zero."""

    def initialize(self, generator: torch.Generator) -> None:
        """Zero weight and bias."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class PyramidModel(nn.Module):
    """Columns of history and noisy latents to velocities.

    Args:
        settings: sizes and switches.
        kernels: which scan backend runs.
        sequence: the ranks that cut the columns among them.
    """

    def __init__(self, settings: ModelSettings, kernels: KernelSettings, sequence: SequenceGroup = ALONE) -> None:
        super().__init__()
        self.settings, self.sequence = settings, sequence
        width = settings.hidden_size
        patch_width = settings.latent_channels * settings.patch_size**2
        self.conditioning = ConditioningEmbedding(width, settings.pooled_width)
        self.text_in = nn.Linear(settings.text_width, width)
        self.video_in = nn.Linear(patch_width, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(settings) for _ in range(settings.num_double_blocks))
        self.single_blocks = nn.ModuleList(
            UnifiedBlock(settings, kernels, number) for number in range(settings.num_single_blocks)
        )
        self.modulation_out = Modulation(width, 2)
        self.video_out = VelocityOut(width, patch_width)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in the order that tokens pass them; each uses all its parameters in every forward."""
        return [*self.double_blocks, *self.single_blocks]

    def forward(self, model_input: ModelInput) -> list[Tensor]:
        """Predict the velocity of each column's last clip.

        Args:
            model_input: columns of clips (old to new, the last noisy), text and timestep; the same on all sequence
                ranks (collective among them).

        Returns:
            One tensor per column, c t h w as its last clip, float32.

        Raises:
            ValueError: widths, grids, levels or a timestep that do not fit the model, with the column's number.
        """
        columns, device = model_input.columns, self.video_in.weight.device
        patch = self.settings.patch_size
        shapes = tuple(column_shape(column, self.settings, number) for number, column in enumerate(columns))
        layout = packed_layout(shapes, device, self.sequence)
        conditioning = self._condition(columns, device)
        features = torch.cat([column.text.tokens.to(device, torch.float32) for column in columns])
        text = self.text_in(layout.own(features, layout.text_by_rank)).float()
        patches = [patchify(clip.to(device, torch.float32), patch) for column in columns for clip in column.clips]
        video = self.video_in(layout.own(torch.cat(patches), layout.video_by_rank)).float()
        rotary = rope_table(layout, self.settings.rope_axes)
        if torch.is_grad_enabled() and not video.requires_grad:
            # With frozen embedders. ZeRO 3 takes the gradients of a block once its inputs have theirs; were there none
            # to wait for, it would take them before they are made.
            text, video = text.requires_grad_(), video.requires_grad_()
        for number, block in enumerate(self.double_blocks):
            recompute = self.settings.recompute_of(number, len(self.double_blocks))
            text, video = run_block(block, recompute, text, video, conditioning, rotary, layout)
        tokens = torch.cat([text, video])  # l d
        for number, block in enumerate(self.single_blocks):
            recompute = self.settings.recompute_of(number, len(self.single_blocks))
            tokens = run_block(block, recompute, tokens, conditioning, layout)
        noisy = tokens[layout.num_text :].index_select(0, layout.noisy)
        scale, shift = self.modulation_out(conditioning)
        velocities = self.video_out(modulate(noisy, shift, scale, layout.noisy_lengths)).float()
        if self.sequence.size > 1:
            velocities = share_rows(velocities, layout.noisy_by_rank, self.sequence)
        return [
            unpatchify(part, clip.shape[1], clip.shape[2] // patch, clip.shape[3] // patch, patch)
            for part, clip in zip(
                velocities.split(layout.whole.noisy_lengths), (column.clips[-1] for column in columns), strict=True
            )
        ]

    def _condition(self, columns: tuple[Column, ...], device: torch.device) -> Tensor:
        """Timestep and pooled text of all columns: k d, float32."""
        timestep = torch.stack([column.timestep.to(device, torch.float32).reshape(()) for column in columns])
        pooled = torch.stack([column.text.pooled.to(device, torch.float32) for column in columns])
        return self.conditioning(timestep, pooled)


def column_shape(column: Column, settings: ModelSettings, number: int = 0) -> ColumnShape:
    """Shapes of a column in tokens; time runs over all latents, history first.

    Args:
        column: its tensors may be on any device; only shapes, and a timestep on the CPU, are read.
        settings: of the model.
        number: of the column, for messages.

    Raises:
        ValueError: the column does not fit the model, or itself.
    """
    where = f"model: column {number}"
    _check_text(column, settings, where)
    _check_timestep(column.timestep, where)
    _check_clips(column, settings, where)
    patch_size = settings.patch_size
    frames: list[FrameShape] = []
    for clip, level in zip(column.clips, column.levels, strict=True):
        height, width = clip.shape[2] // patch_size, clip.shape[3] // patch_size
        for _ in range(clip.shape[1]):
            frames.append(FrameShape(height, width, level, len(frames)))
    return ColumnShape(
        column.text.tokens.shape[0], tuple(frames), column.clips[-1].shape[1], settings.has_temporal_mask
    )


def _check_text(column: Column, settings: ModelSettings, where: str) -> None:
    tokens, pooled = column.text.tokens, column.text.pooled
    if tokens.ndim != 2 or pooled.ndim != 1:
        raise ValueError(
            f"{where}: text must be tokens n d and pooled p, but has shapes {tuple(tokens.shape)} and "
            f"{tuple(pooled.shape)}."
        )
    for name, key, width, wanted in (
        ("tokens", "text_width", tokens.shape[1], settings.text_width),
        ("pooled text", "pooled_width", pooled.shape[0], settings.pooled_width),
    ):
        if width != wanted:
            raise ValueError(
                f"{where}: the {name} has width {width}, but model.{key}={wanted}; set model.{key}={width}, or take "
                "the text encoder that the model is made for."
            )


def _check_timestep(timestep: Tensor, where: str) -> None:
    if timestep.numel() != 1:
        raise ValueError(
            f"{where}: the timestep has shape {tuple(timestep.shape)}; give one number, the same for the whole column."
        )
    # On a GPU the value stays unread: to read it would make the host wait for the device.
    # A table of float32 may pass 1000 by its rounding.
    if timestep.device.type == "cpu" and not 0 <= (value := float(timestep)) <= MAX_TIMESTEP + 1e-2:
        raise ValueError(
            f"{where}: the timestep is {value:g}; give one in 0..{MAX_TIMESTEP}, where {MAX_TIMESTEP} is pure noise."
        )


def _check_clips(column: Column, settings: ModelSettings, where: str) -> None:
    noisy, noisy_level, patch = column.clips[-1], column.levels[-1], settings.patch_size
    for number, (clip, level) in enumerate(zip(column.clips, column.levels, strict=True)):
        channels, num_frames, height, width = clip.shape
        if channels != settings.latent_channels:
            raise ValueError(
                f"{where}: clip {number} has {channels} channels, but model.latent_channels="
                f"{settings.latent_channels}; set model.latent_channels={channels}, or take the codec that the model "
                "is made for."
            )
        if not num_frames or not height or not width or height % patch or width % patch:
            raise ValueError(
                f"{where}: clip {number} has {num_frames} frames of {height} x {width} latents; give at least one, and "
                f"sides that are multiples of model.patch_size={patch}."
            )
        if not 0 <= level < NUM_REGISTERS:
            raise ValueError(
                f"{where}: clip {number} has level {level}; levels are 0..{NUM_REGISTERS - 1}, 0 the coarsest."
            )
    # Only now: a grid is compared with a noisy one that is good in itself.
    for number, (clip, level) in enumerate(zip(column.clips, column.levels, strict=True)):
        height, width = clip.shape[2:]
        # Both grids on the finer one's scale: exact, without a division that might not be even.
        finer, coarser = max(0, noisy_level - level), max(0, level - noisy_level)
        if (height << finer, width << finer) != (noisy.shape[2] << coarser, noisy.shape[3] << coarser):
            raise ValueError(
                f"{where}: clip {number} has a grid of {height} x {width} at level {level}, but the noisy clip "
                f"{noisy.shape[2]} x {noisy.shape[3]} at level {noisy_level}; a level halves both sides of the one "
                "above it, so mend the levels or resize the clip."
            )
