"""On real clips, a model warm started from a trained attention model learns faster than one with random weights.

A tiny PyramidFlow-shaped model with attention learns two clips, and is written under PyramidFlow's names. An MM-DiM
model imported from that file and one of random weights then take the same few steps. There are no double blocks:
without them all that text and history tell a frame goes through the mixers that are exchanged.

It is faster on the clips that the source learnt, with draws that none is trained on. A source of two clips has nothing
to hand on to others: on two held-out clips, whose losses the figures hold too, no gain is seen, and none is claimed.

A third start is loaded outside the mixers as the warm one is, and keeps the seed's mixers. The mapped
mixers of mil and mamba2 gain over it; for mamba1 nothing is claimed for the mapping of the mixers alone.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from m4v_dist import tensor_files
from m4v_dist.config.model_settings import KernelSettings, ModelSettings
from m4v_dist.config.training_settings import ObjectiveSettings
from m4v_dist.model.build import build_model, build_on_meta
from m4v_dist.model.checkpoint_files import CheckpointReader, find_files
from m4v_dist.model.checkpoint_names import to_pyramidflow_name
from m4v_dist.model.warm_start import apply_warm_start, plan_warm_start
from m4v_dist.objective.flow_matching import PyramidFlowMatching
from tests.integration.real_clips import RealClips, read_real_clips

NUM_PRETRAINING_STEPS = 240
"""So many that attention matters to the source: after 60 steps it does nearly as well without."""
NUM_STEPS = 12
EVALUATED = range(10_000, 10_004)
"""Steps of the data whose draws no model is trained on."""
UNSEEN = ("video_ltx2_3_id_lora-1", "api_wan2_7_t2v-1")
"""Held-out clips of the demo's list: neither the models nor the codec's basis were fitted to them."""
KERNELS = KernelSettings()


def _settings(**options: Any) -> ModelSettings:
    return ModelSettings(preset="tiny", num_double_blocks=0, num_single_blocks=4, **options)


@pytest.mark.slow
def test_a_warm_started_model_beats_a_random_one_after_the_same_few_steps(tmp_path: Path) -> None:
    clips, unseen = read_real_clips(), read_real_clips(UNSEEN)
    source = build_model(_settings(mixer="attention"), KERNELS, seed=0)
    _train(source, clips, NUM_PRETRAINING_STEPS, learning_rate=2e-3)
    upstream = {to_pyramidflow_name(name): tensor for name, tensor in source.state_dict().items()}
    tensor_files.write_tensors(str(tmp_path / "diffusion_pytorch_model.safetensors"), upstream)
    figures: dict[str, Any] = {"attention": [_loss(source, clips), _loss(source, unseen)]}
    for variant in ("mamba2", "mil", "mamba1"):
        after = {}
        for start in ("random", "warm", "fresh mixers"):
            model = build_model(_settings(ssm={"variant": variant}), KERNELS, seed=1)
            if start != "random":
                _fill(model, str(tmp_path), has_mixers=start == "warm")
            before = _loss(model, clips), _loss(model, unseen)
            _train(model, clips, NUM_STEPS, learning_rate=1e-3)
            after[start] = _loss(model, clips)
            figures[f"{variant}, {start}"] = [*before, after[start], _loss(model, unseen)]
        assert after["warm"] < 0.7 * after["random"], figures
        if variant != "mamba1":
            assert after["warm"] < 0.96 * after["fresh mixers"], figures
    print(f"\nloss on learnt and unseen clips before {NUM_STEPS} steps, then after: {json.dumps(figures)}")


@torch.no_grad()
def _loss(model: nn.Module, clips: RealClips) -> float:
    objective = _objective(clips)
    return round(sum(float(objective(model, clips.batch(step)).loss) for step in EVALUATED) / len(EVALUATED), 4)


def _objective(clips: RealClips) -> PyramidFlowMatching:
    settings = ObjectiveSettings(cfg_dropout=0.0, history_noise_ramp_steps=0)
    return PyramidFlowMatching(settings, clips.codec.normalization.normalize)


def _train(model: nn.Module, clips: RealClips, num_steps: int, learning_rate: float) -> None:
    objective = _objective(clips)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 5)
        objective(model, clips.batch(step)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _fill(model: nn.Module, folder: str, *, has_mixers: bool) -> None:
    """As `jobs.import_checkpoint` does; without mixers, those stay random."""
    reader = CheckpointReader(find_files(folder, "the test's folder"))
    plan = plan_warm_start(build_on_meta(model.settings, KERNELS), reader.layout, folder)  # type: ignore[arg-type]
    if not has_mixers:
        plan = replace(plan, parts=tuple(part for part in plan.parts if ".mixer." not in part.target))
    apply_warm_start(model, plan, reader.read)
