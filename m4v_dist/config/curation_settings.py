"""The first pass over raw clips: where scenes are cut, and which of their pieces are kept."""

from typing import Literal

from pydantic import Field, model_validator

from m4v_dist.config.settings import Fraction, PositiveInt, Settings


class CurationThresholds(Settings):
    """What a piece of a scene must be to be kept; asked in this order, and the first that fails is the reason counted.

    Motion, length and static share are asked of videos alone.
    """

    min_height_px: int = Field(default=128, ge=1, description="too_small: the source's own height, before any resize.")
    min_width_px: int = Field(default=128, ge=1, description="too_small: its own width.")
    min_seconds: float = Field(default=1.0, ge=0, description="too_short: length of the piece.")
    max_black_share: Fraction = Field(default=0.2, description="black: share of its frames that are black.")
    min_brightness: Fraction = Field(default=0.04, description="too_dark: mean luma.")
    max_brightness: Fraction = Field(default=0.96, description="too_bright: mean luma.")
    min_contrast: Fraction = Field(
        default=0.03, description="flat: mean standard deviation of luma; empty pictures and plain cards have none."
    )
    min_sharpness: float = Field(
        default=10.0,
        ge=0,
        description="blurred: variance of the Laplacian at a short side of 256 px, in grey levels squared.",
    )
    max_bars_share: Fraction = Field(
        default=0.3, description="bars: share of the picture under rows and columns at the edges that stay black."
    )
    max_static_share: Fraction = Field(default=0.8, description="static: share of frames that repeat the one before.")
    min_motion: float = Field(
        default=0.002, ge=0, description="too_still: mean optical flow, in short sides of the picture a second."
    )
    max_motion: float = Field(default=2.0, gt=0, description="too_fast: the same.")

    @model_validator(mode="after")
    def _leaves_something(self) -> "CurationThresholds":
        for name in ("brightness", "motion"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if least > most:
                raise ValueError(f"min_{name}={least:g} is above max_{name}={most:g}, which keeps nothing; swap them")
        return self


class CurationSettings(Settings):
    """Curation before encoding: one survey of every raw clip, then a clip list by thresholds, then encoding of that."""

    enabled: bool = Field(
        default=False, description="False: every raw clip is encoded from its first frame, as it stands."
    )
    cut_change: float = Field(
        default=14.0,
        gt=0,
        le=255,
        description="A cut changes hue, saturation and brightness by this mean or more, of 255; the survey's own.",
    )
    cut_ratio: float = Field(
        default=2.2,
        ge=0,
        le=255,
        description="And by this many times the change of the frames around it; 0 asks for cut_change alone.",
    )
    long_scenes: Literal["first", "split"] = Field(
        default="first",
        description="A scene longer than the longest clip gives one clip, its beginning; or one after the other.",
    )
    remove_duplicates: bool = Field(
        default=True,
        description="Of clips whose media are the same bytes, over all sources, the first is kept, in the sources' "
        "order here; duplicates.txt lists the others.",
    )
    thresholds: CurationThresholds = Field(
        default=CurationThresholds(), description="Of all sources but those that have their own."
    )
    num_actors: PositiveInt = Field(default=1, description="Ray Data actors that survey, each of cpus_per_actor.")
    cpus_per_actor: float = Field(default=1.0, gt=0, description="CPUs that Ray reserves for one; none has a GPU.")
    processes_per_actor: PositiveInt = Field(default=1, description="Child processes of one that survey, a CPU each.")
    timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="A raw clip whose survey takes longer is killed and retried alone, precompute.num_retries times.",
    )
