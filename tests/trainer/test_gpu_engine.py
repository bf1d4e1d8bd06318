"""What of the engine only a GPU shows: optimizer state on the host, and blocks compiled for the device."""

import os
from typing import Any

import pytest
import torch

from m4v_dist.batch import ModelInput
from m4v_dist.config.training_settings import TrainerSettings
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer.deepspeed_engine import ZeroEngine
from m4v_dist.trainer.ema import Ema
from tests.model.test_pyramid import TINY, _column, _perturbed
from tests.trainer.ranks import run_fresh_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

LENGTHS = (
    (_column(1, 2, 4, 5), _column(2, 0, 3, 9)),
    (_column(1, 2, 2, 6), _column(2, 1, 3, 8)),
    (_column(5, 1, 1, 3), _column(6, 2, 3, 7)),
)
MODEL = TINY.model_copy(update={"mixer": "post_half"})


def _steps(recompute: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Norms of three steps, where the slices lie, and the peak of device memory."""
    mesh = Mesh.of_process_group(use_gpu=True)
    model = _perturbed(MODEL.model_copy(update={"recompute": recompute})).to(mesh.device)
    engine = ZeroEngine(
        model, TrainerSettings.model_validate(settings), freeze=("double_blocks",), micro_batch_slots=4, mesh=mesh
    )
    ema = Ema(engine.slices(), 0.9)
    norms = []
    for columns in LENGTHS:
        with engine.accumulate():
            outputs = engine.model(ModelInput(columns))
            engine.backward(torch.stack([(output - 1).square().mean() for output in outputs]).sum())
        norms.append(engine.step(lr=1e-3))
        ema.update(engine.slices())
    training = [item for item in engine.slices() if item.exp_avg is not None]
    answer = {
        "norms": norms,
        "devices": sorted({str(t.device.type) for item in training for t in (item.weight, item.exp_avg)}),
        "is_pinned": all(item.weight.is_pinned() for item in training),
    }
    engine.close()
    return answer


def _run(recompute: str = "none", **settings: Any) -> dict[str, Any]:
    (answer,) = run_fresh_ranks(
        _steps, 1, recompute, settings, environment={**os.environ, "DS_ACCELERATOR": "cuda"}, timeout_s=300
    )
    return answer


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_offloaded_optimizer_state_is_on_the_host_and_the_steps_are_the_same(zero_stage: int) -> None:
    there, here = (_run(zero_stage=zero_stage, offload=offload) for offload in ("none", "optimizer"))
    assert there["devices"] == ["cuda"]
    assert here["devices"] == ["cpu"]
    # DeepSpeed pins the flat weights of ZeRO 1 and 2 alone; seen at ZeRO 3: not pinned, so its copies are slower.
    assert here["is_pinned"] == (zero_stage < 3)
    # AdamW on another device, and attention's tf32
    assert here["norms"] == pytest.approx(there["norms"], rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_blocks_follow_eager_on_the_device(precision: str) -> None:
    plain, compiled = (_run("blocks", zero_stage=3, precision=precision, compile=how) for how in ("none", "blocks"))
    assert compiled["norms"] == pytest.approx(plain["norms"], rel=1e-3 if precision == "float32" else 2e-2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_selective_recompute_gives_the_same_steps_on_the_device(precision: str) -> None:
    """Attention is one compiled kernel there."""
    none, selective = (_run(recompute, zero_stage=2, precision=precision) for recompute in ("none", "selective"))
    assert selective["norms"] == pytest.approx(none["norms"], rel=1e-3)
