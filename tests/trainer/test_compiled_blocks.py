"""Compiled blocks: eager's numbers, no new code for another length, and a loud end to recompiling."""

import shutil

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from m4v_dist.batch import Column, ModelInput
from m4v_dist.config.load import parse_config
from m4v_dist.config.training_settings import TrainerSettings
from m4v_dist.errors import ConfigError
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer import compiled_blocks
from m4v_dist.trainer.compiled_blocks import compile_blocks
from m4v_dist.trainer.deepspeed_engine import ZeroEngine
from tests.config.run_values import run_values
from tests.model.test_pyramid import TINY, _column, _perturbed
from tests.trainer.ranks import run_ranks
from tests.trainer.toy import ToyModel

HYBRID = TINY.model_copy(update={"mixer": "post_half"})
"""A double block, a unified one with attention, one with an SSM and a temporal branch."""
LENGTHS = (
    (_column(1, 2, 4, 5), _column(2, 0, 3, 9)),
    (_column(1, 2, 2, 6), _column(2, 1, 3, 8)),
    (_column(5, 0, 2, 11), _column(6, 2, 4, 16)),
    (_column(5, 1, 1, 3), _column(6, 2, 3, 7)),
)
HAS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ on a CPU")


def _gradients(model: nn.Module, columns: tuple[Column, ...]) -> tuple[list[Tensor], dict[str, Tensor]]:
    outputs = model(ModelInput(columns))
    sum(((output - 1).square().mean() for output in outputs), torch.zeros(())).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return outputs, gradients


def _num_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.fixture(autouse=True)
def _fresh_code() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.slow
def test_another_length_needs_no_new_code_and_gives_what_eager_gives() -> None:
    """Traced and differentiated as for inductor, but run by plain kernels: those of inductor are another test's."""
    eager, model = _perturbed(HYBRID), _perturbed(HYBRID)
    compile_blocks(model.blocks, backend="aot_eager")  # type: ignore[arg-type]
    seen = []
    for columns in LENGTHS:
        outputs, gradients = _gradients(model, columns)
        expected, of_eager = _gradients(eager, columns)
        seen.append(_num_graphs())
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)
        assert gradients.keys() == of_eager.keys()
        for name, gradient in of_eager.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m)
    assert seen == [seen[0]] * len(LENGTHS) and seen[0] > 5, seen


@pytest.mark.slow
def test_another_number_of_columns_is_compiled_once_and_past_the_limit_the_run_stops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = _perturbed(TINY.model_copy(update={"num_single_blocks": 1, "mixer": "attention"}))
    compile_blocks(model.blocks, backend="eager")  # type: ignore[arg-type]
    counts = []
    for columns in (LENGTHS[0], (*LENGTHS[0], LENGTHS[1][0]), (*LENGTHS[2], LENGTHS[3][0])):
        model(ModelInput(columns))
        counts.append(_num_graphs())
    assert counts[0] < counts[1] == counts[2] <= 2 * counts[0]
    monkeypatch.setattr(compiled_blocks, "MAX_VERSIONS", 2)
    with pytest.raises(FailOnRecompileLimitHit):
        model(ModelInput(LENGTHS[0][:1]))


def _steps(how: str) -> list[float | None]:
    """Gradient norms of three steps of other lengths, under ZeRO 3."""
    mesh = Mesh.of_process_group(use_gpu=False)
    model = _perturbed(TINY.model_copy(update={"num_double_blocks": 0, "num_single_blocks": 1, "recompute": "blocks"}))
    settings = TrainerSettings.model_validate({"zero_stage": 3, "compile": how})
    engine = ZeroEngine(model, settings, freeze=(), micro_batch_slots=4, mesh=mesh)
    norms = []
    for columns in (LENGTHS[0], LENGTHS[1], LENGTHS[3]):
        with engine.accumulate():
            outputs = engine.model(ModelInput(columns))
            engine.backward(torch.stack([(output - 1).square().mean() for output in outputs]).sum())
        norms.append(engine.step(lr=1e-3))
    whole = [name for name, p in engine.model.named_parameters() if p.numel() and not p.ds_persist]
    assert not whole, f"{whole} were not released"
    assert _num_graphs() > 5 if how == "blocks" else not counters["stats"]
    return norms


@pytest.mark.slow
@HAS_COMPILER
def test_compiled_blocks_train_under_zero_3() -> None:
    (plain,), (compiled,) = (run_ranks(_steps, 1, how) for how in ("none", "blocks"))
    assert compiled == pytest.approx(plain, rel=1e-4)


def _refused() -> str:
    mesh = Mesh.of_process_group(use_gpu=False)
    with pytest.raises(ConfigError) as refusal:
        ZeroEngine(ToyModel(0), TrainerSettings(compile="blocks"), freeze=(), micro_batch_slots=3, mesh=mesh)
    return str(refusal.value)


def test_a_model_without_blocks_is_refused() -> None:
    assert 'trainer.compile="blocks", but a ToyModel has none' in run_ranks(_refused, 1)[0]


def test_compiled_blocks_and_selective_recompute_exclude_one_another() -> None:
    values = run_values()
    values["trainer"] = {**values.get("trainer", {}), "compile": "blocks"}
    parse_config({**values, "model": {"recompute": "blocks"}}, where="test")
    with pytest.raises(ConfigError, match='hides the linears from model.recompute="selective"'):
        parse_config({**values, "model": {"recompute": "selective"}}, where="test")
