"""Every setting of a run: one TOML file per run, read by every verb.

The sections that several rooms know stand in files of their own (`model_settings.py`, `data_settings.py`,
`training_settings.py`); here are those of single verbs, and the whole.
"""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from m4v_dist.config.curation_settings import CurationSettings
from m4v_dist.config.data_settings import CodecSettings, PrecomputeSettings, SourceSettings, TextEncoderSettings
from m4v_dist.config.model_settings import Ablation, KernelSettings, ModelSettings
from m4v_dist.config.settings import Fraction, Name, PositiveInt, Settings
from m4v_dist.config.training_settings import (
    CurriculumStageSettings,
    LaunchSettings,
    LoggingSettings,
    ObjectiveSettings,
    TrainerSettings,
)


class RunSettings(Settings):
    """Who this run is and where it lives."""

    name: Name = Field(description="Name of the run, as shown in W&B and in the report.")
    folder: str = Field(min_length=1, description="Run folder, local or s3://: metrics, samples, report, checkpoints.")
    seed: int = Field(default=42, ge=0, lt=2**31, description="Seed of plan, noise and weights.")


class WarmStartSettings(Settings):
    """Start weights from PyramidFlow's transformer; with neither key, all weights are drawn from run.seed."""

    source: str | None = Field(
        default=None,
        description="PyramidFlow's miniFLUX: a .safetensors, .bin, .pt or .pth file, or its folder; local or s3://. "
        "import_checkpoint reads it.",
    )
    weights: str | None = Field(
        default=None,
        description="The model's start weights, a local .safetensors file that import_checkpoint writes and training "
        "begins with; with a source, None is <run.folder>/warm_start/weights.safetensors.",
    )

    @field_validator("weights")
    @classmethod
    def _weights_are_a_local_file(cls, value: str | None) -> str | None:
        if value is not None and value.startswith("s3://"):
            raise ValueError(f"weights={value!r} is not local; give a local or mounted file, as for run.folder")
        # Readers go by the ending.
        if value is not None and not value.endswith(".safetensors"):
            raise ValueError(f"weights={value!r} is written as safetensors; give a name that ends in .safetensors")
        return value


