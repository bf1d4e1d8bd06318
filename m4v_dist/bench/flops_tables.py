"""The FLOPs and parameter tables of a config, as markdown; the arithmetic is `model/flops.py`'s."""

from collections.abc import Sequence
from typing import Any

from m4v_dist.bench.markdown import amount, table
from m4v_dist.blocks.layout import ColumnShape, FrameShape
from m4v_dist.config.data_settings import BucketSettings
from m4v_dist.config.model_settings import KernelSettings, ModelSettings
from m4v_dist.config.presets import ABLATIONS, MODEL_PRESETS
from m4v_dist.config.schema import RunConfig
from m4v_dist.config.training_settings import CurriculumStageSettings
from m4v_dist.model.build import build_on_meta
from m4v_dist.model.flops import (
    MIXER_PARTS,
    PARTS,
    ColumnOf,
    clip_flops,
    forward_flops,
    mean_row_flops,
    row_flops,
)
from m4v_dist.model.paper_flops import CONVENTIONS, REPORTED, paper_figures
from m4v_dist.model.parameters import PARTS as PARAMETER_PARTS
from m4v_dist.model.parameters import parameters_by_part
from m4v_dist.objective.history import HistoryPart, history_layout, level_grid
from m4v_dist.sampling.guidance import unit_guidance

LATENT_STRIDE = 8
"""Pixels of a latent's side, and frames of a latent after the first: of every codec here."""
PAPER_GRID = (96, 160)
"""Latents of 768 x 1280 pixels."""
ARCHITECTURES = ("full_attention", "parallel", "full_mamba", "full_mamba_temporal")


