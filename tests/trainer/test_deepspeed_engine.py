"""The engine against plain torch: gradients of a whole step, weights after it, slices, frozen sets, skipped steps."""

import gc
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m4v_dist.config.load import parse_config
from m4v_dist.config.training_settings import TrainerSettings
from m4v_dist.errors import ConfigError
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer.deepspeed_engine import ZeroEngine, partition
from tests.config.run_values import run_values
from tests.trainer.ranks import run_fresh_ranks, run_ranks
from tests.trainer.toy import ToyModel, toy_batch, toy_objective

NUM_SLOTS = 12
FRESH_SCALE = 3.0


def _settings(zero_stage: int, **changes: Any) -> TrainerSettings:
    return TrainerSettings(zero_stage=zero_stage, global_batch_slots=NUM_SLOTS, sync_group=1, **changes)


def _train_step(engine: ZeroEngine, mesh: Mesh, step: int) -> float | None:
    """Rank 0 has images only and rank 1 clips only, in uneven micro-batches, so that their graphs differ."""
    mine = [index for index in range(NUM_SLOTS) if index % mesh.world_size == mesh.rank]
    with engine.accumulate():
        for indices in (mine[:1], mine[1:]):
            engine.backward(toy_objective(engine.model, toy_batch(step, indices, NUM_SLOTS)).loss)
    return engine.step(lr=0.05, fresh_scale=FRESH_SCALE)


def _full_weights(engine: ZeroEngine, mesh: Mesh) -> dict[str, Tensor]:
    parts = [
        item for rank in mesh.gather([(s.name, s.start, s.weight.clone()) for s in engine.slices()]) for item in rank
    ]
    whole = {name: torch.full((torch.Size(shape).numel(),), torch.nan) for name, shape in engine.shapes.items()}
    for name, start, values in parts:
        target = whole[name][start : start + len(values)]
        assert target.isnan().all(), f"{name}: two ranks own the same range"
        target.copy_(values)
    return {name: values.view(engine.shapes[name]) for name, values in whole.items()}


def _engine_job(zero_stage: int, offload: str, hpz: int) -> dict[str, Any]:
    mesh = Mesh.of_process_group(use_gpu=False)
    settings = _settings(zero_stage, max_grad_norm=0.5, offload=offload, hpz_partition_size=hpz)
    model = ToyModel(0)
    for part in model.children():
        partition(part, settings, mesh)
    engine = ZeroEngine(model, settings, freeze=(), micro_batch_slots=3, mesh=mesh)
    is_offloaded = engine._zero.offload_optimizer if zero_stage == 3 else engine._zero.cpu_offload
    assert is_offloaded == (offload == "optimizer")
    norms = [_train_step(engine, mesh, step) for step in range(3)]
    answer: dict[str, Any] = {"norms": norms, "weights": _full_weights(engine, mesh)}
    # one rank meets a NaN: no rank may move
    with engine.accumulate():
        loss = toy_objective(engine.model, toy_batch(9, [mesh.rank], NUM_SLOTS)).loss
        engine.backward(loss * (torch.nan if mesh.rank == 1 else 1.0))
    answer["nan_norm"] = engine.step(lr=0.05)
    with engine.accumulate():
        engine.backward(toy_objective(engine.model, toy_batch(9, [mesh.rank], NUM_SLOTS)).loss)
    engine.discard()
    answer["weights_after_nan"] = _full_weights(engine, mesh)
    answer["steps"] = engine.optimizer_steps()
    # slices are written to and published: the model must see them
    for item in engine.slices_to_load():
        item.weight.fill_(0.25)
    engine.publish()
    with torch.no_grad():
        answer["output"] = engine.model(torch.ones(1, 7), 2)
    engine.close()

    frozen = ZeroEngine(ToyModel(0), settings, freeze=("double_blocks",), micro_batch_slots=3, mesh=mesh)
    _train_step(frozen, mesh, 0)
    answer["frozen_weights"] = _full_weights(frozen, mesh)
    for item in frozen.slices_to_load():
        item.weight.fill_(0.5)
    frozen.publish()
    with torch.no_grad():
        answer["frozen_output"] = frozen.model(torch.ones(1, 7), 2)
    frozen.close()
    return answer


