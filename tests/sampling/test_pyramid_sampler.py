"""The auto-regressive pyramid sampler: equal to the reference given its noise, exact for a model that knows all."""

from typing import Any

import pytest
import torch
from torch import Tensor

from m4v_dist.batch import ModelInput, TextFeatures, slot_generator
from m4v_dist.errors import ConfigError
from m4v_dist.objective.pyramid_schedule import PyramidSchedule, downsample, upsample
from m4v_dist.sampling.pyramid_sampler import sample_latents
from tests.conftest import load_golden
from tests.objective.oracle import Oracle

CHANNELS, HEIGHT, WIDTH = 4, 8, 16


def _text(value: float) -> TextFeatures:
    return TextFeatures(torch.full((3, 8), value), torch.full((4,), value))


def _toy_model(model_input: ModelInput) -> list[Tensor]:
    """Depends on all that a column holds, and on nothing of its neighbours."""
    velocities = []
    for column in model_input.columns:
        history = sum((0.1 * clip.mean() for clip in column.clips[:-1]), start=torch.tensor(0.0))
        velocities.append(0.3 * column.clips[-1] + torch.sin(column.timestep) + history + column.text.pooled.mean())
    return velocities


def _sample(model: Any = _toy_model, **changes: Any) -> list[Tensor]:
    arguments: dict[str, Any] = {
        "text": [_text(1.0)],
        "null_text": _text(0.0),
        "schedule": PyramidSchedule(),
        "num_latents": 4,
        "grid_height": HEIGHT,
        "grid_width": WIDTH,
        "channels": CHANNELS,
        "first_unit_steps": (3, 2, 2),
        "later_unit_steps": (2, 2, 1),
        "first_unit_guidance": 3.0,
        "later_unit_guidance": 2.0,
        "generators": [slot_generator(1)],
    } | changes
    return sample_latents(model, arguments.pop("text"), arguments.pop("null_text"), **arguments)


class _GoldenModel:
    """The analytic velocity of the golden case; remembers what it was fed."""

    def __init__(self) -> None:
        self.fed: list[ModelInput] = []

    def __call__(self, model_input: ModelInput) -> list[Tensor]:
        self.fed.append(model_input)
        velocities = []
        for column in model_input.columns:
            velocity = 0.3 * column.clips[-1] + torch.sin(column.timestep / 1000) + 0.1 * column.text.pooled.mean()
            for j, clip in enumerate(column.clips[:-1]):
                velocity = velocity + 0.05 * (j + 1) * clip.mean(dim=(1, 2, 3), keepdim=True)
            velocities.append(velocity)
        return velocities


def _run_golden(**changes: Any) -> tuple[dict[str, Any], dict[str, Tensor], _GoldenModel, Tensor]:
    description, tensors = load_golden("pyramid_autoregressive_sampling")
    config = description["config"]

    def draw_noise(prompt: int, unit: int, pyramid_stage: int, shape: tuple[int, ...]) -> Tensor:
        if pyramid_stage == 0:
            noise = tensors["in.initial_noise"][prompt, :, unit - 1 : unit]
        else:
            noise = tensors[f"in.block_noise.unit{unit - 1}.stage{pyramid_stage}"][prompt]
        assert tuple(noise.shape) == shape
        return noise

    def features(name: str) -> TextFeatures:
        return TextFeatures(torch.zeros(1, 1), tensors[f"in.pooled_{name}"][0])

    model = _GoldenModel()
    (latents,) = sample_latents(
        model,
        [features("positive")],
        features("negative"),
        schedule=PyramidSchedule(),
        num_latents=config["temp"],
        grid_height=config["h"],
        grid_width=config["w"],
        channels=config["c"],
        first_unit_steps=config["steps"],
        later_unit_steps=config["vsteps"],
        first_unit_guidance=config["gs"],
        later_unit_guidance=config["vgs"],
        has_linear_guidance=config["linear"],
        draw_noise=draw_noise,
        **changes,
    )
    return description, tensors, model, latents


def test_the_model_is_called_as_in_the_reference() -> None:
    description, _, model, _ = _run_golden()
    ours = [
        {
            "timestep": float(fed.columns[0].timestep),
            "clips": [[len(fed.columns), *clip.shape] for clip in fed.columns[0].clips],
        }
        for fed in model.fed
    ]
    assert len(ours) == len(description["calls"])
    for call, expected in zip(ours, description["calls"], strict=True):
        assert call["timestep"] == pytest.approx(expected["timestep"], abs=1e-3)
        assert call["clips"] == expected["clips"]


def test_the_model_is_fed_what_the_reference_feeds() -> None:
    description, tensors, model, _ = _run_golden()
    checked = 0
    for call, fed in zip(description["calls"], model.fed, strict=True):
        if call["step"]:
            continue
        for half in fed.columns:
            for j, clip in enumerate(half.clips):
                expected = tensors[f"out.model_input.unit{call['unit']}.stage{call['stage']}.clip{j}"][0]
                torch.testing.assert_close(clip, expected, rtol=2e-4, atol=2e-4)
                checked += 1
    assert checked == 2 * sum(name.startswith("out.model_input.") for name in tensors)


