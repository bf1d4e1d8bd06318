"""The real tiny model under the engine's bfloat16: what must stay float32 inside forward does, at each ZeRO stage."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m4v_dist.batch import ModelInput
from m4v_dist.blocks import cut_scan
from m4v_dist.config.model_settings import KernelSettings, ModelSettings
from m4v_dist.config.training_settings import TrainerSettings
from m4v_dist.model.build import build_model
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer.deepspeed_engine import ZeroEngine
from tests.model.test_pyramid import TINY, VARIANTS, _columns
from tests.trainer.ranks import run_ranks

SCAN_PARAMETERS = ("A_log", "dt_bias", "D", "norm_weight", "conv_weight", "conv_bias")


def _dtypes_job(zero_stage: int, model: ModelSettings) -> dict[str, list[str]]:
    """One step; for each name the dtypes that were seen inside forward."""
    mesh = Mesh.of_process_group(use_gpu=False)
    settings = TrainerSettings(zero_stage=zero_stage, precision="bfloat16")
    built = build_model(model, KernelSettings(), seed=1)
    engine = ZeroEngine(built, settings, freeze=(), micro_batch_slots=4, mesh=mesh)
    seen: dict[str, set[str]] = defaultdict(set)

    def note_parameters(module: nn.Module, _: object) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            kind = name if name in SCAN_PARAMETERS else f"{type(module).__name__}.{name}"
            seen[kind].add(str(parameter.dtype))

    def note_output(module: nn.Module, _: object, output: Any) -> None:
        if isinstance(output, Tensor):
            seen[f"{type(module).__name__} gives"].add(str(output.dtype))

    for module in engine.model.module.modules():
        module.register_forward_pre_hook(note_parameters)
        module.register_forward_hook(note_output)

    def noted(scan: Any) -> Any:
        def noted_scan(*values: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
            seen["scan A"].add(str(values[2].dtype))
            y, state = scan(*values, **others)
            seen["scan state"].add(str(state.dtype))
            return y, state

        return noted_scan

    cut_scan.ssd_scan = noted(cut_scan.ssd_scan)
    cut_scan.selective_scan = noted(cut_scan.selective_scan)
    with engine.accumulate():
        outputs = engine.model(ModelInput(_columns()))
        seen["prediction"] = {str(output.dtype) for output in outputs}
        engine.backward(torch.stack([output.square().mean() for output in outputs]).sum())
    seen["stepped"] = {str(engine.step(lr=1e-3) is not None)}
    return {name: sorted(found) for name, found in seen.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "variant"), [(2, "mamba2"), (3, "mamba2"), (3, "mil"), (3, "mamba1")])
def test_scan_parameters_and_norms_are_float32_inside_forward_and_matmuls_are_not(
    zero_stage: int, variant: str
) -> None:
    # both kinds of mixer in one model
    model = TINY.model_copy(update={**VARIANTS.get(variant, {}), "mixer": "parallel"})
    assert model.ssm.variant == variant
    (seen,) = run_ranks(_dtypes_job, 1, zero_stage, model)
    assert seen["stepped"] == ["True"]
    no_norm = {"norm_weight"} if variant == "mamba1" else set()
    for name in (*(set(SCAN_PARAMETERS) - no_norm), "scan A", "scan state", "prediction"):
        assert seen[name] == ["torch.float32"], (name, seen[name])
    norms = {name: found for name, found in seen.items() if "norm" in name.lower()}
    assert len(norms) > 1
    assert all(found == ["torch.float32"] for found in norms.values()), norms
    assert all(found == ["torch.float32"] for name, found in seen.items() if name.endswith(("weight", "bias")))
    assert "torch.bfloat16" in seen["Linear gives"]
