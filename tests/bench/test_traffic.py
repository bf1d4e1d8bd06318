"""Bytes of collectives by arithmetic against those that gloo ranks really handed to torch.distributed."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from m4v_dist.batch import ModelInput
from m4v_dist.bench.traffic import Collective, sequence_traffic, zero_collectives
from m4v_dist.config.training_settings import TrainerSettings
from m4v_dist.model.pyramid import column_shape
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer import deepspeed_engine
from m4v_dist.trainer.deepspeed_engine import ZeroEngine
from tests.model.test_pyramid import _perturbed
from tests.model.test_sequence_parallel import _columns_of, _settings
from tests.trainer.ranks import run_ranks
from tests.trainer.test_model_states import BLOCK, WIDTH, _Model

OPERATIONS = {
    "all_reduce": "all-reduce",
    "reduce_scatter_tensor": "reduce-scatter",
    "all_gather_into_tensor": "all-gather",
}
Calls = Counter[tuple[str, int]]
"""Bytes by (operation, ranks of its group)."""


@contextmanager
def _counted(seen: Calls) -> Iterator[None]:
    """Put a counter in front of torch.distributed, before deepspeed takes its functions; small ones are norms."""
    originals = {name: getattr(dist, name) for name in (*OPERATIONS, "all_to_all_single")}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = [*args, *kwargs.values()]
            group = next((item for item in given if isinstance(item, dist.ProcessGroup)), None)
            if name == "all_to_all_single":
                _, rows, _, sent = args
                own = dist.get_rank(group)
                others = sum(count for rank, count in enumerate(sent) if rank != own)
                seen["sent", dist.get_world_size(group)] += others * rows[:1].numel() * rows.element_size()
            else:
                size = max(t.numel() * t.element_size() for t in given if isinstance(t, torch.Tensor))
                if size > 10_000:
                    seen[OPERATIONS[name], dist.get_world_size(group)] += size
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _without_keeping(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """DeepSpeed's dict under which ZeRO 3 lets go of each block at once, as a model far larger than this would."""
    config = _DICT(*args, **kwargs)
    config["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    return config | {"zero_optimization": config["zero_optimization"] | {"stage3_prefetch_bucket_size": 0}}


_DICT = deepspeed_engine.deepspeed_config


def _steps(cases: list[dict[str, Any]]) -> list[Calls]:
    deepspeed_engine.deepspeed_config = _without_keeping
    seen: Calls = Counter()
    with _counted(seen):
        return [_second_step(seen, **case) for case in cases]


def _second_step(seen: Calls, freeze: tuple[str, ...] = (), **values: Any) -> Calls:
    mesh = Mesh.of_process_group(use_gpu=False)
    settings = TrainerSettings.model_validate(values)
    engine = ZeroEngine(_Model(has_adapters=False), settings, freeze=freeze, micro_batch_slots=1, mesh=mesh)
    for _ in range(2):
        seen.clear()
        with engine.accumulate(2):
            for _ in range(2):
                engine.backward(engine.model(torch.randn(3, WIDTH, requires_grad=True)).square().mean())
        engine.step(1e-3)
    engine.close()
    return Counter(seen)


CASES: list[dict[str, Any]] = [
    {"zero_stage": 1},
    {"zero_stage": 1, "reduce_gradients": "per_micro_batch"},
    {"zero_stage": 2, "freeze": ("double_blocks",)},
    {"zero_stage": 2, "reduce_gradients": "per_micro_batch"},
    {"zero_stage": 3},
    {"zero_stage": 3, "reduce_gradients": "per_micro_batch", "freeze": ("double_blocks",)},
    # Last: deepspeed keeps hpZ's groups.
    {"zero_stage": 3, "hpz_partition_size": 2},
]


@pytest.mark.slow
def test_a_step_hands_collectives_what_was_counted() -> None:
    """Two micro-batches on four ranks, to 1 %: biases and padding."""
    for answers in run_ranks(_steps, 4, CASES):
        for case, seen in zip(CASES, answers, strict=True):
            counted: Calls = Counter()
            for collective in zero_collectives(
                6 * BLOCK,
                (4 if "freeze" in case else 6) * BLOCK,
                zero_stage=case["zero_stage"],
                num_ranks=4,
                num_micro_batches=2,
                hpz_partition_size=case.get("hpz_partition_size", 1),
                is_reduced_per_micro_batch="reduce_gradients" in case,
            ):
                counted[collective.operation, collective.num_ranks] += collective.size_bytes
            assert seen.keys() == counted.keys(), case
            for key, size in seen.items():
                assert size == pytest.approx(counted[key], rel=0.01), (case, key)


def test_a_ring_sends_all_but_one_share_and_twice_for_a_sum() -> None:
    assert Collective("all-gather", 800, 8).sent_bytes == Collective("reduce-scatter", 800, 8).sent_bytes == 700
    assert Collective("all-reduce", 800, 8).sent_bytes == 1400
    assert Collective("all-reduce", 800, 1).sent_bytes == 0


SEQUENCE_CASES = [
    ("ssm", "one long"), ("ssm", "four"), ("ssm", "one clip"), ("parallel", "four"), ("no_sandwich", "one long"),
    ("mil", "one long"), ("post_half", "one clip"),
]  # fmt: skip


def _sent_in_forward(cases: list[tuple[str, str]]) -> list[int]:
    mesh = Mesh.of_process_group(use_gpu=False, sequence_size=dist.get_world_size())
    sent = []
    for variant, columns in cases:
        seen: Calls = Counter()
        model = _perturbed(_case_settings(variant, columns))
        model.sequence = mesh.sequence  # type: ignore[assignment]
        with _counted(seen), torch.no_grad():
            model(_model_input(columns))
        sent.append(seen["sent", mesh.sequence.size])
    return sent


def _case_settings(variant: str, columns: str) -> Any:
    return _settings(variant).model_copy(update={"has_temporal_mask": columns != "one clip"})


def _model_input(columns: str) -> Any:
    return ModelInput(_columns_of(columns))


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_forward_over_a_cut_sends_what_was_counted(num_ranks: int) -> None:
    """To the byte, over all ranks."""
    by_rank = run_ranks(_sent_in_forward, num_ranks, SEQUENCE_CASES)
    for case, *sent in zip(SEQUENCE_CASES, *by_rank, strict=True):
        settings = _case_settings(*case)
        shapes = [column_shape(column, settings) for column in _columns_of(case[1])]
        counted = sequence_traffic(settings, shapes, num_ranks, is_mixed=False)
        whole = counted.attention + counted.scan + counted.temporal + counted.answer
        assert sum(sent) == whole > 0, (case, sum(sent) / whole)
