"""`jobs.export`: a checkpoint as one file; adapters alone, or merged so that a model without them gives the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import cli
from jobs.export import export, fingerprint
from m4v_dist import tensor_files
from m4v_dist.batch import Column, ModelInput, TextFeatures
from m4v_dist.blocks.lora import is_adapter, merge_adapters
from m4v_dist.config.load import parse_config
from m4v_dist.config.model_settings import LoraSettings
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.model.build import build_model
from m4v_dist.model.start_weights import write_start_weights
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer.checkpoint_save import save
from m4v_dist.trainer.ranges import to_ranges
from tests.integration.small_run import to_toml
from tests.jobs.sampled_run import sample_config
from tests.trainer.ranks import run_ranks

LORA = {"rank": 3, "alpha": 6.0}


def _config(folder: str, *, lora: dict[str, Any] | None = LORA, **export_values: Any) -> RunConfig:
    values = sample_config(folder).model_dump(mode="json")
    values["model"]["lora"] |= lora or {}
    values["curriculum"] = [{**stage, "freeze": ["base"] if lora else []} for stage in values["curriculum"]]
    return parse_config({**values, "export": export_values}, where="test")


def _trained(config: RunConfig, seed: int) -> torch.nn.Module:
    """As if trained: no block is closed and no adapter silent. The base is that of seed 5, whatever the seed."""
    model = build_model(config.model, config.kernels, seed=5)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            own = seed if is_adapter(name) or not config.model.lora.rank else 5
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(own))
    return model.eval()


def _save_job(config_json: str) -> None:
    """Two ranks, halves of each parameter; the average of the base is not stored, as in training."""
    config = parse_config(json.loads(config_json), where="test")
    mesh = Mesh.of_process_group(use_gpu=False)
    tensors = {}
    for kind, seed in (("weights", 1), ("ema", 2)):
        state = _trained(config, seed).state_dict()
        if kind == "ema" and config.model.lora.rank:
            state = {name: tensor for name, tensor in state.items() if is_adapter(name)}
        shapes = {name: list(tensor.shape) for name, tensor in state.items()}
        halves = {name: tensor.reshape(-1).tensor_split(2) for name, tensor in state.items()}
        starts = {name: mesh.rank * len(parts[0]) for name, parts in halves.items()}
        tensors |= to_ranges(kind, [(name, starts[name], parts[mesh.rank]) for name, parts in halves.items()], shapes)
        if kind == "weights":
            all_shapes = shapes
    for step in (4, 5):
        save(config.checkpoint_folder, step, tensors=tensors, state={"shapes": all_shapes}, config=config, mesh=mesh)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run with adapters, and one without."""
    folders = {kind: str(tmp_path_factory.mktemp(kind)) for kind in ("lora", "plain")}
    for kind, folder in folders.items():
        run_ranks(_save_job, 2, _config(folder, lora=LORA if kind == "lora" else None).model_dump_json())
    return folders