def _plain_torch() -> tuple[list[float], dict[str, Tensor]]:
    """The same three steps in one process: the whole batch at once, torch's own AdamW and clipping."""
    model, norms = ToyModel(0), []
    decays = [p for n, p in model.named_parameters() if p.ndim > 1 and n != "registers"]
    others = [p for p in model.parameters() if p.ndim < 2]
    fresh = {"params": [model.registers], "weight_decay": 0.0, "lr": 0.05 * FRESH_SCALE}
    groups = [{"params": decays, "weight_decay": 1e-4}, {"params": others, "weight_decay": 0.0}, fresh]
    optimizer = torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.95))
    for step in range(3):
        optimizer.zero_grad()
        toy_objective(model, toy_batch(step, list(range(NUM_SLOTS)), NUM_SLOTS)).loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
    return norms, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(
    scope="module",
    params=[
        (1, "none", 1),
        (2, "none", 1),
        (3, "none", 1),
        (1, "optimizer", 1),
        (2, "optimizer", 1),
        (3, "optimizer", 1),
        (3, "none", 2),
    ],
    ids=["zero1", "zero2", "zero3", "zero1-offload", "zero2-offload", "zero3-offload", "zero3-hpz"],
)
def answers(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(_engine_job, 2, *request.param)


def test_two_ranks_with_different_graphs_move_as_one_process_would(answers: list[dict[str, Any]]) -> None:
    norms, weights = _plain_torch()
    for answer in answers:
        # float32 sums in another order: a few units in the last place
        torch.testing.assert_close(answer["norms"], norms, rtol=1e-5, atol=0)
        for name, value in weights.items():
            torch.testing.assert_close(
                answer["weights"][name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m
            )


def test_a_nan_on_one_rank_moves_nobody(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        assert answer["nan_norm"] is None
        assert set(answer["steps"].values()) == {3}
        for name, value in answer["weights"].items():
            assert torch.equal(answer["weights_after_nan"][name], value)


def test_written_slices_reach_the_model_on_every_rank(answers: list[dict[str, Any]]) -> None:
    for key, value in (("output", 0.25), ("frozen_output", 0.5)):
        model = ToyModel(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
            expected = model(torch.ones(1, 7), 2)
        for answer in answers:
            assert torch.equal(answer[key], expected)


def test_a_frozen_set_stays_and_the_rest_moves(answers: list[dict[str, Any]]) -> None:
    before = dict(ToyModel(0).named_parameters())
    for name, value in answers[0]["frozen_weights"].items():
        assert torch.equal(value, before[name]) == name.startswith("double_blocks"), name


@pytest.mark.parametrize(("zero_stage", "hpz"), [(2, 2), (3, 3)])
def test_second_copies_in_a_node_need_zero_3_and_whole_nodes(zero_stage: int, hpz: int) -> None:
    values = run_values()
    values["trainer"] = {"zero_stage": zero_stage, "hpz_partition_size": hpz}
    with pytest.raises(ConfigError, match=f"hpz_partition_size={hpz} .*they are {zero_stage} and 2: use the number"):
        parse_config(values, where="test")


def _held_bytes() -> int:
    """Of all tensors that anything in this process can reach; the least of some looks.

    gloo's threads let go of what they summed a moment after it is there.
    """
    looks = []
    for _ in range(10):
        gc.collect()
        held = [item.untyped_storage() for item in gc.get_objects() if issubclass(type(item), Tensor)]
        looks.append(sum({storage.data_ptr(): storage.nbytes() for storage in held}.values()))
        time.sleep(0.05)
    return min(looks)


def _boundaries_job() -> dict[tuple[int, str], list[int]]:
    """Bytes that are held after each of two engines, as at the boundaries of curriculum stages.

    The loop lets go of an engine only when the next one is built: it must have given its memory back before.
    """
    mesh = Mesh.of_process_group(use_gpu=False)
    held: dict[tuple[int, str], list[int]] = {}
    for zero_stage, offload in ((2, "none"), (3, "none"), (3, "optimizer")):
        settings = _settings(zero_stage, offload=offload)
        for step in range(2):
            model = ToyModel(0)
            for part in model.children():
                partition(part, settings, mesh)
            engine = ZeroEngine(model, settings, freeze=("double_blocks",), micro_batch_slots=3, mesh=mesh)
            _train_step(engine, mesh, step)
            engine.close()
            held.setdefault((zero_stage, offload), []).append(_held_bytes())
    return held


def test_an_engine_that_is_closed_gives_its_memory_back() -> None:
    num_bytes = 4 * sum(parameter.numel() for parameter in ToyModel(0).parameters())
    for answer in run_ranks(_boundaries_job, 2):
        before = 0
        for which, held in answer.items():
            # A number or two it may keep; a share of the weights is more.
            assert all(now - then < num_bytes / 8 for then, now in pairwise([before, *held])), (which, held, num_bytes)
            before = held[-1]


def _one_step() -> float | None:
    mesh = Mesh.of_process_group(use_gpu=False)
    engine = ZeroEngine(ToyModel(0), _settings(2), freeze=(), micro_batch_slots=3, mesh=mesh)
    return _train_step(engine, mesh, 0)


def test_the_engine_runs_without_a_compiler(tmp_path: Path) -> None:
    """A fresh machine has no gcc; DeepSpeed would build its shared-memory op at start and die."""
    empty = tmp_path / "bin"
    empty.mkdir()
    environment = {"PATH": str(empty), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "HOME": str(tmp_path)}
    answers = run_fresh_ranks(_one_step, 2, environment=environment)
    assert all(norm is not None and norm > 0 for norm in answers)
    assert not (tmp_path / "extensions").exists(), "an extension was built"


def _dtypes_job() -> dict[str, Any]:
    mesh = Mesh.of_process_group(use_gpu=False)
    engine = ZeroEngine(ToyModel(0), _settings(2, precision="bfloat16"), freeze=(), micro_batch_slots=3, mesh=mesh)
    seen: dict[str, Any] = {}
    engine.model.module.single_blocks[0].register_forward_hook(
        lambda module, _, output: seen.update(
            matmul=output.dtype, weight=module.weight.dtype, A_log=engine.model.module.A_log.dtype
        )
    )
    _train_step(engine, mesh, 0)
    return {name: str(dtype) for name, dtype in seen.items()}


def test_bfloat16_is_for_matmuls_and_parameters_stay_float32_in_forward() -> None:
    for answer in run_ranks(_dtypes_job, 2):
        assert answer == {"matmul": "torch.bfloat16", "weight": "torch.float32", "A_log": "torch.float32"}
