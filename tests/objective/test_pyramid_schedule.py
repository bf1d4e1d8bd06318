"""Pyramid schedule: equal to the reference's tables, and continuous where two stages meet."""

import re

import pytest
import torch

from m4v_dist.errors import ConfigError
from m4v_dist.objective.pyramid_schedule import PyramidSchedule, block_noise, downsample, downsample_noise, upsample
from tests.conftest import load_golden

CONFIGS = tuple(load_golden("pyramid_schedule")[0]["config"])
"""The default, and any others that the golden file has."""


def _golden_schedule(name: str) -> PyramidSchedule:
    config = load_golden("pyramid_schedule")[0]["config"][name]
    return PyramidSchedule(
        config["stages"], tuple(config["stage_range"]), config["gamma"], config["num_train_timesteps"], config["shift"]
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_sigmas_and_jumps_equal_the_reference(name: str) -> None:
    scalars = load_golden("pyramid_schedule")[0]["scalars"][name]
    schedule = _golden_schedule(name)
    for key in ("start_sigmas", "end_sigmas", "original_start_sigmas", "timestep_ratios"):
        for stage, expected in scalars[key].items():
            assert getattr(schedule, key)[int(stage)] == pytest.approx(expected, abs=1e-6), (key, stage)
    for stage, jump in scalars["stage_jump"].items():
        assert schedule.stage_jump(int(stage)) == pytest.approx((jump["alpha"], jump["beta"]), abs=1e-6)


def test_tables_equal_the_reference() -> None:
    """Every tensor of the golden file, those of the second configuration too."""
    tensors = load_golden("pyramid_schedule")[1]
    schedules = {name: _golden_schedule(name) for name in CONFIGS}
    for key, expected in tensors.items():
        schedule = schedules["variant" if key.startswith("out.variant.") else "default"]
        if train := re.fullmatch(r"out\.(?:variant\.)?(timesteps|sigmas)_per_stage\.(\d)", key):
            stage = int(train[2])
            ours = schedule.train_timesteps(stage) if train[1] == "timesteps" else schedule.train_ratios(stage)
            kind = train[1]
        else:
            steps = re.fullmatch(r"out\.(?:variant\.)?inference\.(\d+)_steps\.stage(\d)\.(timesteps|sigmas)", key)
            assert steps is not None, f"the golden file holds a tensor that this test does not know: {key}"
            kind = steps[3]
            ours = schedule.inference_table(int(steps[2]), int(steps[1]))[0 if kind == "timesteps" else 1]
        tolerance = 1e-3 if kind == "timesteps" else 1e-9
        torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("gamma", [1 / 3, 0.2])
def test_block_noise_has_variance_one_and_its_correlation(gamma: float) -> None:
    """Estimated from 200,000 blocks: three standard errors are below 0.01."""
    white = torch.randn(8, 1, 400, 250)
    noise = block_noise(white, gamma)
    blocks = noise.reshape(8, 200, 2, 125, 2).permute(0, 1, 3, 2, 4).reshape(-1, 4)
    expected = (1 + gamma) * torch.eye(4) - gamma
    torch.testing.assert_close(blocks.T.cov(), expected, rtol=0, atol=0.01)


def test_block_noise_covariance_is_the_golden_one() -> None:
    golden = load_golden("pyramid_schedule")[0]
    gamma = golden["config"]["default"]["gamma"]
    expected = (1 + gamma) * torch.eye(4) - gamma
    found = torch.tensor(golden["scalars"]["default"]["block_noise_covariance_4x4"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gamma", [1 / 3, 0.2])
@pytest.mark.parametrize("num_stages", [2, 3])
def test_stages_meet_at_their_borders(num_stages: int, gamma: float) -> None:
    """Upsampled end of one stage plus block noise is the start of the next: same mean, and white noise of its sigma."""
    schedule = PyramidSchedule(num_stages, gamma=gamma)
    clean = torch.full((8, 1, 200, 100), 1.5)
    for stage in range(1, num_stages):
        end_sigma = schedule.end_sigmas[stage - 1]
        assert end_sigma == schedule.original_start_sigmas[stage]
        end = end_sigma * torch.randn_like(clean) + (1 - end_sigma) * clean
        alpha, beta = schedule.stage_jump(stage)
        start = alpha * upsample(end) + beta * block_noise(torch.randn(8, 1, 400, 200), gamma)
        blocks = start.reshape(8, 200, 2, 100, 2).permute(0, 1, 3, 2, 4).reshape(-1, 4)
        sigma = schedule.start_sigmas[stage]
        torch.testing.assert_close(blocks.mean(0), torch.full((4,), (1 - sigma) * 1.5), rtol=0, atol=0.01)
        torch.testing.assert_close(blocks.T.cov(), sigma**2 * torch.eye(4), rtol=0, atol=0.01)


def test_timesteps_fall_through_all_stages_without_a_gap() -> None:
    schedule = PyramidSchedule()
    assert float(schedule.train_timesteps(0)[0]) == 1000
    for stage in range(3):
        assert bool((schedule.train_timesteps(stage).diff() < 0).all())
    for stage in range(2):
        gap = float(schedule.train_timesteps(stage)[-1] - schedule.train_timesteps(stage + 1)[0])
        assert 0 < gap < 1


def test_downsampling_is_the_mean_of_blocks_and_keeps_noise_white() -> None:
    latents = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert downsample(latents).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert downsample(latents[:, :0]).shape == (1, 0, 2, 2)
    assert float(downsample_noise(torch.randn(4, 1, 256, 256)).std()) == pytest.approx(1.0, abs=0.01)


def test_downsampling_refuses_an_odd_grid() -> None:
    with pytest.raises(ValueError, match="even h and w"):
        downsample(torch.zeros(1, 1, 5, 4))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"gamma": 0.4}, "gamma=0.4"),
        ({"num_stages": 2, "stage_range": (0.0, 0.5)}, "stage_range"),
        ({"num_stages": 2, "stage_range": (0.0, 0.0, 1.0)}, "rise"),
        ({"num_stages": 0}, "at least one stage"),
        ({"shift": 0.0}, "shift=0.0"),
    ],
)
def test_impossible_schedules_are_refused_by_name(arguments: dict, word: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(word)):
        PyramidSchedule(**arguments)


def test_stage_zero_and_unknown_stages_have_no_jump() -> None:
    for stage in (0, 3):
        with pytest.raises(ConfigError, match="stage"):
            PyramidSchedule().stage_jump(stage)
    with pytest.raises(ConfigError, match="at least 1"):
        PyramidSchedule().inference_table(0, 0)


def test_one_stage_is_plain_flow_matching() -> None:
    schedule = PyramidSchedule(num_stages=1)
    assert schedule.start_sigmas == (1.0,) and schedule.end_sigmas == (0.0,)
    timesteps, ratios = schedule.inference_table(0, 1)
    assert timesteps.tolist() == [1000.0] and ratios.tolist() == [1.0, 0.0]


def test_shift_moves_sigmas_and_timesteps_towards_noise() -> None:
    """With shift 3, half way is 3 * 0.5 / (1 + 2 * 0.5) = 0.75."""
    schedule = PyramidSchedule(num_stages=2, shift=3.0)
    assert schedule.end_sigmas == pytest.approx((0.75, 0.0))
    assert schedule.original_start_sigmas == pytest.approx((1.0, 0.75))
    index = int(schedule.timestep_ratios[1][0] * 1000)
    plain = 1 - index / 1000
    assert float(schedule.train_timesteps(1)[0]) == pytest.approx(1000 * 3 * plain / (1 + 2 * plain))
