"""The MM-DiT block: separate weights for text and video, joint attention, then separate feed-forwards.

Source: PyramidFlow flux_modules/modeling_flux_block.py (FluxTransformerBlock) at 3040d71.

Legend: `lt` `lv` text and video tokens, `k` columns, `d` width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from m4v_dist.blocks.attention import QueryKeyValue, Rotary, joint_attention
from m4v_dist.blocks.layout import PackedLayout
from m4v_dist.blocks.modulation import Modulation, gated, modulate
from m4v_dist.config.model_settings import ModelSettings


class _Stream(nn.Module):
    """Weights of one stream of a double block.

    Args:
        width: d.
        num_heads: attention heads.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.modulation = Modulation(width, 6)
        self.qkv = QueryKeyValue(width, num_heads)
        self.to_out = nn.Linear(width, width)
        self.ff_in = nn.Linear(width, 4 * width)
        self.ff_out = nn.Linear(4 * width, width)

    def queries(
        self, tokens: Tensor, chunks: tuple[Tensor, ...], rotary: Rotary | None, lengths: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Modulated tokens to queries, keys, values."""
        return self.qkv(modulate(tokens, chunks[0], chunks[1], lengths), rotary)

    def finish(self, tokens: Tensor, attended: Tensor, chunks: tuple[Tensor, ...], lengths: list[int]) -> Tensor:
        """Add the gated attention and the gated feed-forward."""
        _, _, attention_gate, shift, scale, gate = chunks
        tokens = gated(tokens, self.to_out(attended), attention_gate, lengths)
        hidden = F.gelu(self.ff_in(modulate(tokens, shift, scale, lengths)), approximate="tanh")
        return gated(tokens, self.ff_out(hidden), gate, lengths)


class DoubleBlock(nn.Module):
    """MM-DiT block.

    Args:
        settings: width, heads, rotary axes.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.text = _Stream(settings.hidden_size, settings.num_heads)
        self.video = _Stream(settings.hidden_size, settings.num_heads)

    def forward(
        self, text: Tensor, video: Tensor, conditioning: Tensor, rotary: Rotary, layout: PackedLayout
    ) -> tuple[Tensor, Tensor]:
        """One residual block.

        Args:
            text: lt d, float32.
            video: lv d, float32.
            conditioning: k d, float32.
            rotary: cosines and sines of the video tokens.
            layout: where the columns lie.

        Returns:
            text: lt d; video: lv d, float32.
        """
        text_chunks, video_chunks = self.text.modulation(conditioning), self.video.modulation(conditioning)
        attended_text, attended_video = joint_attention(
            self.text.queries(text, text_chunks, None, layout.text_lengths),
            self.video.queries(video, video_chunks, rotary, layout.video_lengths),
            layout,
        )
        text = self.text.finish(text, attended_text, text_chunks, layout.text_lengths)
        video = self.video.finish(video, attended_video, video_chunks, layout.video_lengths)
        return text, video
