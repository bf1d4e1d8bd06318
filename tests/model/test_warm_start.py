"""Warm start: exact names, strict files, every variant's weights by what they mean, and a report that adds up."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m4v_dist import tensor_files
from m4v_dist.blocks.attention import AttentionMixer
from m4v_dist.blocks.mamba1_mixer import Mamba1Mixer
from m4v_dist.blocks.ssm_mixer import MilMixer, SsmMixer
from m4v_dist.config.model_settings import KernelSettings, ModelSettings
from m4v_dist.errors import DataError
from m4v_dist.kernels.conv1d import causal_conv1d
from m4v_dist.model.build import build_model, build_on_meta
from m4v_dist.model.checkpoint_files import CheckpointReader, find_files
from m4v_dist.model.checkpoint_names import from_pyramidflow_name, to_pyramidflow_name
from m4v_dist.model.pyramid import PyramidModel
from m4v_dist.model.warm_start import WarmStart, apply_warm_start, plan_warm_start
from m4v_dist.model.warm_start_report import report_json, report_parameters, report_table, totals
from m4v_dist.weights_file import TensorLayout
from tests.conftest import GOLDEN, load_golden
from tests.model.golden_transformer import layout_of, settings_of, single_clip_input, weights_of

KERNELS = KernelSettings()
VARIANTS = ("mamba2", "mil", "mamba1")
SIZES = {"temporal_width": 16, "temporal_heads": 2}


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return load_golden("pyramid_flux_transformer")


def _ssm(description: dict[str, Any], variant: str, **options: Any) -> dict[str, Any]:
    """An SSM that fits the golden widths; mamba2 has two heads for each of attention's and each `expand`."""
    sizes: dict[str, int] = {"chunk_size": 16}
    if variant == "mamba2":
        sizes |= {"expand": 2, "head_dim": description["config"]["attention_head_dim"] // 2, "state_dim": 24}
    return {"ssm": {"variant": variant, **sizes, **options}, **SIZES}


def _with_two_unified_blocks(
    description: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The golden config and weights, cut to two unified blocks or filled up with a copy of the first."""
    block = "single_transformer_blocks."
    weights = weights_of(tensors)
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(block)}
    for number in range(2):
        source = f"{block}{min(number, description['config']['num_single_layers'] - 1)}."
        kept |= {
            f"{block}{number}.{name.removeprefix(source)}": tensor
            for name, tensor in weights.items()
            if name.startswith(source)
        }
    return {**description["config"], "num_single_layers": 2}, kept


def _warm(settings: ModelSettings, weights: dict[str, Tensor], seed: int = 3) -> tuple[PyramidModel, WarmStart]:
    """A model built from a seed and filled from PyramidFlow's weights, and the plan."""
    model = build_model(settings, KERNELS, seed=seed)
    assert isinstance(model, PyramidModel)
    plan = plan_warm_start(model, layout_of(weights), "made")
    apply_warm_start(model, plan, weights.__getitem__)
    return model, plan


def _tokens(num: int, width: int) -> Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(8))


# ---- names


def _full_size() -> tuple[dict[str, Any], dict[str, TensorLayout]]:
    reference = json.loads((GOLDEN / "keys_pyramid_miniflux.json").read_text())
    return reference, {name: TensorLayout(tuple(shape), "bfloat16") for name, shape in reference["keys"].items()}


def test_names_are_those_of_miniflux_exactly_and_both_ways() -> None:
    reference, layout = _full_size()
    model = build_on_meta(settings_of(reference["config"]), KERNELS)
    ours = [name for name, _ in model.named_parameters()]
    assert {to_pyramidflow_name(name) for name in ours} == layout.keys()
    assert [from_pyramidflow_name(to_pyramidflow_name(name)) for name in ours] == ours


@pytest.mark.parametrize("name", ["transformer_blocks.0.attn.to_z.weight", "x_embedder2.bias", "proj_out"])
def test_a_foreign_name_has_no_name_of_ours(name: str) -> None:
    with pytest.raises(ValueError, match="no parameter of PyramidFlow"):
        from_pyramidflow_name(name)
    with pytest.raises(ValueError, match="no parameter of a model with mixer='attention'"):
        to_pyramidflow_name(name)


@pytest.mark.parametrize("mixer", ["attention", "ssm", "parallel", "post_half", "pre_half", "interleaved"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_config_of_full_size_takes_miniflux_and_accounts_for_every_weight(mixer: Any, variant: str) -> None:
    reference, layout = _full_size()
    model = build_on_meta(ModelSettings(preset="m4v_2b", mixer=mixer, ssm={"variant": variant}), KERNELS)
    plan = plan_warm_start(model, layout, "release")
    taken = {source for part in plan.parts for source in part.sources}
    assert not taken & set(plan.unused) and taken | set(plan.unused) == layout.keys()
    # Keys and queries are all that any variant leaves out.
    num_ssm = sum(kind == "ssm" for kind in model.settings.block_mixers)
    assert len(plan.unused) == (6 * num_ssm if variant == "mamba1" else 0)
    assert not {name for name in plan.unused if ".attn.to_v" in name or ".attn." not in name}
    sums = totals(report_parameters(model, plan))
    assert sum(sums.values()) == sum(parameter.numel() for parameter in model.parameters())
    if mixer == "attention":
        assert sums == {"loaded": reference["parameters_total"], "mapped": 0, "set": 0, "fresh": 0}


# ---- what the weights mean


@pytest.mark.parametrize("prefix", ["", "dit."])
@pytest.mark.parametrize(("case", "output"), [("image", "out.image"), ("clip", "out.clip.causal")])
def test_the_golden_transformer_read_from_a_file_gives_its_outputs(
    golden: tuple[dict[str, Any], dict[str, Tensor]], tmp_path: Path, prefix: str, case: str, output: str
) -> None:
    description, tensors = golden
    path = str(tmp_path / "diffusion_pytorch_model.safetensors")
    tensor_files.write_tensors(path, {prefix + name: tensor for name, tensor in weights_of(tensors).items()})
    model = build_model(settings_of(description["config"]), KERNELS, seed=0)
    assert isinstance(model, PyramidModel)
    reader = CheckpointReader(find_files(str(tmp_path), "here"))
    apply_warm_start(model, plan_warm_start(model, reader.layout, path), reader.read)
    tolerance = description["tolerance"]["recommended"]["outputs"]
    for actual, expected in zip(model(single_clip_input(tensors, case)), tensors[output], strict=True):
        torch.testing.assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_parallel_model_starts_as_pyramidflow_and_its_scan_can_learn(
    golden: tuple[dict[str, Any], dict[str, Tensor]], variant: str
) -> None:
    description, tensors = golden
    settings = settings_of(description["config"], mixer="parallel", **_ssm(description, variant))
    model, _ = _warm(settings, weights_of(tensors))
    # Level 0: the temporal branch has no sub-images to cut the case's odd grid into.
    outputs = model(single_clip_input(tensors, "clip", level=0))
    for actual, expected in zip(outputs, tensors["out.clip.causal"], strict=True):
        torch.testing.assert_close(actual, expected, **description["tolerance"]["recommended"]["outputs"])
    sum(out.square().mean() for out in outputs).backward()  # type: ignore[union-attr]
    last = "norm_weight" if variant == "mil" else "out_proj.weight"
    for number in range(settings.num_single_blocks):
        closed = model.get_parameter(f"single_blocks.{number}.mixer.ssm.ssm.{last}")
        assert torch.count_nonzero(closed) == 0
        assert closed.grad is not None and closed.grad.abs().max() > 0


def _attention_and_mixer(
    golden: tuple[dict[str, Any], dict[str, Tensor]], variant: str, **options: Any
) -> tuple[AttentionMixer, nn.Module]:
    """The last block's attention as PyramidFlow has it, and the SSM that was made of it."""
    description, tensors = golden
    weights = weights_of(tensors)
    attention, _ = _warm(settings_of(description["config"]), weights)
    settings = settings_of(description["config"], mixer="ssm", **_ssm(description, variant, **options))
    model, _ = _warm(settings, weights)
    ours, theirs = (made.single_blocks[-1].mixer for made in (model, attention))
    assert isinstance(theirs, AttentionMixer)
    return theirs, ours.ssm  # type: ignore[return-value, union-attr]


@torch.no_grad()
def test_mil_with_decay_1_and_step_1_is_linear_attention_of_pyramidflow_s_weights(
    golden: tuple[dict[str, Any], dict[str, Tensor]],
) -> None:
    attention, mixer = _attention_and_mixer(golden, "mil")
    assert isinstance(mixer, MilMixer)
    # All that is not attention's stands still: no decay, a step of 1; D is zero already.
    mixer.A_log.fill_(-math.inf)
    mixer.in_proj.weight[mixer.rows["dt"]] = 0
    mixer.in_proj.bias[mixer.rows["dt"]] = 0
    mixer.dt_bias.fill_(math.log(math.e - 1))
    tokens = _tokens(40, mixer.inner_width)
    q, k, v = attention.qkv(tokens, None)
    expected = torch.einsum("nts,snp->tnp", torch.einsum("tnp,snp->nts", q, k).tril(), v)
    y, z = mixer.scan(tokens[None])
    torch.testing.assert_close(F.silu(z), torch.ones_like(z), rtol=0, atol=1e-4)
    torch.testing.assert_close(y[0], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    # The product of keys and queries would not show their norms' weights exchanged.
    assert torch.equal(mixer.norm_B.weight, attention.qkv.norm_k.weight)
    assert torch.equal(mixer.norm_C.weight, attention.qkv.norm_q.weight)
    assert not torch.equal(mixer.norm_B.weight, mixer.norm_C.weight)


@pytest.mark.parametrize("gate", ["silu", "sum"])
@torch.no_grad()
def test_mil_starts_at_a_share_of_the_values_size_whatever_that_is(
    golden: tuple[dict[str, Any], dict[str, Tensor]], gate: str
) -> None:
    attention, mixer = _attention_and_mixer(golden, "mil", gate=gate)
    assert isinstance(mixer, MilMixer)
    heads = attention.qkv.num_heads
    tokens = _tokens(4000, mixer.inner_width)
    values = attention.qkv.to_v(tokens).unflatten(-1, (heads, -1))
    mixed = mixer(tokens[None])[0].unflatten(-1, (heads, -1))
    ratio = mixed.square().mean((0, 2)).sqrt() / values.square().mean((0, 2)).sqrt()
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.3), rtol=0.05, atol=0)


@pytest.mark.parametrize("options", [{}, {"state_dim": 3}, {"num_groups": 2}, {"expand": 1}, {"expand": 3}])
@torch.no_grad()
def test_mamba2_scans_attention_s_values_by_the_mean_of_its_heads_keys(
    golden: tuple[dict[str, Any], dict[str, Tensor]], options: dict[str, Any]
) -> None:
    attention, mixer = _attention_and_mixer(golden, "mamba2", **options)
    assert isinstance(mixer, SsmMixer)
    settings, qkv = mixer.settings, attention.qkv
    tokens = _tokens(30, qkv.to_v.in_features)

    def mean(linear: nn.Linear, norm: Tensor) -> Tensor:
        heads = linear(tokens).unflatten(-1, (qkv.num_heads, -1)).mean(1) * norm
        width = heads.shape[-1]
        return torch.cat([heads[:, [n % width for n in range(settings.state_dim)]]] * settings.num_groups, dim=-1)

    values = torch.cat([qkv.to_v(tokens)] * settings.expand, dim=-1)
    expected = torch.cat([values, mean(qkv.to_k, qkv.norm_k.weight), mean(qkv.to_q, qkv.norm_q.weight)], dim=-1)
    made = mixer.in_proj(tokens)[:, mixer.rows["x"].start : mixer.rows["C"].stop]
    _assert_convolved(mixer, made, expected)
    # out_proj gives back what all copies hold.
    torch.testing.assert_close(mixer.out_proj(values), qkv.to_v(tokens), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_mamba1_scans_attention_s_values(golden: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    attention, mixer = _attention_and_mixer(golden, "mamba1")
    assert isinstance(mixer, Mamba1Mixer)
    tokens = _tokens(30, attention.qkv.to_v.in_features)
    values = torch.cat([attention.qkv.to_v(tokens)] * mixer.settings.expand, dim=-1)
    _assert_convolved(mixer, mixer.in_proj(tokens)[:, mixer.rows["x"]], values)
    torch.testing.assert_close(mixer.out_proj(values), attention.qkv.to_v(tokens), rtol=1e-5, atol=1e-5)


def _assert_convolved(mixer: SsmMixer | Mamba1Mixer, made: Tensor, expected: Tensor) -> None:
    """The mixer's convolution of what in_proj makes is that of what attention makes, biases and all.

    But for the first tokens, whose taps reach over the start: attention's bias stands in no token there.
    """
    ours = causal_conv1d(made[None], mixer.conv_weight, mixer.conv_bias)
    theirs = causal_conv1d(expected[None], mixer.conv_weight, None)
    assert ours.abs().max() > 0.1
    reach = mixer.settings.conv_width - 1
    torch.testing.assert_close(F.silu(ours)[:, reach:], F.silu(theirs)[:, reach:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mixer", ["ssm", "parallel", "interleaved"])
def test_what_is_reported_fresh_is_the_seed_s_and_all_else_is_not(
    golden: tuple[dict[str, Any], dict[str, Tensor]], variant: str, mixer: str
) -> None:
    description, tensors = golden
    config, golden_weights = _with_two_unified_blocks(description, tensors)
    settings = settings_of(config, mixer=mixer, **_ssm(description, variant))
    # So far off that a fresh model has none of them by chance.
    weights = {name: tensor + 10 for name, tensor in golden_weights.items()}
    model, plan = _warm(settings, weights, seed=3)
    fresh = build_model(settings, KERNELS, seed=3).state_dict()
    reports = {report.name: report for report in report_parameters(model, plan)}
    assert list(reports) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        num_changed = int((parameter != fresh[name]).sum())
        counts = reports[name].counts
        assert sum(counts.values()) == parameter.numel()
        filled = parameter.numel() - counts["fresh"]
        # What is set may be as it was: a zero, or the closed half of a matrix.
        assert filled - counts["set"] <= num_changed <= filled, (name, counts, num_changed)
    drawn = {name for name, report in reports.items() if report.state == "fresh"}
    kinds = (
        "registers",
        "temporal_branch.",
        "A_log",
        "dt_bias",
        ".D",
        "conv_",
        "norm_weight",
        "x_proj",
        "dt_proj",
    )
    assert drawn and not {name for name in drawn if not any(kind in name for kind in kinds)}


# ---- the report


def test_the_table_has_a_line_for_every_kind_of_parameter_and_the_json_one_for_each(
    golden: tuple[dict[str, Any], dict[str, Tensor]],
) -> None:
    description, tensors = golden
    config, weights = _with_two_unified_blocks(description, tensors)
    settings = settings_of(config, mixer="interleaved", **_ssm(description, "mamba1"))
    layout = layout_of(weights | {"vae.encoder.conv.weight": torch.zeros(1)})
    model = build_on_meta(settings, KERNELS)
    plan = plan_warm_start(model, layout, "made")
    reports = report_parameters(model, plan)
    table = report_table(reports, plan).splitlines()
    line = next(line for line in table if line.startswith("single_blocks.*.mixer.ssm.in_proj.weight"))
    width = settings.hidden_size
    assert f"{2 * width * width:,}" in line and "mapped, fresh" in line and "x <- to_v, 2 times" in line
    assert next(line for line in table if line.startswith("all ")).split()[1:] == [
        f"{count:,}" for count in totals(reports).values()
    ]
    assert "6 of the checkpoint's weights have no place" in table[-2] and "attn.to_q.weight" in table[-2]
    assert table[-1].startswith("1 weights of other networks")
    stored = json.loads(json.dumps(report_json(reports, plan)))
    by_name = {entry["name"]: entry for entry in stored["parameters"]}
    assert by_name.keys() == dict(model.named_parameters()).keys()
    assert by_name["single_blocks.1.mixer.ssm.in_proj.weight"]["sources"] == [
        "single_transformer_blocks.1.attn.to_v.weight"
    ]
    assert stored["counts"] == totals(reports) and stored["other_nets"] == ["vae.encoder.conv.weight"]


# ---- bad checkpoints


def _without(weights: dict[str, Tensor]) -> None:
    del weights["x_embedder.weight"]


def _with_more(weights: dict[str, Tensor]) -> None:
    weights["transformer_blocks.0.attn.to_z.weight"] = torch.zeros(2)


def _deeper(weights: dict[str, Tensor]) -> None:
    block = "single_transformer_blocks.0."
    weights |= {
        name.replace(block, "single_transformer_blocks.77."): tensor.clone()
        for name, tensor in weights.items()
        if name.startswith(block)
    }


def _of_another_shape(weights: dict[str, Tensor]) -> None:
    weights["proj_out.weight"] = weights["proj_out.weight"][:-1]


def _of_another_dtype(weights: dict[str, Tensor]) -> None:
    weights["proj_out.weight"] = weights["proj_out.weight"].to(torch.int32)


def _of_another_model(weights: dict[str, Tensor]) -> None:
    weights.clear()
    weights |= {"blocks.0.self_attn.q.weight": torch.zeros(4, 4), "head.modulation": torch.zeros(1, 2, 4)}


def _under_both_names(weights: dict[str, Tensor]) -> None:
    weights["dit.proj_out.bias"] = weights["proj_out.bias"].clone()


@pytest.mark.parametrize("mixer", ["attention", "ssm"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_without, r"1 missing \(x_embedder.weight\)"),
        (_with_more, r"1 too many \(transformer_blocks.0.attn.to_z.weight\)"),
        (_deeper, r"\d+ too many \(single_transformer_blocks.77"),
        (_of_another_shape, r"proj_out.weight: file \[\d+, \d+\], wanted \[\d+, \d+\]"),
        (_of_another_dtype, r"proj_out.weight: file int32, wanted float32, bfloat16 or float16"),
        (_of_another_model, r"2 tensors, wanted \d+.*missing.*2 too many \(blocks.0.self_attn.q.weight"),
        (_under_both_names, r"holds both dit.proj_out.bias and proj_out.bias"),
    ],
)
def test_a_checkpoint_that_is_not_this_model_s_is_refused_by_name_before_a_tensor_is_read(
    golden: tuple[dict[str, Any], dict[str, Tensor]],
    tmp_path: Path,
    mixer: str,
    harm: Callable[[dict[str, Tensor]], None],
    message: str,
) -> None:
    description, tensors = golden
    weights = weights_of(tensors)
    harm(weights)
    path = str(tmp_path / "bad.safetensors")
    tensor_files.write_tensors(path, weights)
    model = build_on_meta(settings_of(description["config"], mixer=mixer, **_ssm(description, "mamba2")), KERNELS)
    with pytest.raises(DataError, match=rf"bad.safetensors: .*{message}"):
        plan_warm_start(model, CheckpointReader([path]).layout, path)
