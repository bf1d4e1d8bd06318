"""Adapters through the real loop, from start weights: the base's bits stay, the adapters learn, all is saved."""

from pathlib import Path

import pytest
import torch

from m4v_dist.blocks.lora import is_adapter
from m4v_dist.config.load import config_to_json, parse_config
from m4v_dist.config.model_settings import KernelSettings, LoraSettings
from m4v_dist.model.build import build_model, build_on_meta
from m4v_dist.model.start_weights import check_start_weights, write_start_weights
from m4v_dist.trainer import checkpoint
from tests.integration.small_run import TOTAL_STEPS, make_small_cache, rows, small_values, train_each
from tests.trainer.ranks import run_ranks


@pytest.mark.slow
def test_adapters_train_on_start_weights_that_stay(tmp_path: Path) -> None:
    folder, weights = str(tmp_path / "run"), str(tmp_path / "weights.safetensors")
    values = small_values(folder, make_small_cache(str(tmp_path / "cache")), zero_stage=3, checkpoint_every_steps=4)
    values["model"] |= {"lora": {"rank": 2}, "recompute": "selective"}
    values["curriculum"] = [{**stage, "freeze": ["base"]} for stage in values["curriculum"]]
    values["warm_start"] = {"weights": weights}
    config = parse_config(values, where="test")
    base = build_model(config.model.model_copy(update={"lora": LoraSettings()}), KernelSettings(), seed=99)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        # as if trained: no block is closed
        for parameter in base.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    write_start_weights(weights, base, config)
    check_start_weights(config, build_on_meta(config.model, config.kernels))
    assert run_ranks(train_each, 2, [config_to_json(config)]) == [[TOTAL_STEPS] * 1] * 2
    path = str(checkpoint.newest_committed(f"{folder}/checkpoints"))
    # The base is its own average: no copy of it is made, nor stored.
    assert checkpoint.stored_names(path, "ema") == set(filter(is_adapter, checkpoint.stored_names(path, "weights")))
    fresh = build_model(config.model, config.kernels, seed=config.run.seed).state_dict()
    for trained in (checkpoint.load_weights(path), checkpoint.load_ema_weights(path)):
        assert trained.keys() == fresh.keys()
        for name, tensor in base.state_dict().items():
            assert torch.equal(trained[name], tensor), name
        moved = [name for name in trained if is_adapter(name) and not torch.equal(trained[name], fresh[name])]
        assert len(moved) > len([name for name in trained if is_adapter(name)]) / 2
    assert checkpoint.read_state(path)["optimizer_steps"] == {"adapters/decay": TOTAL_STEPS}
    losses = [row["validation/held_out_loss"] for row in rows(folder, "held_out")]
    assert losses[-1] < losses[0]