def column_of(
    grid: tuple[int, int],
    num_text: int,
    *,
    patch_size: int = 2,
    num_pyramid_stages: int = 3,
    has_temporal_mask: bool = True,
) -> ColumnOf:
    """Columns of a clip, as the objective and the sampler make them.

    Args:
        grid: (h, w) of the full-size latents.
        num_text: text tokens of each column.
        patch_size: side of a token in latents.
        num_pyramid_stages: K.
        has_temporal_mask: as in the model's settings.
    """

    def column(unit: int, stage: int) -> ColumnShape:
        frames: list[FrameShape] = []
        for part in (*history_layout(unit - 1, stage), HistoryPart(stage, 1)):
            height, width = level_grid(grid, part.level, num_pyramid_stages)
            for _ in range(part.num_latents):
                frames.append(FrameShape(height // patch_size, width // patch_size, part.level, len(frames)))
        return ColumnShape(num_text, tuple(frames), 1, has_temporal_mask)

    return column


def config_columns(config: RunConfig, height_px: int, width_px: int, num_text: int | None = None) -> ColumnOf:
    """Columns of a config's model at a size; a text counts `num_text` tokens, or None: the encoder's most."""
    return column_of(
        (height_px // LATENT_STRIDE, width_px // LATENT_STRIDE),
        config.text_encoder.max_tokens if num_text is None else num_text,
        patch_size=config.model.patch_size,
        num_pyramid_stages=config.objective.num_pyramid_stages,
        has_temporal_mask=config.model.has_temporal_mask,
    )


def with_ablation(settings: ModelSettings, row: str) -> ModelSettings:
    """The same sizes with the switches of an ablation row."""
    return ModelSettings.model_validate({**settings.model_dump(), **ABLATIONS[row], "ablation": row})


def flops_report(config: RunConfig) -> str:
    """All tables of a config."""
    sections = (
        ("The paper's figures and ours", paper_table()),
        (f"One forward by part ({_sampled(config)}, last unit)", parts_table(config)),
        ("Training", training_table(config)),
        (f"One generated clip ({_sampled(config)})", clip_table(config)),
        ("Parameters by part", parameters_table(config)),
    )
    return "\n\n".join(f"## {title}\n\n{body}" for title, body in sections)


def paper_table() -> str:
    """The four reported figures beside ours under each convention, in TFLOPs."""
    columns = column_of(PAPER_GRID, 0)
    rows = [["reported in the paper", *(f"{value:.2f}" for value in REPORTED.values()), "not stated"]]
    for convention in CONVENTIONS:
        figures = paper_figures(convention, columns)
        cells = [
            f"{figures[name]:.2f} ({100 * (figures[name] / value - 1):+.1f} %)" for name, value in REPORTED.items()
        ]
        rows.append([f"ours, {convention.name}", *cells, convention.what])
    note = (
        "TFLOPs of the mixers of the 16 unified blocks at 768p and 241 frames. F1 and F2 reproduce the figures and do "
        "not prove what was counted; the plain reading of one forward is N1. The temporal branch counts as its "
        "projections at width d / 4 = 480 here; ours is 512 wide."
    )
    return f"{table(['', *REPORTED, 'what is counted'], rows)}\n\n{note}"


def parts_table(config: RunConfig) -> str:
    """FLOPs of one forward at each pyramid stage, by part, with the share at the finest."""
    sampling = config.sampling
    columns = config_columns(config, sampling.height_px, sampling.width_px)
    stages = range(config.objective.num_pyramid_stages)
    shapes = [columns(sampling.num_latents, stage) for stage in stages]
    counts = [forward_flops(config.model, shape) for shape in shapes]
    finest = counts[-1].total()
    rows = [
        [part, *(amount(count[part]) for count in counts), f"{100 * counts[-1][part] / finest:.1f} %"]
        for part in PARTS
        if counts[-1][part]
    ]
    rows.append(["all", *(amount(count.total()) for count in counts), "100 %"])
    mixers = [sum(count[part] for part in MIXER_PARTS) for count in counts]
    rows.append(["of it mixers of unified blocks", *map(amount, mixers), f"{100 * mixers[-1] / finest:.1f} %"])
    rows.append(["tokens: text + video", *(f"{shape.num_text} + {shape.num_video:,}" for shape in shapes), ""])
    return table(["part", *(f"pyramid stage {stage}" for stage in stages), "share, finest"], rows)


def training_table(config: RunConfig) -> str:
    """FLOPs of a training row and of an optimizer step, for each curriculum stage and bucket."""
    rows = []
    for curriculum_stage in config.curriculum:
        for bucket in curriculum_stage.buckets:
            rows.append(_training_row(config, curriculum_stage, bucket))
    stages = config.objective.pyramid_stage_columns
    heads = ["curriculum stage", "size", "latents", "row, mean", "row, last unit", "optimizer step"]
    recompute = (
        "" if config.model.recompute == "none" else f", and what model.recompute={config.model.recompute!r} runs again"
    )
    note = (
        f"Forward, backward (twice a forward){recompute}. A row has a column of each pyramid stage in {list(stages)}; "
        "its mean is over all units of a video. A step has "
        f"{config.trainer.global_batch_slots} columns, those of images with one latent, mixed by the stage's weights. "
        f"Each text counts at its longest, {config.text_encoder.max_tokens} tokens, here and below."
    )
    return f"{table(heads, rows)}\n\n{note}"


def _training_row(
    config: RunConfig, curriculum_stage: CurriculumStageSettings, bucket: BucketSettings
) -> Sequence[str]:
    columns = config_columns(config, bucket.height_px, bucket.width_px)
    stages, latents = config.objective.pyramid_stage_columns, curriculum_stage.num_latents
    last = row_flops(config.model, columns, (latents,) * len(stages), stages).total()
    mean = mean_row_flops(config.model, columns, latents, stages)
    step = step_flops(config, curriculum_stage, bucket)
    size = f"{bucket.height_px}x{bucket.width_px}"
    return [curriculum_stage.name, size, str(latents), amount(mean), amount(last), amount(step)]


def step_flops(config: RunConfig, curriculum_stage: CurriculumStageSettings, bucket: BucketSettings) -> float:
    """FLOPs of one optimizer step over all ranks, in the mean: images count as clips of one latent, by their weight."""
    columns = config_columns(config, bucket.height_px, bucket.width_px)
    stages = config.objective.pyramid_stage_columns
    media = {source.name: source.media for source in config.sources}
    weights = curriculum_stage.weights
    share = sum(weight for name, weight in weights.items() if media[name] == "image") / sum(weights.values())
    video = mean_row_flops(config.model, columns, curriculum_stage.num_latents, stages)
    image = mean_row_flops(config.model, columns, 1, stages)
    return ((1 - share) * video + share * image) * config.trainer.global_batch_slots / len(stages)


def clip_table(config: RunConfig) -> str:
    """FLOPs of one generated clip for the config's model and for the paper's four architectures at its sizes."""
    models = {f"this config ({config.model.mixer})": config.model}
    models |= {row: with_ablation(config.model, row) for row in ARCHITECTURES}
    sampling = config.sampling
    columns = config_columns(config, sampling.height_px, sampling.width_px)

    def num_columns(unit: int) -> int:
        first, later = sampling.first_unit_guidance, sampling.later_unit_guidance
        return 1 if unit_guidance(unit, first, later, is_linear=sampling.has_linear_guidance) == 1 else 2

    rows = []
    for name, model in models.items():
        flops = clip_flops(
            model,
            columns,
            sampling.num_latents,
            first_unit_steps=sampling.first_unit_steps,
            later_unit_steps=sampling.later_unit_steps,
            num_columns=num_columns,
            first_unit=1 if sampling.first_frame is None else 2,
        )
        mixers = sum(flops[part] for part in MIXER_PARTS)
        forward = forward_flops(model, columns(sampling.num_latents, config.objective.num_pyramid_stages - 1))
        rows.append([name, amount(forward.total()), amount(mixers), amount(flops.total())])
    heads = ["architecture", "one forward, last unit, finest", "clip: mixers", "clip: all"]
    note = (
        "Each sampled unit, pyramid stage and step, with the empty prompt beside the prompt where guidance is not 1; "
        "without the codec. Attention is counted as it runs: no pair behind the temporal mask."
    )
    return f"{table(heads, rows)}\n\n{note}"


def parameters_table(config: RunConfig) -> str:
    """Parameters by part of the config's model, of every preset, and of the largest with the other mixers."""
    largest = "m4v_2b"
    chosen: dict[str, dict[str, Any]] = {
        **{name: {"preset": name} for name in MODEL_PRESETS},
        f"{largest}, attention": {"preset": largest, "ablation": "full_attention"},
        f"{largest}, parallel": {"preset": largest, "ablation": "parallel"},
        f"{largest}, mil": {"preset": largest, "ssm": {"variant": "mil"}},
        f"{largest}, mamba1": {"preset": largest, "ssm": {"variant": "mamba1"}},
    }
    models = {f"this config ({config.model.mixer})": config.model}
    models |= {name: ModelSettings.model_validate(values) for name, values in chosen.items()}
    counts = [parameters_by_part(build_on_meta(model, KernelSettings())) for model in models.values()]
    rows = [[part, *(f"{count[part]:,}" if count[part] else "-" for count in counts)] for part in PARAMETER_PARTS]
    rows.append(["all", *(f"{count.total():,}" for count in counts)])
    return table(["part", *models], rows)


def _sampled(config: RunConfig) -> str:
    sampling = config.sampling
    frames = LATENT_STRIDE * (sampling.num_latents - 1) + 1
    return f"{sampling.height_px}x{sampling.width_px}, {sampling.num_latents} latents, {frames} frames"
