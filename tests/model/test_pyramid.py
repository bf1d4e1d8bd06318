"""The pyramid backbone: with attention equal to miniFLUX, tight between columns, trainable with MM-DiM."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m4v_dist.batch import Column, ModelInput, TextFeatures
from m4v_dist.config.model_settings import KernelSettings, ModelSettings
from m4v_dist.model.build import build_model, build_on_meta
from m4v_dist.model.checkpoint_names import from_pyramidflow_name
from m4v_dist.model.pyramid import PyramidModel
from m4v_dist.model.warm_start import apply_warm_start, plan_warm_start
from tests.conftest import GOLDEN, load_golden
from tests.model.golden_transformer import layout_of, settings_of, single_clip_input, text_of, weights_of

KERNELS = KernelSettings()


def _golden_model(has_temporal_mask: bool = True) -> tuple[nn.Module, dict[str, Any], dict[str, Tensor]]:
    description, tensors = load_golden("pyramid_flux_transformer")
    settings = settings_of(description["config"], has_temporal_mask=has_temporal_mask)
    model, weights = build_model(settings, KERNELS, seed=0), weights_of(tensors)
    assert isinstance(model, PyramidModel)
    apply_warm_start(model, plan_warm_start(model, layout_of(weights), "golden"), weights.__getitem__)
    return model, description, tensors


def _row_input(description: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[ModelInput, list[tuple[int, int]]]:
    """All columns of all batch rows as one packed input, and (row, column) of each."""
    stages = description["stages_of_columns"]
    num_rows = len(tensors["in.row.timestep_ratio"]) // len(stages)
    columns, owners = [], []
    for row in range(num_rows):
        for number, stage in enumerate(stages):
            prefix = f"in.row.column{number}.clip"
            clips = tuple(tensors[f"{prefix}{j}"][row] for j in range(sum(n.startswith(prefix) for n in tensors)))
            levels = _levels(clips, stage)
            entry = row * len(stages) + number
            timestep = tensors["in.row.timestep_ratio"][entry]
            columns.append(Column(clips, levels, text_of(tensors, "row", entry), timestep))
            owners.append((row, number))
    return ModelInput(tuple(columns)), owners


def _levels(clips: tuple[Tensor, ...], stage: int) -> tuple[int, ...]:
    height = clips[-1].shape[2]
    return tuple(stage - (height // clip.shape[2]).bit_length() + 1 for clip in clips)


@pytest.mark.parametrize(
    ("case", "output", "mask"),
    [("image", "out.image", True), ("clip", "out.clip.causal", True), ("clip", "out.clip.not_causal", False)],
)
def test_one_clip_gives_pyramidflow_outputs(case: str, output: str, mask: bool) -> None:
    model, description, tensors = _golden_model(mask)
    tolerance = description["tolerance"]["recommended"]["outputs"]
    for actual, expected in zip(model(single_clip_input(tensors, case)), tensors[output], strict=True):
        torch.testing.assert_close(actual, expected, **tolerance)


def test_a_row_of_columns_gives_pyramidflow_outputs_loss_and_gradients() -> None:
    model, description, tensors = _golden_model()
    recommended = description["tolerance"]["recommended"]
    model_input, owners = _row_input(description, tensors)
    losses = []
    for actual, (row, number) in zip(model(model_input), owners, strict=True):
        torch.testing.assert_close(actual, tensors[f"out.row.column{number}"][row], **recommended["outputs"])
        losses.append((actual - tensors[f"in.row.column{number}.target"][row]).square().mean())
    loss = torch.stack(losses).mean()
    torch.testing.assert_close(loss, tensors["out.row.loss"], rtol=1e-5, atol=0)
    loss.backward()
    parameters = dict(model.named_parameters())
    checked = [name for name in tensors if name.startswith("grad.")]
    assert checked
    for name in checked:
        grad = parameters[from_pyramidflow_name(name.removeprefix("grad."))].grad
        assert grad is not None
        error = float((grad - tensors[name]).abs().max() / tensors[name].abs().max())
        assert error < recommended["grads_rel_to_max"], (name, error)


def test_position_ids_equal_pyramidflow() -> None:
    from m4v_dist.blocks.layout import packed_layout
    from m4v_dist.model.pyramid import column_shape

    description, tensors = load_golden("pyramid_flux_transformer")
    settings = settings_of(description["config"])
    model_input, owners = _row_input(description, tensors)
    for column, (_, number) in zip(model_input.columns, owners, strict=True):
        layout = packed_layout((column_shape(column, settings),), torch.device("cpu"))
        torch.testing.assert_close(layout.positions, tensors[f"mid.row.column{number}.visual_position_ids"][0])


def test_full_size_attention_model_has_miniflux_names_and_shapes() -> None:
    reference = json.loads((GOLDEN / "keys_pyramid_miniflux.json").read_text())
    model = build_on_meta(settings_of(reference["config"]), KERNELS)
    ours = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    assert ours == {from_pyramidflow_name(name): shape for name, shape in reference["keys"].items()}
    assert sum(parameter.numel() for parameter in model.parameters()) == reference["parameters_total"]


def _tiny(**options: Any) -> ModelSettings:
    return ModelSettings(
        num_double_blocks=1, num_single_blocks=2, text_width=12, pooled_width=6, temporal_width=16, **options
    )


TINY = _tiny(ssm={"expand": 2, "head_dim": 32, "state_dim": 8, "chunk_size": 16})


def _perturbed(settings: ModelSettings) -> nn.Module:
    """A model none of whose branches is multiplied by zero."""
    model = build_model(settings, KERNELS, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def _column(seed: int, stage: int, unit: int, num_text: int) -> Column:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def clip(level: int) -> Tensor:
        return draw(16, 1, 4 * 2**level, 8 * 2**level)

    levels = [max(0, stage - age) for age in range(unit - 1)][::-1] + [stage]
    text = TextFeatures(draw(num_text, 12), draw(6))
    return Column(tuple(clip(level) for level in levels), tuple(levels), text, torch.tensor(100.0 * seed))


def _columns() -> tuple[Column, ...]:
    return (_column(1, 2, 4, 5), _column(2, 0, 3, 9), _column(3, 1, 1, 1), _column(4, 2, 1, 7))


VARIANTS: dict[str, dict[str, Any]] = {
    "ssm": {},
    "parallel": {"mixer": "parallel"},
    "attention": {"mixer": "attention"},
    "no_sandwich": {"has_text_sandwich": False},
    "no_registers": {"has_registers": False},
    "one_path": {"num_zigzag_paths": 1},
    "no_temporal_branch": {"has_temporal_branch": False},
    "sum_gate": {"ssm": TINY.ssm.model_copy(update={"gate": "sum"})},
    "mil": {"ssm": _tiny(ssm={"variant": "mil", "chunk_size": 16}).ssm},
    "mamba1": {"ssm": _tiny(ssm={"variant": "mamba1", "state_dim": 4, "chunk_size": 16}).ssm},
    "post_half": {"mixer": "post_half"},
    "pre_half": {"mixer": "pre_half"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_packed_column_equals_the_column_alone(variant: str) -> None:
    """Nothing leaks between columns, whatever mixes the tokens."""
    model = _perturbed(TINY.model_copy(update=VARIANTS[variant]))
    columns = _columns()
    packed = model(ModelInput(columns))
    for column, together in zip(columns, packed, strict=True):
        (alone,) = model(ModelInput((column,)))
        assert alone.abs().max() > 1e-2
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter(variant: str) -> None:
    model = _perturbed(TINY.model_copy(update=VARIANTS[variant]))
    sum(out.square().mean() for out in model(ModelInput(_columns()))).backward()  # type: ignore[union-attr]
    # Softmax over keys removes a bias that all keys share; elsewhere the norm of the keys keeps it alive.
    silent = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert not {name for name in silent if not name.endswith("temporal_branch.to_k.bias")}


@pytest.mark.parametrize("variant", ["ssm", "attention", "parallel"])
def test_every_clip_and_the_text_change_the_prediction(variant: str) -> None:
    model = _perturbed(TINY.model_copy(update=VARIANTS[variant]))
    column = _column(1, 2, 4, 5)
    (before,) = model(ModelInput((column,)))
    changed = [
        replace(column, clips=tuple(clip + (number == j) for number, clip in enumerate(column.clips)))
        for j in range(len(column.clips))
    ]
    changed.append(replace(column, text=replace(column.text, tokens=column.text.tokens + 1)))
    changed.append(replace(column, text=replace(column.text, pooled=column.text.pooled + 1)))
    changed.append(replace(column, timestep=column.timestep / 2))
    for number, other in enumerate(changed):
        (after,) = model(ModelInput((other,)))
        assert (after - before).abs().max() > 1e-4, number


@pytest.mark.parametrize("variant", ["ssm", "mil", "mamba1"])
def test_every_kind_of_recompute_gives_the_same_loss_and_gradients(variant: str) -> None:
    results = []
    for recompute in ("none", "blocks", "selective"):
        model = _perturbed(TINY.model_copy(update={**VARIANTS[variant], "recompute": recompute}))
        loss = sum(out.square().mean() for out in model(ModelInput(_columns())))
        loss.backward()  # type: ignore[union-attr]
        results.append((loss, [parameter.grad for parameter in model.parameters()]))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=0, atol=0)


class _Kept(TorchDispatchMode):
    """Bytes of all tensors made inside that are still alive, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def size_bytes(self) -> int:
        return sum(size for storage, size in self.storages.values() if not storage.expired())


