"""Where a figure was measured: what stands beside it."""

import platform

import torch

from m4v_dist.config.schema import RunConfig


def describe(device: torch.device) -> str:
    """Device, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return f"{name}, torch {torch.__version__}, {'bfloat16' if device.type == 'cuda' else 'float32'}"


def where_measured(config: RunConfig) -> str:
    """Device of the workers (as this process sees it), versions, precision."""
    device = torch.cuda.get_device_name() if config.launch.use_gpu else f"CPU, {config.trainer.num_threads} thread(s)"
    return f"{device}, torch {torch.__version__}, Python {platform.python_version()}, {config.trainer.precision}"
