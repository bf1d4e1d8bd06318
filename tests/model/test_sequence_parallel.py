"""The model on two and three gloo ranks that share a sequence: answers and gradients as on one rank.

float32 sums in another order: outputs within 2e-5, gradients within 2e-5 of the largest of their parameter.
"""

import pytest
import torch
from torch import Tensor, nn

from m4v_dist.batch import Column, ModelInput
from m4v_dist.blocks.layout import cut_columns
from m4v_dist.config.model_settings import ModelSettings
from m4v_dist.model.pyramid import column_shape
from m4v_dist.parallel.mesh import ALONE, Mesh, SequenceGroup
from tests.model.test_pyramid import TINY, VARIANTS, _column, _columns, _perturbed
from tests.trainer.ranks import run_ranks

TOLERANCE = 2e-5
SIX_HEADS = {"hidden_size": 192, "num_heads": 6, "rope_axes": (8, 12, 12)}
"""Divisible by two and three ranks."""

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
    first, *others = _columns()
    # The long one in the middle, where the cuts go.
    return (others[2], first, *others[:2])


def _answer(model: nn.Module, columns: tuple[Column, ...]) -> Answer:
    """Velocities, and the gradients of a loss that weighs each column differently."""
    outputs = model(ModelInput(columns))
    loss = torch.stack([(number + 1) * out.square().mean() for number, out in enumerate(outputs)]).sum()
    loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return [out.detach() for out in outputs], gradients


def _model(settings: ModelSettings, sequence: SequenceGroup) -> nn.Module:
    model = _perturbed(settings)
    for module in model.modules():
        if hasattr(module, "sequence"):
            module.sequence = sequence
    return model


def answers_on_rank(cases: list[tuple[str, str, bool]]) -> list[tuple[list[Tensor], list[Tensor], list[float]]]:
    """One rank's velocities and its part of the gradients, flat, summed over ranks, of each case."""
    mesh = Mesh.of_process_group(use_gpu=False, sequence_size=torch.distributed.get_world_size())
    answers = []
    for variant, columns, recompute in cases:
        settings = _settings(variant).model_copy(update={"recompute": recompute})
        outputs, gradients = _answer(_model(settings, mesh.sequence), _columns_of(columns))
        flat = [gradient.clone() for gradient in gradients.values()]
        for gradient in flat:
            torch.distributed.all_reduce(gradient)
        answers.append((outputs, flat))
    return answers


CASES = [
    ("ssm", "four", False),
    ("ssm", "one long", True),
    ("ssm", "one image", False),
    ("parallel", "four", True),
    ("no_sandwich", "one long", False),
    ("no_registers", "four", False),
    ("mil", "one long", False),
    ("mamba1", "four", False),
    ("mamba1", "one image", True),
    ("post_half", "four", False),
]
"""Variant, columns, and whether blocks are computed again in backward. One image has no frame for the other ranks."""


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_that_share_a_sequence_give_what_one_rank_gives(num_ranks: int) -> None:
    by_rank = run_ranks(answers_on_rank, num_ranks, CASES)
    for number, (variant, columns, _) in enumerate(CASES):
        outputs, gradients = _answer(_model(_settings(variant), ALONE), _columns_of(columns))
        for answers in by_rank:
            found, summed = answers[number]
            for actual, expected, first in zip(found, outputs, by_rank[0][number][0], strict=True):
                torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)
                assert torch.equal(actual, first), "the ranks disagree"
            for (name, expected), actual in zip(gradients.items(), summed, strict=True):
                # Softmax removes a bias that all keys share: its gradient is rounding alone.
                scale = 1e-3 if name.endswith("temporal_branch.to_k.bias") else float(expected.abs().max())
                error = float((actual - expected).abs().max()) / max(scale, 1e-9)
                assert error < TOLERANCE, (variant, columns, name, error)


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
