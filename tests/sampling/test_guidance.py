"""Classifier-free guidance: its formula, its strength per unit, and what the model is asked."""

import pytest
import torch
from torch import Tensor

from m4v_dist.batch import ModelInput, TextFeatures
from m4v_dist.sampling.guidance import combine, guided_velocities, unit_guidance


def test_guidance_leans_away_from_the_null_velocity() -> None:
    null, text = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0])
    assert combine(null, text, 1.0).tolist() == text.tolist()
    assert combine(null, text, 0.0).tolist() == null.tolist()
    assert combine(null, text, 5.0).tolist() == [11.0, -3.0]


def test_first_and_later_units_have_their_own_guidance() -> None:
    assert [unit_guidance(unit, 7.0, 5.0) for unit in (1, 2, 31)] == [7.0, 5.0, 5.0]


def test_linear_guidance_falls_by_a_half_per_unit_to_two() -> None:
    values = [unit_guidance(unit, 7.0, 5.0, is_linear=True) for unit in (1, 2, 3, 11, 12, 31)]
    assert values == [7.0, 6.5, 6.0, 2.0, 2.0, 2.0]


def _texts(*values: float) -> list[TextFeatures]:
    return [TextFeatures(torch.zeros(2, 3), torch.tensor([value])) for value in values]


def _answer_text(model_input: ModelInput) -> list[Tensor]:
    return [torch.full_like(column.clips[-1], float(column.text.pooled[0])) for column in model_input.columns]


@pytest.mark.parametrize(("guidance", "num_columns"), [(1.0, 2), (3.0, 4)])
def test_each_prompt_is_guided_against_the_empty_one(guidance: float, num_columns: int) -> None:
    asked: list[int] = []

    def model(model_input: ModelInput) -> list[Tensor]:
        asked.append(len(model_input.columns))
        return _answer_text(model_input)

    clips = [(torch.zeros(4, 1, 2, 2),)] * 2
    (null,) = _texts(0.5)
    velocities = guided_velocities(
        model, clips, (0,), _texts(1.0, 2.0), null, timestep=torch.tensor(10.0), guidance=guidance
    )
    expected = [0.5 + guidance * (value - 0.5) for value in (1.0, 2.0)]
    assert [float(velocity.mean()) for velocity in velocities] == pytest.approx(expected)
    assert asked == [num_columns]


def test_a_model_that_answers_in_another_shape_is_refused() -> None:
    (null,) = _texts(0.0)
    with pytest.raises(ValueError, match="velocities of shapes"):
        guided_velocities(
            lambda model_input: [torch.zeros(4, 1, 2, 2)],
            [(torch.zeros(4, 1, 2, 2),)],
            (0,),
            _texts(1.0),
            null,
            timestep=torch.tensor(1.0),
            guidance=2.0,
        )