def test_sampled_latents_equal_the_reference() -> None:
    _, tensors, _, latents = _run_golden()
    torch.testing.assert_close(latents, tensors["out.latents"][0], rtol=2e-4, atol=2e-4)


class _SamplingOracle:
    """Answers each unit with the true velocity towards known clips, one per prompt."""

    def __init__(self, schedule: PyramidSchedule, clips: list[Tensor]) -> None:
        self.schedule, self.clips = schedule, clips
        self.fed: list[ModelInput] = []

    def __call__(self, model_input: ModelInput) -> list[Tensor]:
        self.fed.append(model_input)
        unit = sum(clip.shape[1] for clip in model_input.columns[0].clips)
        halves = len(model_input.columns) // len(self.clips)
        clean = [clip[:, unit - 1 : unit] for _ in range(halves) for clip in self.clips]
        return Oracle(self.schedule, clean)(model_input)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_true_velocity_gives_back_the_clip(num_stages: int, guidance: float) -> None:
    schedule = PyramidSchedule(num_stages)
    clips = [torch.randn(CHANNELS, 4, HEIGHT, WIDTH) for _ in range(2)]
    sampled = _sample(
        _SamplingOracle(schedule, clips),
        text=[_text(1.0), _text(2.0)],
        generators=[slot_generator(1), slot_generator(2)],
        schedule=schedule,
        first_unit_steps=(3,) * num_stages,
        later_unit_steps=(2,) * num_stages,
        first_unit_guidance=guidance,
        later_unit_guidance=guidance,
    )
    for ours, clip in zip(sampled, clips, strict=True):
        torch.testing.assert_close(ours, clip, rtol=0, atol=1e-3)


def test_every_stage_starts_from_the_noise_that_training_has() -> None:
    """Where a stage starts, what is left after the signal is white noise of the stage's start sigma."""
    schedule = PyramidSchedule()
    clip = torch.randn(CHANNELS, 2, 128, 128)
    oracle = _SamplingOracle(schedule, [clip])
    _sample(oracle, num_latents=2, grid_height=128, grid_width=128, first_unit_steps=(2, 2, 2))
    for stage in range(3):
        start = next(fed for fed in oracle.fed if fed.columns[0].levels[-1] == stage).columns[0].clips[-1]
        signal = clip[:, :1]
        for _ in range(2 - stage):
            signal = downsample(signal)
        sigma = schedule.start_sigmas[stage]
        noise = start - (1 - sigma) * (upsample(downsample(signal)) if stage else 0 * signal)
        height, width = noise.shape[2:]
        blocks = noise.reshape(-1, height // 2, 2, width // 2, 2).permute(0, 1, 3, 2, 4).reshape(-1, 4)
        # 1024 blocks at stage 0: five standard errors of a covariance are about 0.16.
        torch.testing.assert_close(blocks.T.cov(), sigma**2 * torch.eye(4), rtol=0, atol=0.16 / 2**stage)


def test_history_is_the_clean_sampled_past() -> None:
    fed: list[ModelInput] = []

    def model(model_input: ModelInput) -> list[Tensor]:
        fed.append(model_input)
        return _toy_model(model_input)

    (latents,) = _sample(model, num_latents=3)
    last = fed[-1].columns[0]
    assert last.levels == (1, 2, 2)
    torch.testing.assert_close(last.clips[1], latents[:, 1:2])
    torch.testing.assert_close(last.clips[0], downsample(latents[:, 0:1]))


def test_a_longer_clip_begins_with_the_shorter_one() -> None:
    (short,), (long,) = _sample(num_latents=2), _sample(num_latents=4)
    assert torch.equal(short, long[:, :2])


def test_a_clip_does_not_depend_on_its_neighbours() -> None:
    alone = _sample(text=[_text(2.0)], generators=[slot_generator(5)])[0]
    among = _sample(
        text=[_text(1.0), _text(2.0), _text(3.0)],
        generators=[slot_generator(4), slot_generator(5), slot_generator(6)],
    )
    assert torch.equal(alone, among[1])
    assert not torch.equal(among[0], among[1])


def test_the_seed_decides_the_clip() -> None:
    one, again, other = (_sample(generators=[slot_generator(seed)])[0] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_first_latents_stay_and_the_clip_goes_on_from_them() -> None:
    given = torch.randn(CHANNELS, 2, HEIGHT, WIDTH)
    guidances: list[int] = []

    def model(model_input: ModelInput) -> list[Tensor]:
        guidances.append(len(model_input.columns))
        return _toy_model(model_input)

    (latents,) = _sample(model, first_latents=[given], first_unit_guidance=3.0, later_unit_guidance=1.0)
    assert latents.shape == (CHANNELS, 4, HEIGHT, WIDTH)
    assert torch.equal(latents[:, :2], given)
    assert guidances == [1] * 10  # two later units of 2 + 2 + 1 steps, none with the first unit's steps or guidance
    (other,) = _sample(first_latents=[given + 1], later_unit_guidance=1.0)
    assert not torch.equal(latents[:, 2:], other[:, 2:])


@pytest.mark.parametrize("num_stages", [1, 3])
@pytest.mark.parametrize("num_given", [1, 3])
def test_a_clip_goes_on_from_its_own_first_latents_as_before(num_given: int, num_stages: int) -> None:
    """The draws of given units are left unused, so that those of the others stay in their places."""
    settings: dict[str, Any] = {
        "schedule": PyramidSchedule(num_stages),
        "first_unit_steps": (3,) * num_stages,
        "later_unit_steps": (2,) * num_stages,
        "text": [_text(1.0), _text(2.0)],
    }
    whole = _sample(generators=[slot_generator(1), slot_generator(2)], **settings)
    given = [latents[:, :num_given] for latents in whole]
    again = _sample(generators=[slot_generator(1), slot_generator(2)], first_latents=given, **settings)
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))


