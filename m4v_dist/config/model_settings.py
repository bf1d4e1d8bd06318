"""What the model is: sizes, the mixer of each unified block, the SSM, the scan backend."""

from typing import Any, Literal, assert_never

from pydantic import Field, model_validator

from m4v_dist.config.presets import fill_model
from m4v_dist.config.settings import Fraction, PositiveInt, Settings

BlockMixer = Literal["attention", "ssm", "parallel"]
"""What one unified block mixes with."""
Ablation = Literal[
    "full_attention", "parallel", "full_mamba", "full_mamba_temporal",
    "no_components", "text", "vision", "text_vision", "text_vision_temporal",
    "post_half", "pre_half", "interleaved",
]  # fmt: skip
"""The rows of `presets.ABLATIONS`."""


class KernelSettings(Settings):
    """Which scan backend runs; nothing falls back in silence."""

    backend: Literal["reference", "reference_chunked", "triton", "mamba_ssm"] = Field(
        default="reference_chunked", description="reference: the token loop; reference_chunked: its chunked form."
    )


class SsmSettings(Settings):
    """The state-space mixer of a unified block (M4V paper, section 3.2)."""

    variant: Literal["mamba2", "mil", "mamba1"] = Field(
        default="mamba2",
        description="mamba2: one decay per head; mil: attention's weights and heads; mamba1: decays per channel. "
        "In a model the variant alone fills in its sizes.",
    )
    expand: PositiveInt = Field(default=2, description="Inner width over hidden width.")
    head_dim: PositiveInt = Field(default=64, description="Width p of one head; 1 for mamba1.")
    state_dim: PositiveInt = Field(default=128, description="State size n of one head.")
    num_groups: PositiveInt = Field(default=1, description="Groups that share B and C; mil has one per head.")
    dt_rank: int = Field(default=0, ge=0, description="Rank of mamba1's step sizes; 0 for the others, which have none.")
    conv_width: int = Field(default=4, ge=2, le=4, description="Taps of the causal depthwise convolution.")
    chunk_size: PositiveInt = Field(default=256, description="Tokens of one chunk of the scan.")
    gate: Literal["silu", "sum"] = Field(default="silu", description="How the FC branch z joins the scan's output.")


class LoraSettings(Settings):
    """Low-rank adapters beside the blocks' linears; the stages freeze the base."""

    rank: int = Field(default=0, ge=0, le=1024, description="Rank of an adapter; 0: there are none.")
    alpha: float = Field(default=16.0, gt=0, description="Scale of an adapter's output, over its rank.")
    targets: tuple[Literal["attention", "ssm", "feed_forward"], ...] = Field(
        default=("attention", "ssm", "feed_forward"), min_length=1, description="Which linears of a block have one."
    )


