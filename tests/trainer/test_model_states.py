"""Model states by arithmetic against the storages that an engine of two ranks really holds."""

import gc
from typing import Any

import pytest
import torch
from torch import nn

from m4v_dist.blocks.lora import LoraLinear, is_adapter
from m4v_dist.config.training_settings import TrainerSettings
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer.deepspeed_engine import ZeroEngine
from m4v_dist.trainer.ema import Ema
from m4v_dist.trainer.model_states import FLOAT32, ModelStates, ParameterCounts, model_states
from tests.trainer.ranks import run_ranks

WIDTH, RANK = 512, 256
"""Nothing large is below the 100,000 elements that ZeRO 3 keeps whole."""


class _Model(nn.Module):
    """Two sets of blocks, one of which can be frozen; large enough that a tensor more or less shows."""

    def __init__(self, *, has_adapters: bool) -> None:
        super().__init__()
        linears = [nn.Linear(WIDTH, WIDTH) for _ in range(6)]
        if has_adapters:
            linears = [LoraLinear(linear, RANK, 1.0) for linear in linears]
            for linear in linears:
                nn.init.normal_(linear.lora_down), nn.init.normal_(linear.lora_up)
        self.double_blocks, self.single_blocks = nn.ModuleList(linears[:2]), nn.ModuleList(linears[2:])

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.double_blocks, *self.single_blocks]

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            values = values + block(values)
        return values


def _storages() -> dict[int, torch.UntypedStorage]:
    """Every storage of this process by its address, which is no other's while the storage is held."""
    gc.collect()
    # By type, since isinstance asks each of a million objects in Python.
    tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, nn.Parameter)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    found = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage for storage in found if storage.nbytes()}


BLOCK = WIDTH * WIDTH + WIDTH
FROZEN, LORA = {"freeze": ("double_blocks",)}, {"freeze": ("base",)}
OFFLOAD, PER_MICRO_BATCH = {"offload": "optimizer"}, {"reduce_gradients": "per_micro_batch"}
CASES: list[dict[str, Any]] = [
    *({"zero_stage": stage} for stage in (2, 3)),
    *({"zero_stage": stage, **PER_MICRO_BATCH} for stage in (1, 2, 3)),
    {"zero_stage": 2, **OFFLOAD},
    *({"zero_stage": stage, **OFFLOAD, **PER_MICRO_BATCH, **FROZEN} for stage in (2, 3)),
    *({"zero_stage": stage, **LORA} for stage in (2, 3)),
    {"zero_stage": 2, **OFFLOAD, **LORA},
    # Last: DeepSpeed keeps the groups of hpZ for all later engines of the process.
    {"zero_stage": 3, "hpz_partition_size": 2},
]


def held_by_engines(cases: list[dict[str, Any]]) -> list[int]:
    """Bytes that engine and average hold towards the end of a step's last backward; one engine for each case."""
    return [_held_by_an_engine(**case) for case in cases]


def _held_by_an_engine(freeze: tuple[str, ...] = (), **values: Any) -> int:
    before = _storages()
    settings = TrainerSettings.model_validate({**values, "precision": "bfloat16"})
    mesh = Mesh.of_process_group(use_gpu=False)
    engine = ZeroEngine(_Model(has_adapters="base" in freeze), settings, freeze=freeze, micro_batch_slots=1, mesh=mesh)
    average = Ema(engine.slices(), 0.9, lambda name: "base" not in freeze or is_adapter(name))
    held: list[int] = []

    def look(*_: Any) -> None:
        held.append(sum(storage.nbytes() for pointer, storage in _storages().items() if pointer not in before))

    # Looked at in the second step, so that what the first one left behind counts; where each micro-batch reduces,
    # before the last backward has ended: then all is reduced.
    first = next(block for block in engine.model.module.blocks if any(p.requires_grad for p in block.parameters()))
    for is_second in (False, True):
        with engine.accumulate(2):
            for micro in (0, 1):
                is_last = is_second and micro == 1
                if is_last and settings.reduce_gradients == "per_micro_batch":
                    first.register_full_backward_hook(look)
                # With gradients, as the model has it: ZeRO 3 waits for those of a block's inputs.
                engine.backward(engine.model(torch.randn(3, WIDTH, requires_grad=True)).square().mean())
                if is_last and settings.reduce_gradients == "per_step":
                    look()
        engine.step(1e-3)
        average.update(engine.slices())
    engine.close()
    (found,) = held
    return found