def _kept_bytes(**options: Any) -> int:
    """What a forward leaves alive for its backward."""
    model = _perturbed(TINY.model_copy(update=options))
    model(ModelInput(_columns()))  # makes the tables, which stay
    with _Kept() as kept:
        out = model(ModelInput(_columns()))
    assert out[0].grad_fn is not None
    return kept.size_bytes()


@pytest.mark.parametrize("mixer", ["ssm", "attention"])
def test_selective_recompute_keeps_less_than_none_and_more_than_blocks(mixer: str) -> None:
    none, selective, blocks, half = (
        _kept_bytes(mixer=mixer, recompute=recompute, recompute_fraction=fraction)
        for recompute, fraction in (("none", 1.0), ("selective", 1.0), ("blocks", 1.0), ("blocks", 0.5))
    )
    assert blocks < selective < 0.7 * none
    assert blocks < half < none
    assert _kept_bytes(mixer=mixer, recompute="blocks", recompute_fraction=0.0) == none


def test_a_fraction_of_the_blocks_recomputes_from_the_first() -> None:
    settings = TINY.model_copy(update={"recompute": "selective", "recompute_fraction": 0.75})
    assert [settings.recompute_of(number, 4) for number in range(4)] == ["selective"] * 3 + ["none"]
    assert [settings.recompute_of(number, 1) for number in range(1)] == ["selective"]