class ModelSettings(Settings):
    """The pyramid backbone; `preset`, `ablation` and `ssm.variant` fill in what the file leaves out (`presets.py`)."""

    preset: Literal["tiny", "small", "m4v_2b"] = Field(default="tiny", description="Named sizes; keys here override.")
    hidden_size: PositiveInt = Field(description="Width d of the residual stream.")
    num_heads: PositiveInt = Field(description="Attention heads; hidden_size / num_heads is the head width.")
    num_double_blocks: int = Field(ge=0, description="MM-DiT blocks with separate text and video weights.")
    num_single_blocks: int = Field(ge=0, description="Unified blocks: MM-DiM, or attention.")
    text_width: PositiveInt = Field(description="Width of the text encoder's tokens.")
    pooled_width: PositiveInt = Field(description="Width of the pooled text vector.")
    latent_channels: PositiveInt = Field(default=16, description="Channels of the codec's latents.")
    patch_size: PositiveInt = Field(default=2, description="Side of a square patch, in latents.")
    rope_axes: tuple[int, int, int] = Field(default=(16, 24, 24), description="Rotary width of t, h, w in a head.")
    has_temporal_mask: bool = Field(
        default=True, description="Attention reads no later frame; false is PyramidFlow's full-sequence training."
    )
    ablation: Ablation | None = Field(
        default=None,
        description="A row of the paper's ablations: sets mixer and switches; keys that contradict it are refused.",
    )
    mixer: Literal["attention", "ssm", "parallel", "post_half", "pre_half", "interleaved"] = Field(
        default="ssm",
        description="Mixer of the unified blocks; post_half and pre_half: ssm in the later or earlier half, "
        "interleaved: in every second block, and attention in the others.",
    )
    ssm: SsmSettings = Field(default=SsmSettings(), description="The SSM mixer.")
    has_text_sandwich: bool = Field(default=True, description="Text before and after the frames, then summed.")
    has_registers: bool = Field(default=True, description="One learnable token in front of each frame.")
    num_zigzag_paths: Literal[1, 8] = Field(default=8, description="Scan paths that the blocks take in turn.")
    has_temporal_branch: bool = Field(
        default=True, description="The light causal attention over frames beside an SSM; attention blocks have none."
    )
    temporal_width: PositiveInt = Field(description="Width of the temporal branch.")
    temporal_heads: PositiveInt = Field(description="Heads of the temporal branch.")
    lora: LoraSettings = Field(default=LoraSettings(), description="Adapters on a frozen base.")
    recompute: Literal["none", "blocks", "selective"] = Field(
        default="none",
        description="What a block computes again in backward, to save memory: nothing; all; or all but linears, fused "
        "attention and scan kernels.",
    )
    recompute_fraction: Fraction = Field(
        default=1.0, description="Share of the blocks of each kind, from the first, that recompute (PyramidFlow: 0.75)."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        return fill_model(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _widths_fit(self) -> "ModelSettings":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is no multiple of num_heads={self.num_heads}")
        if sum(self.rope_axes) != self.head_dim:
            total = sum(self.rope_axes)
            fits = total > 0 and self.hidden_size % total == 0
            heads = f"num_heads={self.hidden_size // total}, or " if fits else ""
            raise ValueError(
                f"hidden_size / num_heads = {self.hidden_size} / {self.num_heads} = {self.head_dim}, but "
                f"rope_axes={self.rope_axes} sum to {total}: set {heads}rope_axes that sum to {self.head_dim}"
            )
        if any(width < 0 or width % 2 for width in self.rope_axes):
            raise ValueError(
                f"rope_axes={self.rope_axes} must be even widths of at least 0: an angle turns two channels"
            )
        return self

    @model_validator(mode="after")
    def _mixers_fit(self) -> "ModelSettings":
        # A model of attention alone has neither, whatever sizes the preset leaves there.
        if all(kind == "attention" for kind in self.block_mixers):
            return self
        if self.hidden_size * self.ssm.expand % self.ssm.head_dim:
            raise ValueError(
                f"hidden_size * ssm.expand = {self.hidden_size * self.ssm.expand} is no multiple of "
                f"ssm.head_dim={self.ssm.head_dim}"
            )
        if self.ssm_num_heads % self.ssm.num_groups:
            raise ValueError(f"{self.ssm_num_heads} SSM heads cannot share ssm.num_groups={self.ssm.num_groups} evenly")
        if self.has_temporal_branch and self.temporal_width % self.temporal_heads:
            raise ValueError(f"temporal_width={self.temporal_width} is no multiple of {self.temporal_heads} heads")
        return self

    @model_validator(mode="after")
    def _ssm_is_of_its_variant(self) -> "ModelSettings":
        ssm = self.ssm
        got = {"expand": ssm.expand, "head_dim": ssm.head_dim, "state_dim": ssm.state_dim, "num_groups": ssm.num_groups}
        match ssm.variant:
            case "mil":
                head = self.head_dim
                needed = {"expand": 1, "head_dim": head, "state_dim": head, "num_groups": self.num_heads}
            case "mamba1":
                needed = {"head_dim": 1, "num_groups": 1}
            case "mamba2":
                needed = {}
            case _:
                assert_never(ssm.variant)
        wrong = [f"ssm.{key}={got[key]} (it has {value})" for key, value in needed.items() if got[key] != value]
        if (ssm.dt_rank > 0) != (ssm.variant == "mamba1"):
            wrong.append(f"ssm.dt_rank={ssm.dt_rank} (only mamba1 has one, above 0)")
        if wrong:
            raise ValueError(
                f"ssm.variant={ssm.variant!r} does not go with {', '.join(wrong)}; leave these keys out, the variant "
                "fills them in"
            )
        return self

    @model_validator(mode="after")
    def _hybrid_has_both(self) -> "ModelSettings":
        if self.mixer in ("post_half", "pre_half", "interleaved") and self.num_single_blocks < 2:
            raise ValueError(
                f"mixer={self.mixer!r} needs at least 2 unified blocks, but num_single_blocks={self.num_single_blocks}"
            )
        return self

    @property
    def block_mixers(self) -> tuple[BlockMixer, ...]:
        """Mixer of each unified block, first to last; of an odd number of blocks the middle one is an SSM's half."""
        count = self.num_single_blocks
        match self.mixer:
            case "attention" | "ssm" | "parallel":
                return (self.mixer,) * count
            case "post_half":
                return tuple("ssm" if number >= count // 2 else "attention" for number in range(count))
            case "pre_half":
                return tuple("ssm" if number < (count + 1) // 2 else "attention" for number in range(count))
            case "interleaved":
                return tuple("ssm" if number % 2 else "attention" for number in range(count))
        assert_never(self.mixer)

    def recompute_of(self, number: int, num_blocks: int) -> Literal["none", "blocks", "selective"]:
        """What block `number` of the `num_blocks` of its kind recomputes."""
        return self.recompute if number < round(self.recompute_fraction * num_blocks) else "none"

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def ssm_num_heads(self) -> int:
        """Heads of the scan."""
        return self.hidden_size * self.ssm.expand // self.ssm.head_dim