def _counted(case: dict[str, Any]) -> ModelStates:
    match case.get("freeze"):
        case ("base",):
            adapters = 6 * 2 * RANK * WIDTH
            counts = ParameterCounts(6 * BLOCK + adapters, adapters, adapters, RANK * WIDTH, BLOCK + adapters // 6)
        case frozen:
            counts = ParameterCounts(6 * BLOCK, (4 if frozen else 6) * BLOCK, 6 * BLOCK, WIDTH * WIDTH, BLOCK)
    return model_states(
        counts,
        zero_stage=case["zero_stage"],
        world_size=2,
        is_optimizer_offloaded="offload" in case,
        is_reduced_per_micro_batch="reduce_gradients" in case,
        hpz_partition_size=case.get("hpz_partition_size", 1),
    )


@pytest.mark.slow
def test_an_engine_holds_what_was_counted() -> None:
    """Device and host together, which are one memory here."""
    for case, *held in zip(CASES, *run_ranks(held_by_engines, 2, CASES), strict=True):
        states = _counted(case)
        counted = states.held + states.host.offloaded
        # To a tenth of a block: the rest is batches, norms and counters. Inside a backward of ZeRO 3 some blocks are
        # whole, too.
        margin = 0.1 * FLOAT32 * BLOCK
        gathered = states.gathered if "reduce_gradients" in case else 0
        for size in held:
            assert counted - margin <= size <= counted + gathered + margin, (case, size / counted)


def test_the_states_of_the_papers_model_by_zero_stage() -> None:
    """Worked out by hand, in GiB: 2.222 G parameters, 64 ranks."""
    count = 2_222_073_728
    one, two, three = (
        model_states(ParameterCounts(count, count, count), zero_stage=stage, world_size=64) for stage in (1, 2, 3)
    )
    assert one == two
    whole = 4 * count / 2**30
    assert two.held / 2**30 == pytest.approx(2 * whole + 4 * whole / 64)
    # share of weights, master, moments, reduced gradients and average; gradients; the bucket
    assert three.held / 2**30 == pytest.approx(whole + 6 * whole / 64 + 2e9 / 2**30)
    assert three.gathered == 4_000_000_000


def test_frozen_parameters_have_neither_gradients_nor_moments() -> None:
    all_train = model_states(ParameterCounts(1000, 1000, 1000), zero_stage=2, world_size=2)
    frozen = model_states(ParameterCounts(1000, 400, 1000), zero_stage=2, world_size=2)
    assert (frozen.weights, frozen.average) == (all_train.weights, all_train.average)
    assert frozen.gradients == 4 * 400 and frozen.optimizer == 4 * 3 * 400 // 2


def test_offload_leaves_weights_and_gradients_on_the_device() -> None:
    counts = ParameterCounts(1000, 1000, 1000, largest=100, largest_part=300)
    states = model_states(counts, zero_stage=2, world_size=2, is_optimizer_offloaded=True)
    # a gradient passes a buffer of its size on either side
    assert (states.weights, states.gradients, states.optimizer, states.average) == (4000, 4000, 400, 0)
    # master, two moments, average, gradients, weights on their way back
    assert states.host.offloaded == 6 * 2000 + 400
    assert states.reduction == model_states(counts, zero_stage=3, world_size=2).reduction


def test_gradients_that_are_shared_out_in_each_micro_batch_leave_their_share() -> None:
    counts = ParameterCounts(1000, 600, 1000)
    once, each = (
        model_states(counts, zero_stage=2, world_size=4, is_reduced_per_micro_batch=per_micro)
        for per_micro in (False, True)
    )
    assert (once.gradients, each.gradients) == (2400, 600)
    # the bucket is there beside the activations
    assert each.held - each.gradients == once.held - once.gradients + each.reduction


def test_the_host_holds_a_snapshot_and_for_a_while_what_is_built() -> None:
    counts = ParameterCounts(1000, 600, 1000, largest=100, largest_part=300)
    two, three = (model_states(counts, zero_stage=stage, world_size=4).host for stage in (2, 3))
    # weights and average of all, moments of what trains
    assert two.snapshot == three.snapshot == 4 * (2 * 1000 + 2 * 600) // 4
    assert (two.build, three.build) == (4000, 1200)
    assert (two.offloaded, two.peak, three.peak) == (0, 4000, three.snapshot)


def test_the_peak_is_the_backward_or_the_reduction_whichever_is_larger() -> None:
    states = model_states(ParameterCounts(1000, 1000, 1000), zero_stage=2, world_size=2)
    assert states.peak(0) == states.held + states.reduction
    assert states.peak(10 * states.reduction) == states.held + 10 * states.reduction
    sharded = model_states(ParameterCounts(1000, 1000, 1000), zero_stage=3, world_size=2)
    assert sharded.peak(7) == sharded.held + sharded.gathered + 7
