"""A run that has a checkpoint to sample from, for several files here."""

import shutil
from pathlib import Path

import pytest
import torch

from m4v_dist import storage
from m4v_dist.model.build import build_model
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer.checkpoint_save import save
from m4v_dist.trainer.ranges import to_ranges
from tests.jobs.sampled_run import sample_config
from tests.trainer.ranks import run_ranks


def _save_job(folder: str) -> str:
    """Save a checkpoint whose plain weights are unusable: a sampler that takes them instead of the average fails."""
    config = sample_config(folder)
    # Away from the zeros that the last layers start with, so that text, history and guidance have a say.
    model = build_model(config.model, config.kernels, seed=1)
    torch.manual_seed(1)
    average = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    shapes = {name: list(tensor.shape) for name, tensor in average.items()}
    ranges = [(name, 0, tensor.reshape(-1)) for name, tensor in average.items()]
    broken = [(name, 0, torch.full_like(tensor, torch.nan)) for name, _, tensor in ranges]
    tensors = to_ranges("ema", ranges, shapes) | to_ranges("weights", broken, shapes)
    mesh = Mesh.of_process_group(use_gpu=False)
    folder = storage.join(folder, "checkpoints")
    return save(folder, 5, tensors=tensors, state={"shapes": shapes}, config=config, mesh=mesh)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("saved"))
    run_ranks(_save_job, 1, folder)
    return folder


@pytest.fixture
def run(saved: str, tmp_path: Path) -> str:
    return str(shutil.copytree(saved, tmp_path / "run"))
