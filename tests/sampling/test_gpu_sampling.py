"""Sampling on a GPU gives what the CPU gives: same weights, same draws."""

import pytest
import torch
from torch import nn

from m4v_dist.batch import TextFeatures
from m4v_dist.config.model_settings import KernelSettings, ModelSettings
from m4v_dist.model.build import build_model
from m4v_dist.objective.pyramid_schedule import PyramidSchedule
from m4v_dist.sampling.pyramid_sampler import sample_latents


@pytest.mark.gpu
def test_a_gpu_samples_the_latents_that_the_cpu_samples() -> None:
    settings = ModelSettings(preset="tiny", num_double_blocks=1, num_single_blocks=2)
    model = build_model(settings, KernelSettings(), seed=0)
    for parameter in model.parameters():  # the zero layers too, so that every branch counts
        nn.init.normal_(parameter, std=0.05)
    text = TextFeatures(torch.randn(7, settings.text_width), torch.randn(settings.pooled_width))
    null_text = TextFeatures(torch.zeros(2, settings.text_width), torch.zeros(settings.pooled_width))
    cpu, gpu = (_sample(model.to(device), text, null_text, device) for device in ("cpu", "cuda"))
    assert gpu.device.type == "cuda"
    torch.testing.assert_close(gpu.cpu(), cpu, atol=2e-3, rtol=2e-3)


def _sample(model: nn.Module, text: TextFeatures, null_text: TextFeatures, device: str) -> torch.Tensor:
    (latents,) = sample_latents(
        model,
        [text.to(device)],
        null_text.to(device),
        schedule=PyramidSchedule(),
        num_latents=3,
        grid_height=16,
        grid_width=16,
        channels=16,
        first_unit_steps=(4, 4, 4),
        later_unit_steps=(2, 2, 2),
        first_unit_guidance=3.0,
        later_unit_guidance=2.0,
        generators=[torch.Generator().manual_seed(1)],
        device=device,
    )
    return latents
