"""The model on two and three gloo ranks that share a sequence: answers and gradients as on one rank.

float32 sums in another order: outputs within 2e-5, gradients within 2e-5 of the largest of their parameter. Under
bfloat16 autocast, rounded to 8 bits in another order: 3e-2 of the largest. The same on two GPUs through NCCL, where a
machine has them: 1e-3, since FlexAttention rounds by other blocks there.
"""

import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from m4v_dist.batch import Column, ModelInput, TextFeatures
from m4v_dist.blocks.layout import cut_columns
from m4v_dist.config.model_settings import ModelSettings
from m4v_dist.model.pyramid import column_shape
from m4v_dist.parallel.mesh import ALONE, Mesh, SequenceGroup
from tests.model.test_pyramid import TINY, VARIANTS, _column, _columns, _perturbed
from tests.trainer.ranks import run_fresh_ranks, run_ranks

TOLERANCE, BFLOAT16_TOLERANCE, GPU_TOLERANCE = 2e-5, 3e-2, 1e-3
SIX_HEADS = {"hidden_size": 192, "num_heads": 6, "rope_axes": (8, 12, 12)}
"""Divisible by two and three ranks."""


class Case(NamedTuple):
    """What is run: variant, columns, blocks computed again in backward, autocast to bfloat16."""

    variant: str
    columns: str
    recompute: bool = False
    is_bfloat16: bool = False


CASES = [
    Case("ssm", "four"),
    Case("ssm", "one long", recompute=True),
    Case("ssm", "one image"),
    Case("ssm", "one clip"),
    Case("ssm", "four", is_bfloat16=True),
    Case("parallel", "four", recompute=True),
    Case("no_sandwich", "one long"),
    Case("no_registers", "four"),
    Case("mil", "one long"),
    Case("mamba1", "four"),
    Case("mamba1", "one image", recompute=True),
    Case("post_half", "one clip"),
    Case("ssm", "four"),
]
"""One image has no frame for the other ranks; one clip is the full-sequence form, noisy in all frames. The first case
comes twice, to see that it gives the same bits."""

Answer = tuple[list[Tensor], dict[str, Tensor]]


def _settings(variant: str) -> ModelSettings:
    values = TINY.model_dump(exclude={"ssm", "preset"}) | SIX_HEADS
    ssm = VARIANTS[variant].get("ssm", TINY.ssm).model_dump()
    if ssm["variant"] == "mil":
        ssm = {"variant": "mil", "chunk_size": 16}
    options = {key: value for key, value in VARIANTS[variant].items() if key != "ssm"}
    return ModelSettings.model_validate(values | options | {"ssm": ssm})


def _columns_of(case: str) -> tuple[Column, ...]:
    match case:
        case "one long":
            return (_column(5, 2, 5, 6),)
        case "one image":
            return (_column(6, 1, 1, 4),)
        case "one clip":
            generator = torch.Generator().manual_seed(8)
            text = TextFeatures(torch.randn(6, 12, generator=generator), torch.randn(6, generator=generator))
            return (Column((torch.randn(16, 5, 8, 16, generator=generator),), (1,), text, torch.tensor(300.0)),)
    first, *others = _columns()
    # The long one in the middle, where the cuts go.
    return (others[2], first, *others[:2])


def _answer(case: Case, sequence: SequenceGroup, device: torch.device) -> Answer:
    """Velocities, and the gradients of a loss that weighs each column differently."""
    settings = _settings(case.variant).model_copy(
        update={"recompute": "blocks" if case.recompute else "none", "has_temporal_mask": case.columns != "one clip"}
    )
    model = _perturbed(settings).to(device)
    # Weights drawn without a sequence group, so that they are those of one rank by construction.
    model.sequence = sequence  # type: ignore[assignment]
    with torch.autocast(device.type, torch.bfloat16, enabled=case.is_bfloat16):
        outputs = model(ModelInput(_columns_of(case.columns)))
    torch.stack([(number + 1) * out.square().mean() for number, out in enumerate(outputs)]).sum().backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return [out.detach().cpu() for out in outputs], gradients


def answers_on_rank(cases: list[Case]) -> list[Answer]:
    """One rank's velocities, and gradients summed over ranks, of each case."""
    use_gpu = torch.distributed.get_backend() == "nccl"
    if use_gpu:
        torch.cuda.set_device(torch.distributed.get_rank())
    mesh = Mesh.of_process_group(use_gpu=use_gpu, sequence_size=torch.distributed.get_world_size())
    answers = []
    for case in cases:
        outputs, gradients = _answer(case, mesh.sequence, mesh.device)
        for gradient in gradients.values():
            torch.distributed.all_reduce(gradient)
        answers.append((outputs, {name: gradient.cpu() for name, gradient in gradients.items()}))
    return answers


def assert_as_one_rank(case: Case, answers: list[Answer], tolerance: float, device: torch.device) -> None:
    """Compare each rank's answer with that of one rank."""
    expected_outputs, expected_gradients = _answer(case, ALONE, device)
    tolerance = BFLOAT16_TOLERANCE if case.is_bfloat16 else tolerance
    for outputs, gradients in answers:
        for actual, expected, first in zip(outputs, expected_outputs, answers[0][0], strict=True):
            assert float((actual - expected).abs().max() / expected.abs().max()) < tolerance, case
            assert torch.equal(actual, first), "the ranks disagree"
        for name, expected in expected_gradients.items():
            # Softmax removes a bias that all keys share: its gradient is rounding alone.
            if name.endswith("temporal_branch.to_k.bias"):
                assert float(gradients[name].abs().max()) < 1e-3 * tolerance / TOLERANCE
                continue
            error = float((gradients[name] - expected.cpu()).abs().max() / expected.abs().max().clamp(min=1e-9))
            assert error < tolerance, (case, name, error)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_that_share_a_sequence_give_what_one_rank_gives(num_ranks: int) -> None:
    by_rank = run_ranks(answers_on_rank, num_ranks, CASES)
    for number, case in enumerate(CASES):
        assert_as_one_rank(case, [answers[number] for answers in by_rank], TOLERANCE, torch.device("cpu"))
    (outputs, gradients), (again, gradients_again) = by_rank[0][0], by_rank[0][-1]
    torch.testing.assert_close(again, outputs, rtol=0, atol=0)
    torch.testing.assert_close(gradients_again, gradients, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_that_share_a_sequence_give_what_one_gives() -> None:
    by_rank = run_fresh_ranks(answers_on_rank, 2, CASES, environment={**os.environ, "DS_ACCELERATOR": "cuda"})
    for number, case in enumerate(CASES):
        assert_as_one_rank(case, [answers[number] for answers in by_rank], GPU_TOLERANCE, torch.device("cuda"))


def test_the_columns_are_cut_where_the_test_needs_them_cut() -> None:
    """Else the test above could pass with no state, tail or text handed on."""
    settings = _settings("ssm")
    for num_ranks in (2, 3):
        for case in ("four", "one long"):
            shapes = tuple(column_shape(column, settings) for column in _columns_of(case))
            ranks = cut_columns(shapes, num_ranks)
            assert all(ranks)
            assert any(not pieces[0].is_first for pieces in ranks), "no cut goes through a column"
        image = tuple(column_shape(column, settings) for column in _columns_of("one image"))
        assert [len(pieces) for pieces in cut_columns(image, num_ranks)] == [1] + [0] * (num_ranks - 1)