def test_the_golden_clip_goes_on_from_its_own_first_latent() -> None:
    """With the reference's recorded noise too, where the given unit's draws are never asked for."""
    _, tensors, _, latents = _run_golden()
    _, _, model, again = _run_golden(first_latents=[tensors["out.latents"][0][:, :1]])
    torch.testing.assert_close(again, latents, rtol=2e-4, atol=2e-4)
    assert min(sum(clip.shape[1] for clip in fed.columns[0].clips) for fed in model.fed) == 2


def test_guidance_can_fall_with_the_unit_also_after_given_latents() -> None:
    """0.5 a unit from the first to 2: units 1..4 from 3.2 have 3.2, 2.7, 2.2, 2."""
    guidances: list[list[float]] = []

    def model(model_input: ModelInput) -> list[Tensor]:
        return [column.text.pooled[0] * torch.ones_like(column.clips[-1]) for column in model_input.columns]

    first = torch.zeros(CHANNELS, 1, HEIGHT, WIDTH)
    for changes in ({}, {"first_latents": [first]}):
        # one step of one stage: the latent is noise minus the guided velocity, which is the guidance itself
        (latents,) = _sample(
            model,
            schedule=PyramidSchedule(1),
            first_unit_steps=(1,),
            later_unit_steps=(1,),
            first_unit_guidance=3.2,
            has_linear_guidance=True,
            draw_noise=lambda prompt, unit, stage, shape: torch.zeros(shape),
            **changes,
        )
        guidances.append([round(-float(latent.mean()), 4) for latent in latents.unbind(1)])
    assert guidances == [[3.2, 2.7, 2.2, 2.0], [0.0, 2.7, 2.2, 2.0]]


def test_sampling_keeps_no_gradient_and_reports_each_step() -> None:
    scale = torch.tensor(0.3, requires_grad=True)
    seen: list[tuple[int, int]] = []
    (latents,) = _sample(
        lambda model_input: [scale * column.clips[-1] for column in model_input.columns],
        num_latents=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert not latents.requires_grad
    assert seen == [(done, 12) for done in range(1, 13)]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"text": []}, ValueError, "no prompts"),
        ({"generators": []}, ValueError, "0 generators for 1 prompts"),
        ({"first_unit_steps": (3, 2)}, ConfigError, "first_unit_steps"),
        ({"later_unit_steps": (3, 2, 0)}, ConfigError, "later_unit_steps"),
        ({"num_latents": 0}, ConfigError, "num_latents=0"),
        ({"grid_height": 6}, ValueError, "6x16"),
        ({"first_latents": [torch.zeros(CHANNELS, 1, 4, 4)]}, ValueError, r"first latents \[\(4, 1, 4, 4\)\]"),
        ({"first_latents": [torch.zeros(CHANNELS, HEIGHT, WIDTH)]}, ValueError, "give one c t h w to each"),
        ({"first_latents": []}, ValueError, "for 1 prompts"),
        ({"first_latents": [torch.full((CHANNELS, 1, HEIGHT, WIDTH), torch.nan)]}, ValueError, "not finite"),
        (
            {"first_latents": [torch.zeros(CHANNELS, 4, HEIGHT, WIDTH)]},
            ConfigError,
            "num_latents=4 leaves nothing to sample after 4 first latents; ask for 5",
        ),
        ({"first_latents": [torch.zeros(CHANNELS, 6, HEIGHT, WIDTH)]}, ConfigError, "after 6 first latents"),
    ],
)
def test_requests_that_cannot_work_are_refused(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        _sample(**changes)


def test_a_model_that_overflows_is_named() -> None:
    with pytest.raises(ValueError, match="unit 1 of prompt 0 is not finite"):
        _sample(lambda model_input: [column.clips[-1] * float("inf") for column in model_input.columns])