def _output(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    clips = tuple(torch.randn(16, 1, 8 * 2**level, 8 * 2**level, generator=generator) for level in (0, 1, 1))
    text = TextFeatures(*(torch.randn(*size, 384, generator=generator) for size in ((9,), ())))
    with torch.no_grad():
        (velocity,) = model(ModelInput((Column(clips, (0, 1, 1), text, torch.tensor(500.0)),)))
    assert isinstance(velocity, torch.Tensor)
    return velocity


@pytest.mark.parametrize(("weights", "seed"), [("raw", 1), ("ema", 2)])
def test_the_merged_model_gives_what_the_adapted_one_gives(
    runs: dict[str, str], tmp_path: Path, weights: str, seed: int
) -> None:
    out = str(tmp_path / "out.safetensors")
    config = _config(runs["lora"], weights=weights, path=out)
    assert f"tensors of {runs['lora']}/checkpoints/step_00000005" in export(config, False)
    adapted = _trained(config, seed)
    plain = config.model.model_copy(update={"lora": LoraSettings()})
    merged = build_model(plain, config.kernels, seed=0)
    merged.load_state_dict(tensor_files.read_tensors(out))
    expected, silent = _output(adapted), _output(_silenced(_trained(config, seed)))
    assert (expected - silent).abs().max() > 1e-2
    torch.testing.assert_close(_output(merged.eval()), expected, rtol=1e-4, atol=1e-5)
    # tensor by tensor it is what the whole-state twin makes
    for name, tensor in merge_adapters(adapted.state_dict(), config.model.lora).items():
        assert torch.equal(merged.state_dict()[name], tensor), name


def _silenced(model: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in model.named_parameters():
        if name.endswith("lora_up"):
            parameter.data.zero_()
    return model


def test_adapters_alone_name_their_base(runs: dict[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "adapters.safetensors")
    config = _config(runs["lora"], what="adapters", path=out, checkpoint="step_00000004")
    assert "step_00000004" in export(config, False)
    state, found = _trained(config, 2).state_dict(), tensor_files.read_tensors(out)
    assert found.keys() == {name for name in state if is_adapter(name)}
    assert all(torch.equal(found[name], state[name]) for name in found)
    metadata = tensor_files.read_tensor_metadata(out)
    assert (metadata["lora_rank"], metadata["lora_alpha"], metadata["weights"]) == ("3", "6.0", "ema")
    assert metadata["base"] == "drawn from run.seed=42"
    base = [name for name in state if not is_adapter(name)]
    assert metadata["base_sha256"] == fingerprint(base, state.__getitem__)


def test_a_run_without_adapters_is_written_as_it_is(runs: dict[str, str]) -> None:
    config = _config(runs["plain"], lora=None, weights="raw")
    assert export(config, False).startswith(f"{runs['plain']}/export/model_raw_00000005.safetensors: ")
    found, state = (
        tensor_files.read_tensors(f"{runs['plain']}/export/model_raw_00000005.safetensors"),
        _trained(config, 1),
    )
    assert found.keys() == state.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.state_dict().items())


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(runs: dict[str, str], tmp_path: Path) -> None:
    line = export(_config(runs["lora"], path=str(tmp_path / "a" / "b.safetensors")), True)
    assert line.startswith(f"dry run: would write {tmp_path}/a/b.safetensors: ") and "adapters merged in" in line
    assert not list(tmp_path.iterdir())


def test_adapters_of_another_base_are_refused(runs: dict[str, str], tmp_path: Path) -> None:
    """The start weights are compared where they stand."""
    config = _config(runs["lora"], what="adapters", path=str(tmp_path / "out.safetensors"))
    base = config.model_copy(update={"model": config.model.model_copy(update={"lora": LoraSettings()})})
    right, other = str(tmp_path / "right.safetensors"), str(tmp_path / "other.safetensors")
    model = build_model(base.model, config.kernels, seed=0)
    model.load_state_dict({n: t for n, t in _trained(config, 1).state_dict().items() if not is_adapter(n)})
    write_start_weights(right, model, base)
    model.load_state_dict({name: tensor + 1e-7 for name, tensor in model.state_dict().items()})
    write_start_weights(other, model, base)

    def begun_with(path: str) -> RunConfig:
        return config.model_copy(update={"warm_start": config.warm_start.model_copy(update={"weights": path})})

    export(begun_with(right), False)
    assert tensor_files.read_tensor_metadata(str(tmp_path / "out.safetensors"))["base"] == right
    with pytest.raises(ConfigError, match="trained on another base than .*other.safetensors, which holds other values"):
        export(begun_with(other), False)
    tensor_files.write_tensors(other, {"video_out.bias": torch.zeros(1)})
    with pytest.raises(ConfigError, match="which lacks "):
        export(begun_with(other), False)
    # Gone: said in the log and in the file, not refused.
    export(begun_with(str(tmp_path / "gone.safetensors")), False)


def test_what_cannot_be_exported_is_refused_with_the_way_out(runs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"export.what='adapters', but model.lora.rank=0.*leave export.what out"):
        export(_config(runs["plain"], lora=None, what="adapters"), True)
    with pytest.raises(DataError, match="step_00000009: no such checkpoint; committed ones there: step_00000004"):
        export(_config(runs["lora"], checkpoint="step_00000009"), True)
    with pytest.raises(ConfigError, match=r"is of another model: model.lora.alpha: 6.0 -> 7.0 .checkpoint -> config"):
        export(_config(runs["lora"], lora={"rank": 3, "alpha": 7.0}), True)
    with pytest.raises(DataError, match="no committed checkpoint"):
        export(_config(str(tmp_path / "empty")), True)


def test_the_verb_ends_with_its_line_and_a_wrong_run_folder_is_not_made(
    runs: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text(to_toml(_config(runs["lora"]).model_dump(mode="json", exclude_none=True)))
    arguments = ["--config", str(toml), f"export.path={tmp_path}/x.safetensors"]
    assert cli.main("export", export, "x", arguments, preflight=cli.require_run_folder) == 0
    assert capfd.readouterr().out.splitlines()[-1].startswith(f"export: {tmp_path}/x.safetensors: ")
    arguments += [f"run.folder={tmp_path}/none"]
    assert cli.main("export", export, "x", arguments, preflight=cli.require_run_folder) == 3
    assert not (tmp_path / "none").exists()