class SamplingSettings(Settings):
    """The autoregressive pyramid sampler (arXiv 2410.05954)."""

    prompts: tuple[str, ...] = Field(default=(), description="One video per prompt.")
    prompt_suffix: str = Field(
        default="",
        description="Appended to each prompt as it stands; PyramidFlow takes ', hyper quality, Ultra HD, 8K'.",
    )
    negative_prompt: str = Field(
        default="",
        description="What guidance leans away from, in all latents; empty is the prompt that training drops text for.",
    )
    num_latents: PositiveInt = Field(default=8, description="Length in latents; frames = 8 (n - 1) + 1.")
    height_px: int = Field(default=128, gt=0, description="Height of the video; `validate.py` says of what a multiple.")
    width_px: int = Field(default=128, gt=0, description="Width of the video; as the height.")
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
    weights: Literal["ema", "start"] = Field(
        default="ema",
        description="ema: a checkpoint's averaged weights; start: the start weights (warm_start), before any training.",
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

    @model_validator(mode="after")
    def _names_one_kind_of_weights(self) -> "SamplingSettings":
        if self.weights == "start" and self.checkpoint is not None:
            raise ValueError(
                f"weights='start' is sampled before any training, and checkpoint={self.checkpoint!r} names what came "
                "after it; leave out the one or the other"
            )
        return self


class BenchmarkSettings(Settings):
    """What `jobs.benchmark` trains: ablations on the last curriculum stage, or whole runs to time."""

    num_steps: PositiveInt = Field(default=60, description="Optimizer steps of each run.")
    num_warm_up_steps: PositiveInt = Field(
        default=3, description="training: steps before those that are timed; kernels are compiled in them."
    )
    curriculum_stages: tuple[str, ...] = Field(
        default=(), description="training: names of the curriculum stages that are timed; empty: all."
    )
    zero_stages: tuple[Literal[1, 2, 3], ...] = Field(
        default=(1, 2, 3), min_length=1, description="training: ZeRO stages that are timed."
    )
    worker_counts: tuple[PositiveInt, ...] = Field(
        default=(), description="training: numbers of workers that are timed, with equal slots each; empty: launch's."
    )
    is_saving: bool = Field(
        default=False, description="training: save once after the warm-up and go on until it is committed."
    )
    tokens: tuple[PositiveInt, ...] = Field(
        default=(1024, 2048, 4096, 8192, 16384, 32768, 75600, 119040),
        min_length=1,
        description="kernels: lengths of the sequences that are timed.",
    )
    num_seeds: PositiveInt = Field(default=1, description="Runs of each row, with run.seed and the seeds after it.")
    rows: tuple[Ablation, ...] = Field(
        default=(
            "full_attention", "parallel", "full_mamba", "full_mamba_temporal",
            "no_components", "text", "vision", "text_vision", "text_vision_temporal",
        ),
        min_length=1,
        description="Rows of the ablations; two names of one model train once.",
    )  # fmt: skip
    data_parts: tuple[Literal["decode", "precompute", "loader", "index"], ...] = Field(
        default=("decode",), min_length=1, description="data: parts of the data pipeline that are timed."
    )
    num_clips: PositiveInt = Field(
        default=64,
        description="data: video clips of the sources that are decoded; precompute repeats them up to that number.",
    )
    num_rounds: PositiveInt = Field(default=3, description="data: times that each contestant does all clips.")


class ExportSettings(Settings):
    """What `jobs.export` writes, and of which checkpoint."""

    what: Literal["model", "adapters"] = Field(
        default="model", description="model: all weights, with model.lora's adapters merged in; adapters: these alone."
    )
    weights: Literal["ema", "raw"] = Field(
        default="ema", description="ema: averaged weights; raw: as the last step left them."
    )
    checkpoint: str | None = Field(
        default=None, description="Name in the run's checkpoints, or a path; None takes the newest committed."
    )
    path: str | None = Field(
        default=None,
        min_length=1,
        description="Safetensors file to write, local or s3://; None is <run.folder>/export/, named by what and step.",
    )


class PackSettings(Settings):
    """What `jobs.pack` makes shards of."""

    input: str | None = Field(
        default=None,
        description="Folder of media with .json or .txt beside each file, or a .jsonl of {video or image, text or "
        "captions}; local or s3://.",
    )
    root: str | None = Field(
        default=None, description="Where relative paths of a .jsonl begin; None: the folder that it stands in."
    )
    media: Literal["video", "image"] = Field(default="video", description="What is packed; a source holds one of them.")
    shards: str | None = Field(
        default=None, description="Shards to write, with a number as %05d: shards/clips-%05d.tar; local or s3://."
    )
    records_per_shard: PositiveInt = Field(default=1000, description="Most records of a shard.")
    max_shard_mib: PositiveInt = Field(default=1024, description="A shard of this size in MiB gets no other record.")
    num_threads: PositiveInt = Field(default=8, description="Files that are read at once, and held in memory.")
    max_bad_fraction: Fraction = Field(
        default=0.0, description="Entries that cannot be packed over all: past it nothing is, and exit 3."
    )

    @field_validator("shards")
    @classmethod
    def _has_one_number(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[^%]*%0\d+d[^%/]*\.tar", value):
            raise ValueError(f"shards={value!r} needs one number such as %05d in its file name, and to end in .tar")
        return value


class InspectSettings(Settings):
    """What `jobs.inspect_cache` looks at in `precompute.cache`."""

    from_sources: tuple[Name, ...] = Field(
        default=(), description="table, histograms, decode: names of the sources that are looked at; empty: all."
    )
    keys: tuple[str, ...] = Field(
        default=(), description="decode: records, as source/key; empty: num_records of each source are drawn."
    )
    num_records: int = Field(default=6, gt=0, le=200, description="decode: records drawn of each source.")
    draw_seed: int = Field(default=0, ge=0, description="decode: seed of that draw.")
    num_threads: PositiveInt = Field(default=8, description="verify: records that are read at once.")
    drop_list: str | None = Field(
        default=None,
        description="drop: file with one source/key a line, or lines of quarantine.txt or damaged.txt; local or s3://.",
    )


class RunConfig(Settings):
    """One run: everything that every verb needs."""

    run: RunSettings
    sources: tuple[SourceSettings, ...] = Field(min_length=1)
    precompute: PrecomputeSettings
    curation: CurationSettings = CurationSettings()
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
    export: ExportSettings = ExportSettings()
    pack: PackSettings = PackSettings()
    inspect: InspectSettings = InspectSettings()

    @property
    def start_weights(self) -> str | None:
        """File of the model's start weights; None draws them all from run.seed."""
        if self.warm_start.weights is None and self.warm_start.source is not None:
            return f"{self.run.folder.rstrip('/')}/warm_start/weights.safetensors"
        return self.warm_start.weights

    @property
    def checkpoint_folder(self) -> str:
        """Where checkpoints and the lease are, local or s3://."""
        return self.trainer.checkpoint_folder or f"{self.run.folder.rstrip('/')}/checkpoints"

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
