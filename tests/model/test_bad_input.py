"""Columns that do not fit the model, or themselves, are refused by number with both values, before any matmul."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from m4v_dist.batch import Column, ModelInput, TextFeatures
from m4v_dist.config.model_settings import KernelSettings, ModelSettings
from m4v_dist.model.build import build_model
from m4v_dist.model.pyramid import PyramidModel, column_shape

SETTINGS = ModelSettings(num_double_blocks=1, num_single_blocks=1, text_width=12, pooled_width=6, mixer="attention")


def _clip(*shape: int) -> Tensor:
    return torch.full(shape, 0.5)


GOOD = Column(
    (_clip(16, 1, 4, 8), _clip(16, 2, 8, 16)),
    (1, 2),
    TextFeatures(torch.ones(3, 12), torch.ones(6)),
    torch.tensor(500.0),
)


@pytest.fixture(scope="module")
def model() -> PyramidModel:
    model = build_model(SETTINGS, KernelSettings(), seed=0)
    assert isinstance(model, PyramidModel)
    return model


def _text(tokens: Tensor, pooled: Tensor) -> dict[str, Any]:
    return {"text": TextFeatures(tokens, pooled)}


NOISY = GOOD.clips[1]
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "channels": ({"clips": (_clip(8, 1, 4, 8), _clip(8, 1, 8, 16))}, "clip 0 has 8 channels, .*latent_channels=16"),
    "text width": (_text(torch.ones(3, 11), torch.ones(6)), "tokens has width 11, but model.text_width=12; set"),
    "pooled width": (_text(torch.ones(3, 12), torch.ones(7)), "pooled text has width 7, but model.pooled_width=6; set"),
    "text axes": (_text(torch.ones(1, 3, 12), torch.ones(6)), r"tokens n d and pooled p, .*\(1, 3, 12\) and \(6,\)"),
    "two timesteps": ({"timestep": torch.tensor([1.0, 2.0])}, r"timestep has shape \(2,\); give one number"),
    "timestep of nan": ({"timestep": torch.tensor(torch.nan)}, r"timestep is nan; give one in 0\.\.1000"),
    "timestep above": ({"timestep": torch.tensor(1000.5)}, r"timestep is 1000.5; give one in 0\.\.1000"),
    "timestep below": ({"timestep": torch.tensor(-1.0)}, r"timestep is -1; give one in 0\.\.1000"),
    "level above": ({"levels": (2, 3)}, r"clip 1 has level 3; levels are 0\.\.2"),
    "level below": ({"levels": (-1, 0)}, r"clip 0 has level -1; levels are 0\.\.2"),
    "levels against grids": ({"levels": (2, 2)}, "clip 0 has a grid of 4 x 8 at level 2, .* 8 x 16 at level 2; .*mend"),
    "grids against levels": (
        {"clips": (_clip(16, 1, 4, 4), NOISY)},
        "clip 0 has a grid of 4 x 4 at level 1, .* 8 x 16 at level 2; .*resize",
    ),
    "noisy clip the coarser": ({"levels": (2, 1)}, "clip 0 has a grid of 4 x 8 at level 2, .* 8 x 16 at level 1"),
    "no frame": ({"clips": (_clip(16, 0, 4, 8), NOISY)}, "clip 0 has 0 frames of 4 x 8 latents; give at least one"),
    "odd grid": ({"clips": (GOOD.clips[0], _clip(16, 1, 8, 15))}, "clip 1 .*8 x 15 latents; .*patch_size=2"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_column_that_does_not_fit_is_refused_by_number_with_both_values(model: PyramidModel, case: str) -> None:
    changes, words = BAD[case]
    model_input = ModelInput((GOOD, replace(GOOD, **changes)))
    with pytest.raises(ValueError, match=rf"^model: column 1: .*{words}"):
        model(model_input)


def test_good_columns_at_the_ends_of_every_range_pass(model: PyramidModel) -> None:
    ends = [replace(GOOD, timestep=torch.tensor(value)) for value in (0.0, 1000.0)]
    ends += [replace(GOOD, timestep=torch.tensor([3])), replace(GOOD, levels=(0, 1))]
    for column, velocity in zip(ends, model(ModelInput(tuple(ends))), strict=True):
        assert velocity.shape == column.clips[-1].shape and velocity.isfinite().all()


def test_a_timestep_off_the_host_is_not_read() -> None:
    """A read of its value would make the host wait for the device; of a meta tensor it raises."""
    shape = column_shape(replace(GOOD, timestep=torch.tensor(7e9, device="meta")), SETTINGS)
    assert len(shape.frames) == 3


@pytest.mark.parametrize("shape", [(), (16,), (16, 1, 8)])
def test_a_clip_of_other_axes_is_refused_with_its_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"column 0 needs clips c t h w of equal c, but has \[\(") as caught:
        ModelInput((replace(GOOD, clips=(_clip(*shape), NOISY)),))
    assert str(shape) in str(caught.value)
