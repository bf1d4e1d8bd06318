"""How traffic of a run grows with its ranks, as markdown: `jobs.benchmark scale`. By arithmetic, on assumed bandwidths.

The curriculum's last stage, with as many slots a rank as the config has: the global batch grows with the ranks. Times
are those of rings at a share of the data sheets' bandwidth, without latency, as if nothing overlapped with computing
(overlap_comm is off): `Fabric` holds the assumptions, and measured bandwidths can take their place.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from m4v_dist.bench.flops_tables import step_flops
from m4v_dist.bench.markdown import table
from m4v_dist.bench.traffic import Collective, sequence_traffic, zero_collectives
from m4v_dist.blocks.layout import ColumnShape, FrameShape
from m4v_dist.config.gpus import GPUS
from m4v_dist.config.schema import RunConfig

GB = 1e9
FLOAT32 = 4
NUM_RANKS = (8, 64, 256, 1024)
SEQUENCE_RANKS = (2, 3, 4, 5, 6, 8)
SAVE_EVERY_S = 600.0
STORED_KINDS = 4
"""Weights, average, two moments."""
PART_BYTES = 40
"""Of a range that an index writes out: first element, length, rank and byte as JSON."""


@dataclass(frozen=True)
class Fabric:
    """Bandwidths, in GB/s, and what of them collectives get.

    Args:
        gpus_a_node: ranks of one machine.
        nvlink_gb_s: one GPU to the others of its node, one direction. A100: 600 GB/s in both (NVIDIA's data sheet).
        network_gb_s: one node to the others, one direction. DGX A100: 8 x 200 Gb/s HDR (NVIDIA's data sheet).
        efficiency: share of both that large collectives get; an assumption.
        host_gb_s: one GPU to pinned host memory. PCIe 4.0 x16 has 32 GB/s; an assumption of 20.
        storage_gb_s: all ranks together to the checkpoint store; an assumption, since every site has its own.
    """

    gpus_a_node: int = 8
    nvlink_gb_s: float = 300.0
    network_gb_s: float = 200.0
    efficiency: float = 0.7
    host_gb_s: float = 20.0
    storage_gb_s: float = 20.0

    def seconds(self, collective: Collective) -> float:
        """Of one collective, bound by NVLink or by the nodes' network."""
        inside = collective.sent_bytes / (self.nvlink_gb_s * GB * self.efficiency)
        return max(inside, self.node_bytes(collective) / (self.network_gb_s * GB * self.efficiency))

    def node_bytes(self, collective: Collective) -> float:
        """What one node sends to others: rings enter and leave a node once."""
        return collective.sent_bytes if collective.num_ranks > self.gpus_a_node else 0.0


@dataclass(frozen=True)
class ModelSize:
    """What is counted with: the elements of each parameter by name; all train."""

    parameters: Mapping[str, int]

    @property
    def total(self) -> int:
        """Of all."""
        return sum(self.parameters.values())


def scale_report(config: RunConfig, size: ModelSize, fabric: Fabric | None = None) -> str:
    """All tables.

    Args:
        config: of the run; `launch.gpu` names the GPU, an A100 of 80 GB if none.
        size: of its model.
        fabric: bandwidths; None takes the assumed ones.
    """
    fabric = fabric or Fabric()
    parts = [step_table(config, size, fabric), checkpoint_table(size, fabric), sequence_table(config, fabric)]
    return "\n\n".join(parts)


def variants(config: RunConfig, size: ModelSize, num_ranks: int, fabric: Fabric) -> dict[str, list[Collective]]:
    """Collectives of a step under each ZeRO stage, with hpZ where there is more than one node."""
    num_micro = _num_micro_batches(config)

    def made(zero_stage: int, hpz: int = 1) -> list[Collective]:
        return zero_collectives(
            size.total,
            size.total,
            zero_stage=zero_stage,
            num_ranks=num_ranks,
            num_micro_batches=num_micro,
            hpz_partition_size=hpz,
            is_reduced_per_micro_batch=config.trainer.reduce_gradients == "per_micro_batch",
        )

    found = {"1": made(1), "2": made(2), "3": made(3)}
    return found | ({"3, hpZ": made(3, fabric.gpus_a_node)} if num_ranks > fabric.gpus_a_node else {})


def step_table(config: RunConfig, size: ModelSize, fabric: Fabric) -> str:
    """Bytes, seconds and share of the step of each ZeRO stage."""
    computing = compute_seconds(config)
    rows = []
    for num_ranks in NUM_RANKS:
        for name, collectives in variants(config, size, num_ranks, fabric).items():
            sent = {operation: 0.0 for operation in ("all-reduce", "reduce-scatter", "all-gather", "in node")}
            for collective in collectives:
                is_in_node = collective.num_ranks <= fabric.gpus_a_node < num_ranks
                sent["in node" if is_in_node else collective.operation] += collective.sent_bytes
            out = sum(map(fabric.node_bytes, collectives))
            seconds = sum(map(fabric.seconds, collectives))
            cells = [f"{amount / GB:.1f}" for amount in (*sent.values(), out)]
            share = 100 * seconds / (seconds + computing)
            rows.append([f"{num_ranks:,}, ZeRO {name}", *cells, f"{seconds:.3f}", f"{share:.0f} %"])
    heads = [
        "ranks", "all-reduce", "reduce-scatter", "all-gather", "all-gather in node", "a node sends out", "s a step",
        "of the step",
    ]  # fmt: skip
    gpu, launch = GPUS[config.launch.gpu or "a100_80gb"], config.launch
    note = (
        f"GB that a rank sends, and receives, in a step of {_num_micro_batches(config)} micro-batches of stage "
        f"{config.curriculum[-1].name!r} ({size.total / 1e9:.3f} G parameters, float32); then what its node sends to "
        f"others. Rings at {100 * fabric.efficiency:g} % of {fabric.nvlink_gb_s:g} GB/s a GPU inside a node of "
        f"{fabric.gpus_a_node} and of {fabric.network_gb_s:g} GB/s a node between nodes, without latency; share of the "
        f"step if nothing overlaps with {computing:.2f} s of computing at {100 * launch.assumed_mfu:g} % "
        f"(launch.assumed_mfu) of {gpu.bfloat16_tflops:g} TFLOP/s. {gpu.title}: unmeasured. ZeRO 3 is an upper bound: "
        "what stays gathered from one use to the next is not taken off."
    )
    return f"{table(heads, rows)}\n\n{note}"


def compute_seconds(config: RunConfig) -> float:
    """Of a step of the last stage on each rank, at the assumed MFU; recompute is in the MFU's assumption."""
    stage = config.curriculum[-1]
    model = config.model.model_copy(update={"recompute": "none"})
    plain = config.model_copy(update={"model": model})
    flops = step_flops(plain, stage, stage.buckets[0]) / config.launch.num_workers
    return flops / (GPUS[config.launch.gpu or "a100_80gb"].bfloat16_tflops * 1e12 * config.launch.assumed_mfu)


def _num_micro_batches(config: RunConfig) -> int:
    slots = -(-config.trainer.global_batch_slots // config.launch.num_data_ranks)
    return -(-slots // config.curriculum[-1].micro_batch_slots)


def checkpoint_table(size: ModelSize, fabric: Fabric) -> str:
    """Bytes and times of a checkpoint, and of its index."""
    whole = STORED_KINDS * FLOAT32 * size.total
    rows = []
    for num_ranks in NUM_RANKS:
        share = whole / num_ranks
        snapshot = share / (fabric.host_gb_s * GB)
        rows.append(
            [
                f"{num_ranks:,}",
                f"{share / GB:.3f}",
                f"{whole / GB:.1f}",
                f"{snapshot:.3f}",
                f"{100 * snapshot / SAVE_EVERY_S:.4f} %",
                f"{whole / (fabric.storage_gb_s * GB):.1f}",
                f"{index_bytes(size, num_ranks, is_even=False) / 1e6:.2f}",
                f"{index_bytes(size, num_ranks, is_even=True) / 1e6:.2f}",
            ]
        )
    heads = [
        "ranks", "GB a rank", "GB in all", "s of snapshot", "of the run", "s of writing", "MB of index, ZeRO 1, 2",
        "ZeRO 3",
    ]  # fmt: skip
    note = (
        f"A save every {SAVE_EVERY_S / 60:g} minutes; training stands still for the snapshot alone, at "
        f"{fabric.host_gb_s:g} GB/s to host memory, and writing goes on beside it, at {fabric.storage_gb_s:g} GB/s of "
        f"all ranks together: both assumed. The store must take {whole / SAVE_EVERY_S / GB:.3f} GB/s in the mean."
    )
    return f"{table(heads, rows)}\n\n{note}"


def index_bytes(size: ModelSize, num_ranks: int, *, is_even: bool) -> int:
    """The size, at the most, of a checkpoint's `index.json` (`trainer/checkpoint_index.py`).

    Args:
        size: of the model.
        num_ranks: that saved it.
        is_even: as ZeRO 3 holds it; else each rank's share of the flat buffers cuts some parameters, written out.
    """
    kinds = ("weights", "ema", "exp_avg", "exp_avg_sq")
    assert len(kinds) == STORED_KINDS
    keys = {
        f"{kind}/{name}": [count, -(-count // num_ranks)] for kind in kinds for name, count in size.parameters.items()
    }
    even = len(json.dumps({"first_bytes": [len(keys) * 80] * num_ranks, "tensors": keys}))
    return even if is_even else even + PART_BYTES * STORED_KINDS * (len(size.parameters) + num_ranks)


def sequence_table(config: RunConfig, fabric: Fabric) -> str:
    """What sequence ranks send of one full sequence of the last stage's size; 119,040 tokens at 768p and 31 latents."""
    model, stage = config.model.model_copy(update={"has_temporal_mask": False}), config.curriculum[-1]
    column = full_sequence(config)
    tokens = column.num_video
    rows = []
    for num_ranks in SEQUENCE_RANKS:
        if model.num_heads % num_ranks:
            rows.append([str(num_ranks), *["-"] * 6])
            continue
        traffic = sequence_traffic(model, [column], num_ranks, is_mixed=config.trainer.precision == "bfloat16")
        again = int(model.recompute == "blocks")
        whole = traffic.step(again) / num_ranks
        parts = [part / num_ranks for part in (traffic.attention, traffic.scan, traffic.temporal, traffic.answer)]
        seconds = whole / (fabric.nvlink_gb_s * GB * fabric.efficiency)
        rows.append([str(num_ranks), *(f"{part / GB:.3f}" for part in parts), f"{whole / GB:.2f}", f"{seconds:.4f}"])
    heads = ["sequence ranks", "attention", "scan", "temporal branch", "answer", "step", "s a step"]
    note = (
        f"GB that a sequence rank sends in the mean of one full sequence of {tokens:,} tokens ({stage.num_latents} "
        f"latents, all noisy) in a forward, by part, and in forward and backward"
        f"{' with recompute' if model.recompute == 'blocks' else ''}; seconds inside a node as above. -: attention's "
        f"{model.num_heads} heads cannot be shared. Unmeasured."
    )
    return f"{table(heads, rows)}\n\n{note}"


def full_sequence(config: RunConfig) -> ColumnShape:
    """All latents of the last stage at full size, noisy at once, beside the longest text."""
    bucket = config.curriculum[-1].buckets[0]
    height, width = (side // (8 * config.model.patch_size) for side in (bucket.height_px, bucket.width_px))
    level = config.objective.num_pyramid_stages - 1
    count = config.curriculum[-1].num_latents
    frames: Sequence[FrameShape] = [FrameShape(height, width, level, time) for time in range(count)]
    return ColumnShape(config.text_encoder.max_tokens, tuple(frames), count, has_temporal_mask=False)
