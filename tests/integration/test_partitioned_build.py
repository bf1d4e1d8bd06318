"""A model built part by part under ZeRO 3: the same weights and steps, and never more than one part whole in memory."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from m4v_dist.batch import ModelInput
from m4v_dist.config.model_settings import KernelSettings
from m4v_dist.config.training_settings import TrainerSettings
from m4v_dist.model.build import build_model, build_on_meta, model_parts
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.tensor_files import stream_tensors
from m4v_dist.trainer.deepspeed_engine import ZeroEngine, partition
from m4v_dist.weights_file import WeightsFile, fill_weights
from tests.model.test_pyramid import TINY, _columns
from tests.trainer.ranks import run_ranks
from tests.trainer.test_deepspeed_engine import _full_weights

SETTINGS = TrainerSettings(zero_stage=3)
MODEL = TINY.model_copy(update={"num_double_blocks": 2, "num_single_blocks": 3})


def _elements_alive() -> int:
    """Of all parameters in this process that hold values; an empty one stands for what is partitioned."""
    return sum(item.numel() for item in gc.get_objects() if type(item) is nn.Parameter and not item.is_meta)


def _step(model: nn.Module, mesh: Mesh) -> dict[str, Any]:
    """Weights at the start, then loss norm and weights of one step."""
    engine = ZeroEngine(model, SETTINGS, freeze=("double_blocks",), micro_batch_slots=4, mesh=mesh)
    answer: dict[str, Any] = {"start": _full_weights(engine, mesh)}
    with engine.accumulate():
        outputs = engine.model(ModelInput(_columns()))
        engine.backward(torch.stack([(output - 1).square().mean() for output in outputs]).sum())
    answer |= {"norm": engine.step(lr=1e-3), "end": _full_weights(engine, mesh)}
    engine.close()
    return answer


def _job(start_file: str) -> dict[str, Any]:
    mesh = Mesh.of_process_group(use_gpu=False)
    before, peaks, shares = _elements_alive(), [], []
    file = WeightsFile(start_file)

    def place(name: str, part: nn.Module) -> None:
        fill_weights(part, file, name)
        peaks.append(_elements_alive() - before)
        partition(part, SETTINGS, mesh)
        shares.append(sum(p.ds_tensor.numel() for p in part.parameters()))  # type: ignore[attr-defined]
        assert _elements_alive() == before, f"{name} is still whole"

    model = build_model(MODEL, KernelSettings(), seed=3, place=place)
    answer = {"peak": max(peaks), "share": sum(shares), "parts": _step(model, mesh)}
    del model
    whole = build_model(MODEL, KernelSettings(), seed=3)
    fill_weights(whole, file)
    answer["whole"] = _step(whole, mesh)
    return answer


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, torch.Tensor]]:
    """A file of start weights, and the weights."""
    model = build_model(MODEL, KernelSettings(), seed=8)
    path: Path = tmp_path_factory.mktemp("start") / "weights.safetensors"
    stream_tensors(str(path), model.state_dict(), {})
    return str(path), model.state_dict()


def test_memory_holds_the_largest_part_and_the_own_share(start: tuple[str, dict[str, torch.Tensor]]) -> None:
    path, weights = start
    sizes = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in model_parts(build_on_meta(MODEL, KernelSettings()))
    }
    total, largest = sum(sizes.values()), max(sizes.values())
    assert largest < total / 3
    for answer in run_ranks(_job, 2, path):
        assert answer["peak"] == largest
        # each parameter is padded to a multiple of the ranks
        assert total / 2 <= answer["share"] <= total / 2 + len(weights)
        for name, tensor in weights.items():
            assert torch.equal(answer["parts"]["start"][name], tensor), name
        assert answer["parts"]["norm"] == answer["whole"]["norm"] > 0
        for name, tensor in answer["whole"]["end"].items():
            assert torch.equal(answer["parts"]["end"][name], tensor), name


def test_a_file_without_a_part_is_refused_by_the_part(tmp_path: Path) -> None:
    from m4v_dist.errors import DataError

    model = build_model(MODEL, KernelSettings(), seed=8)
    path = str(tmp_path / "weights.safetensors")
    left = {
        name: tensor for name, tensor in model.state_dict().items() if not name.startswith("single_blocks.1.proj_mlp")
    }
    stream_tensors(path, left, {})
    file = WeightsFile(path)
    with pytest.raises(DataError, match=r"single_blocks\.1: .*2 missing \(proj_mlp\.bias, proj_mlp\.weight\)"):
        build_model(MODEL, KernelSettings(), seed=3, place=lambda name, part: fill_weights(part, file, name))