@pytest.mark.parametrize("variant", ["ssm", "mil", "mamba1"])
def test_under_autocast_the_sensitive_parts_stay_float32(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the matmuls may round: what the scan, the norms and the modulation are given and give is float32."""
    from m4v_dist.blocks import cut_scan

    model = _perturbed(TINY.model_copy(update=VARIANTS[variant]))
    seen: dict[str, torch.dtype] = {}
    norms: dict[str, set[torch.dtype]] = {"Modulation": set(), "HeadNorm": set(), "ConditioningEmbedding": set()}

    def watch(module: Any, name: str) -> None:
        original = getattr(module, name)

        def spy(x: Tensor, dt: Tensor, A: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
            y, state = original(x, dt, A, *args, **options)
            seen.update(A=A.dtype, D=args[2].dtype, dt_bias=options["dt_bias"].dtype, state=state.dtype, x=x.dtype)
            return y, state

        monkeypatch.setattr(module, name, spy)

    watch(cut_scan, "ssd_scan")
    watch(cut_scan, "selective_scan")
    for module in model.modules():
        if type(module).__name__ in norms:
            module.register_forward_hook(lambda m, _inputs, out: norms[type(m).__name__].add(out[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(ModelInput(_columns()))
    assert seen.pop("x") == torch.bfloat16, "the test ran without autocast"
    assert set(seen) == {"A", "D", "dt_bias", "state"}
    assert set(seen.values()) == {torch.float32}
    assert all(dtypes == {torch.float32} for dtypes in norms.values()), norms
    plain = model(ModelInput(_columns()))
    for rounded, exact in zip(outputs, plain, strict=True):
        assert rounded.dtype == torch.float32
        assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_layout_first_seen_in_inference_mode_still_trains() -> None:
    """The layout cache outlives a validation sample; inference tensors in it would break the next backward."""
    model = _perturbed(TINY)
    model_input = ModelInput((_column(7, 1, 2, 13),))
    with torch.inference_mode():
        (sampled,) = model(model_input)
    (trained,) = model(model_input)
    trained.square().mean().backward()
    torch.testing.assert_close(trained.detach(), sampled.clone())
