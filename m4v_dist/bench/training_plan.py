"""What a curriculum will cost, before it runs: tokens, FLOPs, GPU-hours and memory of each stage, as markdown.

Arithmetic on planned steps: `model/flops.py` has the FLOPs, `model/activations.py` the activations; who plans and packs
the slots, and what the ZeRO stages hold, is handed in. Nothing is measured.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from m4v_dist.bench.host_memory import HostStates, host_line
from m4v_dist.bench.markdown import amount, table
from m4v_dist.bench.sequence_cut import sequence_line
from m4v_dist.blocks.layout import ColumnShape, cut_imbalance
from m4v_dist.config.gpus import GPUS, USABLE_FRACTION, Gpu
from m4v_dist.config.model_settings import ModelSettings
from m4v_dist.config.presets import MODEL_PRESETS
from m4v_dist.config.schema import RunConfig
from m4v_dist.config.training_settings import CurriculumStageSettings, TrainerSettings
from m4v_dist.errors import ConfigError
from m4v_dist.model.activations import activation_bytes
from m4v_dist.model.flops import training_flops

GIB = 2**30
TABLE_GPUS = ("a100_40gb", "a100_80gb")
MicroBatch = Sequence[ColumnShape]
Spread = Callable[[Sequence[int], int, int], list[list[list[int]]]]
"""`data_pipeline.mixture.spread_slots(num_tokens, num_ranks, num_micro_batches)`."""


class States(Protocol):
    """`trainer.model_states.ModelStates`: what a rank holds beside activations."""

    @property
    def held(self) -> int: ...

    @property
    def gathered(self) -> int: ...

    @property
    def host(self) -> HostStates: ...

    def peak(self, activation_bytes: int) -> int: ...


StatesOf = Callable[[ModelSettings, Sequence[str], TrainerSettings, int], States]
"""States of (model, freeze set, ZeRO stage, offload and reduction, ranks)."""


@dataclass(frozen=True)
class PlannedStage:
    """A curriculum stage with some of its steps planned.

    Args:
        settings: the stage.
        start: first global step.
        steps: for each planned step, the columns of all its slots, in slot order.
        spread: see its type.
        num_ranks: data-parallel ranks; each is `launch.sequence_parallel` workers.
    """

    settings: CurriculumStageSettings
    start: int
    steps: Sequence[Sequence[ColumnShape]]
    spread: Spread
    num_ranks: int

    @property
    def name(self) -> str:
        """Of the stage."""
        return self.settings.name

    def num_micro_batches(self, micro_batch_slots: int | None = None) -> int:
        """Of a step, on each rank."""
        slots = len(self.steps[0])
        return -(-slots // (self.num_ranks * (micro_batch_slots or self.settings.micro_batch_slots)))

    def micro_batches(self, micro_batch_slots: int | None = None) -> list[list[list[MicroBatch]]]:
        """For each planned step and rank, its micro-batches.

        Args:
            micro_batch_slots: another size than the stage's.
        """
        num_micro = self.num_micro_batches(micro_batch_slots)
        return [
            [
                [[columns[slot] for slot in members] for members in rank]
                for rank in self.spread([_tokens(column) for column in columns], self.num_ranks, num_micro)
            ]
            for columns in self.steps
        ]

    def longest(self, micro_batch_slots: int | None = None) -> MicroBatch:
        """The micro-batch with the most tokens among all that are planned."""
        planned = (micro for step in self.micro_batches(micro_batch_slots) for rank in step for micro in rank)
        return max(planned, key=lambda micro: sum(map(_tokens, micro)))

    def fitting_sizes(self) -> list[int]:
        """Micro-batches that divide a rank's slots evenly, large to small."""
        share = -(-len(self.steps[0]) // self.num_ranks)
        return [size for size in range(share, 0, -1) if share % size == 0]

    def imbalance(self) -> float:
        """Tokens of the fullest rank over the mean of all, in the mean over the planned steps."""
        ratios = []
        for step in self.micro_batches():
            loads = [sum(_tokens(column) for micro in rank for column in micro) for rank in step]
            ratios.append(max(loads) * len(loads) / sum(loads))
        return sum(ratios) / len(ratios)

    def tokens(self) -> tuple[float, float]:
        """Visual and text tokens of a step, in the mean."""
        columns = [column for step in self.steps for column in step]
        visual, text = sum(c.num_video for c in columns), sum(c.num_text for c in columns)
        return visual / len(self.steps), text / len(self.steps)

    def flops(self, model: ModelSettings) -> float:
        """Forward, backward and recompute of a step, in the mean; each text counts at the mean length."""
        columns = [column for step in self.steps for column in step]
        num_text = round(sum(column.num_text for column in columns) / len(columns))
        counts = Counter(replace(column, num_text=num_text) for column in columns)
        total = sum(
            training_flops(model, column, self.settings.freeze).total() * count for column, count in counts.items()
        )
        return total / len(self.steps)


def _tokens(column: ColumnShape) -> int:
    return column.num_text + column.num_video


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: model states in a backward, activations as configured and without recompute, and the peak."""

    states: int
    activations: int
    kept_activations: int
    peak: int


def memory(
    config: RunConfig,
    stage: PlannedStage,
    columns: MicroBatch,
    states_of: StatesOf,
    *,
    model: ModelSettings | None = None,
    trainer: TrainerSettings | None = None,
) -> Memory:
    """Memory of a rank that trains a stage.

    Args:
        config: of the run.
        stage: whose freeze set and ranks count.
        columns: the micro-batch, the longest one as a rule.
        states_of: see its type.
        model, trainer: in place of the config's.
    """
    model = config.model if model is None else model
    trainer = config.trainer if trainer is None else trainer
    activations, kept = (
        activation_bytes(
            model.model_copy(update={"recompute": recompute}),
            config.kernels,
            columns,
            is_mixed=config.trainer.precision == "bfloat16",
        ).peak
        for recompute in (model.recompute, "none")
    )
    # ZeRO shards over the whole world, and what sequence ranks share of a micro-batch is shared of its activations.
    sequence = config.launch.sequence_parallel
    share = cut_imbalance(columns, sequence) / sequence
    activations, kept = round(activations * share), round(kept * share)
    states = _states(config, stage, states_of, model=model, trainer=trainer)
    return Memory(states.held + states.gathered, activations, kept, states.peak(activations))


def _states(
    config: RunConfig,
    stage: PlannedStage,
    states_of: StatesOf,
    *,
    model: ModelSettings | None = None,
    trainer: TrainerSettings | None = None,
) -> States:
    return states_of(
        config.model if model is None else model,
        stage.settings.freeze,
        config.trainer if trainer is None else trainer,
        stage.num_ranks * config.launch.sequence_parallel,
    )


def plan_report(config: RunConfig, stages: Sequence[PlannedStage], states_of: StatesOf) -> str:
    """All tables of a plan."""
    parts = [work_table(config, stages), memory_table(config, stages, states_of)]
    # An elastic run holds most on its fewest ranks.
    stages_on_fewest = [on_fewest(config, stage) for stage in stages]
    parts.append(host_line(config, [_states(config, stage, states_of).host for stage in stages_on_fewest]))
    if config.launch.gpu is not None:
        parts.append(fit_table(config, stages, states_of))
    if config.launch.sequence_parallel > 1:
        planned = (micro for stage in stages for step in stage.micro_batches() for rank in step for micro in rank)
        parts.append(sequence_line(config, [micro for micro in planned if micro]))
    return "\n\n".join(parts)


def work_table(config: RunConfig, stages: Sequence[PlannedStage]) -> str:
    """Steps, slots, tokens, FLOPs and GPU-hours of each stage."""
    gpu = None if config.launch.gpu is None else GPUS[config.launch.gpu]
    plain = config.model.model_copy(update={"recompute": "none"})
    rows, total_flops, total_hours = [], 0.0, 0.0
    for stage in stages:
        settings, (visual, text) = stage.settings, stage.tokens()
        flops, hours = stage.flops(config.model), 0.0
        total_flops += flops * settings.num_steps
        if gpu is not None:
            hours = stage.flops(plain) * settings.num_steps / _flops_an_hour(config, gpu)
            total_hours += hours
        num_slots = len(stage.steps[0])
        micro = f"{stage.num_ranks} x {stage.num_micro_batches()} x {settings.micro_batch_slots}"
        rows.append(
            [
                stage.name,
                f"{stage.start}..{stage.start + settings.num_steps}",
                f"{num_slots} = {micro}",
                str(settings.num_latents),
                f"{visual:,.0f} + {text:,.0f}",
                f"{stage.imbalance():.3f}",
                amount(flops),
                f"{hours:,.0f}" if gpu is not None else "-",
            ]
        )
    rows.append(["all", f"{config.total_steps}", "", "", "", "", amount(total_flops), f"{total_hours:,.0f}"])
    if gpu is None:
        rows[-1][-1] = "-"
    heads = [
        "stage", "steps", "slots = ranks x micro-batches x size", "latents", "tokens a step, visual + text",
        "fullest rank / mean", "FLOPs a step", "GPU-hours",
    ]  # fmt: skip
    recompute = ", recompute" if config.model.recompute != "none" else ""
    note = (
        f"FLOPs: forward, backward{recompute}; all: of the whole run. Means over the first "
        f"{max(len(stage.steps) for stage in stages)} steps of each stage."
    )
    if gpu is not None:
        note += (
            f" GPU-hours: forward and backward at {100 * config.launch.assumed_mfu:g} % (launch.assumed_mfu) of the "
            f"{gpu.bfloat16_tflops:g} TFLOP/s of {gpu.title}, without validation, checkpoints and restarts: an "
            "estimate, unmeasured."
        )
    else:
        note += " GPU-hours need launch.gpu."
    return f"{table(heads, rows)}\n\n{note}"


def _flops_an_hour(config: RunConfig, gpu: Gpu) -> float:
    return gpu.bfloat16_tflops * 1e12 * config.launch.assumed_mfu * 3600


def on_fewest(config: RunConfig, stage: PlannedStage) -> PlannedStage:
    """The stage on the fewest ranks that an elastic run goes on with, where each holds most."""
    fewest = config.launch.min_workers
    return stage if fewest is None else replace(stage, num_ranks=fewest)


def memory_table(config: RunConfig, stages: Sequence[PlannedStage], states_of: StatesOf) -> str:
    """Memory of a rank in each stage, and whether the named GPU has it."""
    gpu = None if config.launch.gpu is None else GPUS[config.launch.gpu]
    rows, is_elastic = [], config.launch.least_workers < config.launch.num_workers
    for stage in stages:
        columns = stage.longest()
        needed, tokens = memory(config, stage, columns, states_of), sum(map(_tokens, columns))
        kept, fewest = needed.kept_activations, on_fewest(config, stage)
        sizes = [needed.states, needed.activations, needed.peak]
        if is_elastic:
            needed = memory(config, fewest, fewest.longest(), states_of)
            sizes.append(needed.peak)
        cells = [f"{size / GIB:.2f}" for size in sizes]
        if config.model.recompute != "none":
            cells.insert(2, f"{kept / GIB:.2f}")
        verdict = [] if gpu is None else ["fits" if needed.peak <= gpu.usable_bytes else "does NOT fit"]
        rows.append([stage.name, f"{tokens:,}", *cells, *verdict])
    heads = ["GiB a rank", "longest micro-batch, tokens", "model states", "activations", "peak"]
    if config.model.recompute != "none":
        heads.insert(4, "(without recompute)")
    if is_elastic:
        heads.append(f"peak on launch.min_workers={config.launch.least_workers}")
    if gpu is not None:
        heads.append(f"{gpu.title}, {gpu.usable_bytes / GIB:.1f} GiB usable")
    note = (
        f"Model states: weights, gradients, moments and average at ZeRO {config.trainer.zero_stage}. The peak is that "
        "of a step's last backward, or of the reduction after it (a bucket of 1.86 GiB), whichever is higher. "
        f"{_options_line(config)}By arithmetic, not measured; "
        f"{100 * USABLE_FRACTION:g} % of a GPU's memory count as usable."
    )
    return f"{table(heads, rows)}\n\n{note}"


def _options_line(config: RunConfig) -> str:
    """What of the trainer's options moves model states about."""
    words = []
    if config.trainer.reduce_gradients == "per_micro_batch":
        words.append("Gradients are shared out in each micro-batch (whole at ZeRO 1). ")
    if config.trainer.offload == "optimizer":
        words.append("Master weights, moments and their average are on the host. ")
    return "".join(words)


def fit_table(config: RunConfig, stages: Sequence[PlannedStage], states_of: StatesOf) -> str:
    """The largest micro-batch of each preset and ZeRO stage on both A100s, for each curriculum stage."""
    gpus = [GPUS[name] for name in TABLE_GPUS]
    longest = [{size: stage.longest(size) for size in stage.fitting_sizes()} for stage in stages]
    rows = []
    for preset in MODEL_PRESETS:
        kept = {"recompute": config.model.recompute, "lora": config.model.lora}
        model = ModelSettings.model_validate({"preset": preset, **kept})
        for zero_stage in (1, 2, 3):
            cells, trainer = [], _changed(config, zero_stage=zero_stage)
            for stage, by_size in zip(stages, longest, strict=True):
                peaks = {
                    size: memory(config, stage, columns, states_of, model=model, trainer=trainer).peak
                    for size, columns in by_size.items()
                }
                cells.append(" / ".join(_largest_fitting(peaks, gpu) for gpu in gpus))
            rows.append([f"{preset}, ZeRO {zero_stage}", *cells])
    recompute = "with" if config.model.recompute != "none" else "without"
    note = (
        f"Largest micro-batch in slots that fits {' / '.join(gpu.title for gpu in gpus)}, {recompute} recompute, on "
        f"{config.launch.num_workers} workers, of those that divide a rank's {stages[0].fitting_sizes()[0]} slots; -: "
        f"none. Scan: {config.kernels.backend}. By arithmetic; A100 unmeasured."
    )
    return f"{table(['', *(stage.name for stage in stages)], rows)}\n\n{note}"


def _largest_fitting(peaks: Mapping[int, int], gpu: Gpu) -> str:
    return str(max((size for size, peak in peaks.items() if peak <= gpu.usable_bytes), default="-"))


def require_memory(config: RunConfig, stages: Sequence[PlannedStage], states_of: StatesOf) -> None:
    """Refuse a stage that the named GPU cannot hold; an elastic run's on its fewest ranks.

    Raises:
        ConfigError: with the numbers, and what each way out would need.
    """
    if config.launch.gpu is None:
        return
    gpu, launch = GPUS[config.launch.gpu], config.launch
    fewest = "" if launch.min_workers is None else f" on launch.min_workers={launch.min_workers}"
    for stage in (on_fewest(config, stage) for stage in stages):
        columns = stage.longest()
        needed = memory(config, stage, columns, states_of)
        if needed.peak <= gpu.usable_bytes:
            continue
        ways = _ways_out(config, stage, columns, states_of)
        enough = [(way, peak) for way, peak in ways if peak <= gpu.usable_bytes]
        lead = "Ways out" if enough else "Not enough, each by itself"
        listed = ", ".join(f"{way} ({peak / GIB:.1f} GiB)" for way, peak in enough or ways)
        raise ConfigError(
            f"curriculum {stage.name!r}: a rank needs {needed.peak / GIB:.1f} GiB{fewest} ({needed.states / GIB:.1f} "
            f"of model states, {needed.activations / GIB:.1f} of activations), but {gpu.title} has "
            f"{gpu.usable_bytes / GIB:.1f} GiB usable. {lead}: {listed}. Else another launch.gpu, or none, "
            "to try in spite of the estimate."
        )


def _ways_out(
    config: RunConfig, stage: PlannedStage, columns: MicroBatch, states_of: StatesOf
) -> list[tuple[str, int]]:
    """Changes that need less than the config as it is, each alone, and what a rank needs with it."""
    ways: list[tuple[str, PlannedStage, MicroBatch, dict[str, Any]]] = [
        ("twice the workers", replace(stage, num_ranks=2 * stage.num_ranks), columns, {})
    ]
    if config.model.recompute != "blocks":
        model = config.model.model_copy(update={"recompute": "blocks"})
        ways.append(("model.recompute=blocks", stage, columns, {"model": model}))
    if config.trainer.zero_stage < 3:
        ways.append(("trainer.zero_stage=3", stage, columns, {"trainer": _changed(config, zero_stage=3)}))
    if config.trainer.zero_stage > 1 and config.trainer.reduce_gradients == "per_step":
        trainer = _changed(config, reduce_gradients="per_micro_batch")
        ways.append(("trainer.reduce_gradients=per_micro_batch", stage, columns, {"trainer": trainer}))
    if config.trainer.offload == "none":
        ways.append(("trainer.offload=optimizer", stage, columns, {"trainer": _changed(config, offload="optimizer")}))
    if stage.settings.micro_batch_slots > 1:
        ways.append(("micro_batch_slots=1", stage, stage.longest(1), {}))
    peaks = [(way, memory(config, at, micro, states_of, **changed).peak) for way, at, micro, changed in ways]
    now = memory(config, stage, columns, states_of).peak
    return sorted((found for found in peaks if found[1] < now), key=lambda found: found[1])


def _changed(config: RunConfig, **values: object) -> TrainerSettings:
    return config.trainer.model_copy(update=values)
