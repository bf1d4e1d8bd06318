"""Model states by arithmetic against the storages that an engine of two ranks really holds."""

import gc

import pytest
import torch
from torch import nn

from m4v_dist.config.training_settings import TrainerSettings
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer.deepspeed_engine import ZeroEngine
from m4v_dist.trainer.ema import Ema
from m4v_dist.trainer.model_states import FLOAT32, model_states
from tests.trainer.ranks import run_ranks

WIDTH = 512


class _Model(nn.Module):
    """Two sets of blocks, one of which can be frozen; large enough that a tensor more or less shows."""

    def __init__(self) -> None:
        super().__init__()
        self.double_blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.single_blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for block in [*self.double_blocks, *self.single_blocks]:
            values = values + block(values)
        return values


def _storages() -> dict[int, int]:
    """Bytes of every storage of this process by its address."""
    gc.collect()
    # By type, since isinstance asks each of a million objects in Python.
    tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, nn.Parameter)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    found = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def held_by_engines(cases: list[tuple[int, tuple[str, ...]]]) -> list[int]:
    """Bytes that engine and average hold after a step's backward, before its reduction; one engine for each case."""
    return [_held_by_an_engine(zero_stage, freeze) for zero_stage, freeze in cases]


def _held_by_an_engine(zero_stage: int, freeze: tuple[str, ...]) -> int:
    before = _storages()
    settings = TrainerSettings(zero_stage=zero_stage, precision="bfloat16")
    mesh = Mesh.of_process_group(use_gpu=False)
    engine = ZeroEngine(_Model(), settings, freeze=freeze, micro_batch_slots=1, mesh=mesh)
    average = Ema(engine.slices(), 0.9)
    held = 0
    # Looked at in the second step, so that what the first one left behind counts.
    for is_second in (False, True):
        with engine.accumulate():
            engine.backward(engine.model(torch.randn(3, WIDTH)).square().mean())
            if is_second:
                held = sum(size for pointer, size in _storages().items() if pointer not in before)
        engine.step(1e-3)
        average.update(engine.slices())
    engine.close()
    return held


def test_an_engine_holds_what_was_counted() -> None:
    frozen = ("double_blocks",)
    cases: list[tuple[int, tuple[str, ...]]] = [(1, ()), (2, ()), (2, frozen), (3, ()), (3, frozen)]
    block = WIDTH * WIDTH + WIDTH
    first, second = run_ranks(held_by_engines, 2, cases)
    for case, *held in zip(cases, first, second, strict=True):
        zero_stage, freeze = case
        states = model_states(6 * block, (4 if freeze else 6) * block, zero_stage=zero_stage, world_size=2)
        # To a tenth of a block: the rest is batches, norms and counters.
        assert held == pytest.approx([states.held] * 2, abs=0.1 * FLOAT32 * block), case


def test_the_states_of_the_papers_model_by_zero_stage() -> None:
    """Worked out by hand, in GiB: 2.222 G parameters, 64 ranks."""
    count = 2_222_073_728
    one, two, three = (model_states(count, count, zero_stage=stage, world_size=64) for stage in (1, 2, 3))
    assert one == two
    whole = 4 * count / 2**30
    assert two.held / 2**30 == pytest.approx(2 * whole + 4 * whole / 64)
    # share of weights, master, moments, reduced gradients and average; gradients; the bucket
    assert three.held / 2**30 == pytest.approx(whole + 6 * whole / 64 + 2e9 / 2**30)
    assert three.gathered == 4_000_000_000


def test_frozen_parameters_have_neither_gradients_nor_moments() -> None:
    all_train = model_states(1000, 1000, zero_stage=2, world_size=2)
    frozen = model_states(1000, 400, zero_stage=2, world_size=2)
    assert (frozen.weights, frozen.average) == (all_train.weights, all_train.average)
    assert frozen.gradients == 4 * 400 and frozen.optimizer == 4 * 3 * 400 // 2


def test_offload_leaves_weights_and_gradients_on_the_device() -> None:
    states = model_states(1000, 1000, zero_stage=2, world_size=2, is_optimizer_offloaded=True)
    assert (states.weights, states.gradients, states.optimizer, states.average) == (4000, 4000, 0, 0)


def test_the_peak_is_the_backward_or_the_reduction_whichever_is_larger() -> None:
    states = model_states(1000, 1000, zero_stage=2, world_size=2)
    assert states.peak(0) == states.held + states.reduction
    assert states.peak(10 * states.reduction) == states.held + 10 * states.reduction
    sharded = model_states(1000, 1000, zero_stage=3, world_size=2)
    assert sharded.peak(7) == sharded.held + sharded.gathered + 7
