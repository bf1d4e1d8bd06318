"""Gradients summed per micro-batch: the steps of once a step, less memory, an error where the order differs."""

from typing import Any

import pytest
import torch
from torch import nn

from m4v_dist.batch import ModelInput
from m4v_dist.config.training_settings import TrainerSettings
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer.deepspeed_engine import ZeroEngine
from m4v_dist.trainer.optimizer import is_frozen
from tests.model.test_pyramid import TINY, _column, _perturbed
from tests.trainer.ranks import run_ranks
from tests.trainer.test_deepspeed_engine import _full_weights

MICRO_BATCHES = (
    # an image beside a clip, then a clip, on one rank; clips of other lengths on the other
    ((_column(3, 1, 1, 1), _column(2, 0, 3, 9)), (_column(1, 2, 4, 5),)),
    ((_column(5, 2, 2, 7), _column(6, 0, 1, 3)), (_column(7, 1, 3, 4),)),
)
"""ZeRO 3 compares what ran over ranks, and each column is an output: as many on each rank."""


def _steps(zero_stage: int, when: str) -> dict[str, Any]:
    mesh = Mesh.of_process_group(use_gpu=False)
    settings = TrainerSettings.model_validate({"zero_stage": zero_stage, "reduce_gradients": when})
    engine = ZeroEngine(_perturbed(TINY), settings, freeze=("embedders",), micro_batch_slots=2, mesh=mesh)
    norms, held = [], 0
    for _ in range(2):
        with engine.accumulate(2):
            for number, columns in enumerate(MICRO_BATCHES[mesh.rank]):
                outputs = engine.model(ModelInput(columns))
                engine.backward(torch.stack([(output - 1).square().mean() for output in outputs]).sum() / 6)
                if number == 0:
                    held = sum(p.grad.numel() for p in engine.model.parameters() if p.grad is not None)
        norms.append(engine.step(lr=1e-3))
    answer = {"norms": norms, "weights": _full_weights(engine, mesh), "held": held}
    engine.close()
    return answer


def _both() -> dict[tuple[int, str], dict[str, Any]]:
    return {(stage, when): _steps(stage, when) for stage in (1, 2, 3) for when in ("per_step", "per_micro_batch")}


def test_per_micro_batch_gives_the_steps_of_per_step_and_holds_no_whole_gradients() -> None:
    total = sum(p.numel() for name, p in _perturbed(TINY).named_parameters() if not is_frozen(name, ("embedders",)))
    for answers in run_ranks(_both, 2):
        first = answers[1, "per_step"]
        for (stage, when), answer in answers.items():
            # float32 sums in another order
            assert answer["norms"] == pytest.approx(first["norms"], rel=1e-5), (stage, when)
            for name, weight in first["weights"].items():
                torch.testing.assert_close(answer["weights"][name], weight, rtol=1e-4, atol=2e-4, msg=f"{stage} {name}")
            # ZeRO 1 reduces at the step's last backward in any case
            is_held = when == "per_step" or stage == 1
            assert answer["held"] == (total if is_held else 0), (stage, when, answer["held"])


class _TwoLinears(nn.Module):
    """Equal sizes, in an order that is each rank's own: nothing but the order tells the gradients apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, values: torch.Tensor, first: int) -> torch.Tensor:
        return self.layers[1 - first](self.layers[first](values))


def _other_order(zero_stage: int) -> str:
    mesh = Mesh.of_process_group(use_gpu=False)
    settings = TrainerSettings.model_validate({"zero_stage": zero_stage, "reduce_gradients": "per_micro_batch"})
    engine = ZeroEngine(_TwoLinears(), settings, freeze=(), micro_batch_slots=1, mesh=mesh)
    with pytest.raises(RuntimeError) as refusal, engine.accumulate(1):
        engine.backward(engine.model(torch.ones(1, 4), mesh.rank).sum())
    return str(refusal.value)


def test_gradients_that_come_in_another_order_are_an_error_before_the_weights_move() -> None:
    for message in run_ranks(_other_order, 2, 2):
        assert "another order on another rank" in message and 'trainer.reduce_gradients="per_step"' in message
