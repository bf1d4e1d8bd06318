"""One long sequence on one rank and on several that cut it: seconds and memory of forward and backward.

The sequence is the whole clip of the last curriculum stage at its full size, noisy in all frames, as a full-sequence
model has it: 119,040 tokens for 31 latents of 768 x 1280 px. No pyramid column is that long. Gradients are not summed
over the ranks, as that is the optimizer's step and not the sequence's.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from m4v_dist.batch import Column, ModelInput, TextFeatures
from m4v_dist.bench.flops_tables import LATENT_STRIDE
from m4v_dist.bench.markdown import table
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError
from m4v_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class SequenceTimes:
    """What came out on a number of ranks; of the slowest and the fullest one.

    Args:
        num_ranks: that cut the sequence.
        seconds: of forward and backward, median.
        activations_gib: the most that was held beside weights and gradients; None on a CPU.
    """

    num_ranks: int
    seconds: float
    activations_gib: float | None


def num_sequence_tokens(config: RunConfig) -> int:
    """Visual tokens of the sequence."""
    num_latents, height, width = _grid(config)
    return num_latents * (height // config.model.patch_size) * (width // config.model.patch_size)


def sequence_counts(config: RunConfig) -> tuple[int, ...]:
    """Numbers of ranks that are timed.

    Raises:
        ConfigError: one that has no frame or no head for a rank.
    """
    counts = config.benchmark.worker_counts or (config.launch.sequence_parallel,)
    for count in counts:
        if config.curriculum[-1].num_latents < count or config.model.num_heads % count:
            raise ConfigError(
                f"benchmark.worker_counts has {count}: a sequence of {config.curriculum[-1].num_latents} frames and "
                f"{config.model.num_heads} heads cannot be cut over as many ranks; heads must divide evenly."
            )
    return counts


def time_sequence(model: nn.Module, config: RunConfig, mesh: Mesh) -> SequenceTimes:
    """Time the sequence on this rank, together with those that share it (collective).

    Args:
        model: on the mesh's device, built for its sequence group.
        config: of the benchmark.
        mesh: all ranks are one sequence group.
    """
    device, model_input = mesh.device, ModelInput((_column(config, mesh.device),))
    seconds, base, peak = [], 0, 0
    for number in range(config.benchmark.num_warm_up_steps + config.benchmark.num_steps):
        # In place: the memory of gradients is not the sequence's.
        model.zero_grad(set_to_none=False)
        if device.type == "cuda":
            torch.cuda.synchronize()
            base = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        mesh.barrier()
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=config.trainer.precision == "bfloat16"):
            (velocity,) = model(model_input)
        velocity.float().square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= config.benchmark.num_warm_up_steps:
            seconds.append(time.perf_counter() - start)
            if device.type == "cuda":
                peak = max(peak, torch.cuda.max_memory_allocated(device) - base)
    by_rank = mesh.gather((median(seconds), peak))
    slowest, fullest = max(s for s, _ in by_rank), max(p for _, p in by_rank)
    return SequenceTimes(mesh.world_size, slowest, fullest / 2**30 if device.type == "cuda" else None)


def sequence_page(config: RunConfig, results: Sequence[SequenceTimes], where: str) -> str:
    """The table, as markdown.

    Args:
        config: of the benchmark.
        results: the fewest ranks first.
        where: hardware and versions.
    """
    one, rows = results[0], []
    for times in results:
        memory = shrunk = "-"
        if times.activations_gib is not None and one.activations_gib is not None:
            memory, shrunk = f"{times.activations_gib:.2f}", f"{times.activations_gib / one.activations_gib:.3f}"
        rows.append(
            [str(times.num_ranks), f"{times.seconds:.3f}", f"{one.seconds / times.seconds:.2f}", memory, shrunk]
        )
    heads = ["ranks", "forward and backward, s", "times as fast", "activations, GiB", "of the first row's"]
    asked, blocks = config.benchmark, config.model
    note = (
        f"{num_sequence_tokens(config):,} visual and {config.text_encoder.max_tokens} text tokens; {where}; "
        f"{blocks.preset} with {blocks.num_double_blocks} double and {blocks.num_single_blocks} unified blocks, scan "
        f"{config.kernels.backend}, recompute {blocks.recompute}; median of {asked.num_steps} after "
        f"{asked.num_warm_up_steps}, slowest and fullest rank; gradients not summed over ranks"
    )
    return f"{table(heads, rows)}\n\n{note}\n"


def _grid(config: RunConfig) -> tuple[int, int, int]:
    """Frames, height and width in latents."""
    stage = config.curriculum[-1]
    bucket = max(stage.buckets, key=lambda bucket: bucket.height_px * bucket.width_px)
    return stage.num_latents, bucket.height_px // LATENT_STRIDE, bucket.width_px // LATENT_STRIDE


def _column(config: RunConfig, device: torch.device) -> Column:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(config.run.seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    model = config.model
    text = TextFeatures(draw(config.text_encoder.max_tokens, model.text_width), draw(model.pooled_width))
    clip = draw(model.latent_channels, *_grid(config))  # c t h w
    level = config.objective.num_pyramid_stages - 1
    return Column((clip,), (level,), text, torch.tensor(500.0, device=device))
