"""`jobs.import_checkpoint`, and `jobs.train` beginning with what it wrote."""

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data_pipeline.latent_cache import LatentCache
from jobs import cli
from jobs.import_checkpoint import import_checkpoint
from jobs.train import build_loader, check_run_folder, train, train_on_rank
from m4v_dist import storage, tensor_files
from m4v_dist.config.load import config_to_json, parse_config
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, DataError, PreemptedError
from m4v_dist.frozen.latent_normalization import LatentNormalization
from m4v_dist.model.build import build_model
from m4v_dist.model.checkpoint_names import to_pyramidflow_name
from m4v_dist.objective.flow_matching import PyramidFlowMatching
from m4v_dist.stop_request import StopRequest
from m4v_dist.weights_file import WeightsFile, fill_weights, sha256
from tests.integration.small_run import make_small_cache, rows, small_values, to_toml
from tests.trainer.made_checkpoint import made_checkpoint
from tests.trainer.ranks import run_ranks

RELEASE = "diffusion_transformer_384p"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder as released, with a miniFLUX of the small run's sizes; none of its weights is zero."""
    config = _config("/run", "/cache", "", mixer="attention")
    weights = build_model(config.model, config.kernels, seed=11).state_dict()
    generator = torch.Generator().manual_seed(12)
    released = {
        to_pyramidflow_name(name): tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in weights.items()
    }
    folder = str(tmp_path_factory.mktemp("release") / RELEASE)
    tensor_files.write_tensors(f"{folder}/diffusion_pytorch_model.safetensors", released)
    storage.write_json(f"{folder}/config.json", {"_class_name": "PyramidFluxTransformer"})
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_small_cache(str(tmp_path_factory.mktemp("cache") / "cache"))


def _config(run: str, cache: str, source: str, *, weights: str | None = None, seed: int = 7, **model: Any) -> RunConfig:
    values = small_values(run, cache)
    values["model"] |= {"ssm": {"variant": "mil"}, **model}
    values["run"]["seed"] = seed
    values["warm_start"] = {"source": source or None, "weights": weights}
    return parse_config(values, where="test")


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_dry_run_reports_every_parameter_and_writes_nothing(
    source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        line = import_checkpoint(_config(str(tmp_path / "run"), "c", source), True)
    assert re.match(
        r"dry run: would write .*/run/warm_start/weights.safetensors, [\d,]+ parameters: .*; "
        "names and shapes checked, values not read, nothing was written",
        line,
    )
    (report,) = (record.getMessage() for record in caplog.records if "start weights from" in record.getMessage())
    assert f"{RELEASE}/diffusion_pytorch_model.safetensors" in report
    assert re.search(
        r"single_blocks.\*.mixer.ssm.in_proj.weight +0-1 +mapped, set, fresh .*zero; x <- to_v; B <- to_k; C <- to_q",
        report,
    )
    assert re.search(r"double_blocks.\*.video.ff_in.weight +0 +loaded +[\d,]+ +as it is", report)
    assert _files(tmp_path) == []


def test_a_release_whose_config_has_other_rotary_widths_is_refused(source: str, tmp_path: Path) -> None:
    """Its weights have the same shapes."""
    other = tmp_path / RELEASE
    shutil.copytree(source, other)
    axes = [8, 4, 4]
    config = _config(str(tmp_path / "run"), "c", str(other))
    assert sum(config.model.rope_axes) == config.model.head_dim and list(config.model.rope_axes) != axes
    storage.write_json(str(other / "config.json"), {"axes_dims_rope": axes})
    with pytest.raises(ConfigError, match=r"config.json: .*axes_dims_rope: \[8, 4, 4\], ours \[.*model.rope_axes"):
        import_checkpoint(config, True)


def test_the_command_writes_every_parameter_and_a_report_that_adds_up(source: str, tmp_path: Path) -> None:
    config = _config(str(tmp_path / "run"), "c", source)
    toml = tmp_path / "run.toml"
    toml.write_text(to_toml(config.model_dump(mode="json", exclude_none=True)))
    assert cli.main("import_checkpoint", import_checkpoint, "x", ["--config", str(toml)]) == 0
    assert _files(tmp_path / "run") == ["result.json", "warm_start/report.json", "warm_start/weights.safetensors"]
    written = tensor_files.read_tensors(f"{tmp_path}/run/warm_start/weights.safetensors")
    fresh = build_model(config.model, config.kernels, seed=7).state_dict()
    assert {name: tensor.shape for name, tensor in written.items()} == {n: t.shape for n, t in fresh.items()}
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in written.values())
    released = tensor_files.read_tensors(f"{source}/diffusion_pytorch_model.safetensors")
    assert torch.equal(
        written["double_blocks.0.text.to_out.bias"], released["transformer_blocks.0.attn.to_add_out.bias"]
    )
    report = storage.read_json(f"{tmp_path}/run/warm_start/report.json")
    assert {entry["name"] for entry in report["parameters"]} == written.keys()
    untouched = [entry["name"] for entry in report["parameters"] if entry["state"] == "fresh"]
    assert untouched and all(torch.equal(written[name], fresh[name]) for name in untouched)
    assert sum(report["counts"].values()) == sum(tensor.numel() for tensor in fresh.values())
    assert report["files"] == {path: sha256(path) for path in report["files"]} and report["source"] == source
    assert (report["seed"], report["model"]["ssm"]["variant"]) == (7, "mil")
    assert storage.read_json(f"{tmp_path}/run/result.json")["reason"].startswith(f"{tmp_path}/run/warm_start/weights")


def test_weights_may_be_written_elsewhere(source: str, tmp_path: Path) -> None:
    config = _config(str(tmp_path / "run"), "c", source, weights=str(tmp_path / "shared" / "start.safetensors"))
    import_checkpoint(config, False)
    assert _files(tmp_path) == ["shared/report.json", "shared/start.safetensors"]


def _cut(path: str) -> None:
    os.truncate(path, os.path.getsize(path) - 1)


def test_bad_input_of_the_command_gives_its_code_and_last_line(
    source: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    released = tensor_files.read_tensors(f"{source}/diffusion_pytorch_model.safetensors")
    cut = str(tmp_path / "cut.safetensors")
    tensor_files.write_tensors(cut, released)
    _cut(cut)
    cases = {
        "": (2, "ConfigError: .*warm_start.source is not set.*warm_start.source=..."),
        str(tmp_path / "none"): (2, "ConfigError: warm_start.source=.*/none: there is no such file or folder.*"),
        os.path.dirname(source): (2, "ConfigError: warm_start.source=.*no .safetensors.*" + RELEASE + ".*"),
        cut: (3, "DataError: .*/cut.safetensors: holds \\d+ bytes, its header names \\d+: it is cut short.*"),
    }
    for path, (exit_code, last_line) in cases.items():
        config = _config(str(tmp_path / "run"), "c", path)
        (tmp_path / "run.toml").write_text(to_toml(config.model_dump(mode="json", exclude_none=True)))
        arguments = ["--config", str(tmp_path / "run.toml")]
        assert cli.main("import_checkpoint", import_checkpoint, "x", arguments) == exit_code
        last = capfd.readouterr().err.splitlines()[-1]
        assert re.fullmatch(f"import_checkpoint: {last_line}", last), last
        assert not (tmp_path / "run" / "warm_start").exists()


def test_start_weights_of_another_ending_are_refused_by_the_config() -> None:
    with pytest.raises(ConfigError, match=r"warm_start.weights: .*start.pth' is written as safetensors.* ends in .saf"):
        _config("/run", "c", "", weights="start.pth")


def test_remote_start_weights_are_refused_by_the_config() -> None:
    with pytest.raises(ConfigError, match=r"warm_start.weights.*s3://bucket/w.*not local"):
        _config("/run", "c", "", weights="s3://bucket/w.safetensors")
    with pytest.raises(ConfigError, match="s3://bucket/run/warm_start/weights.safetensors is not local"):
        import_checkpoint(_config("s3://bucket/run", "c", "/release"), True)


# ---- training that begins with them


@pytest.fixture
def _no_worker_may_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr("jobs.train.run_workers", refuse)
    monkeypatch.setattr("jobs.train.ray_session", refuse)


@pytest.mark.usefixtures("_no_worker_may_start")
def test_training_refuses_start_weights_that_are_not_the_config_s(source: str, cache: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"run/warm_start/weights.safetensors: no such file.*jobs.import_checkpoint"):
        train(_config(run, cache, source), False)
    import_checkpoint(_config(run, cache, source), False)
    with pytest.raises(ConfigError, match=r"imported with run.seed='7', the config says '8'; run jobs.import_check"):
        train(_config(run, cache, source, seed=8), False)
    with pytest.raises(ConfigError, match=r"imported with warm_start.source='.*384p', the config says '/other'"):
        train(_config(run, cache, "/other"), False)
    with pytest.raises(
        ConfigError, match=r"imported for another model: model.num_single_blocks: 2 -> 3 \(file -> config\)"
    ):
        train(_config(run, cache, source, num_single_blocks=3), False)
    _cut(f"{run}/warm_start/weights.safetensors")
    with pytest.raises(DataError, match=r"weights.safetensors: holds \d+ bytes.*cut short"):
        train(_config(run, cache, source), False)


@pytest.mark.usefixtures("_no_worker_may_start")
def test_a_dry_run_of_training_names_the_start_weights_and_a_run_under_way_needs_them_no_more(
    source: str, cache: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.train.check_resources", lambda _: None)
    config = _config(str(tmp_path / "run"), cache, source)
    import_checkpoint(config, False)
    with caplog.at_level(logging.INFO):
        train(config, True)
    weights = f"{tmp_path}/run/warm_start/weights.safetensors"
    assert f"starts at step 0 of 9 with the weights of {weights}; folder" in caplog.text
    _commit(config)
    os.remove(weights)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        train(config, True)
    assert "starts at step 3 of 9; folder" in caplog.text
    with pytest.raises(ConfigError, match=r"warm_start.source: '.*384p' -> None"):
        check_run_folder(_config(str(tmp_path / "run"), cache, ""))


def _commit(config: RunConfig) -> None:
    """A checkpoint of step 3 as the preflight sees it."""
    made_checkpoint(config, 3, {"index": 1, "name": "video", "start": 2})


def _stop_then_go_on(config: str, weights: str) -> int:
    try:
        train_on_rank({"config": config}, lambda: [StopRequest("SIGTERM")])
    except PreemptedError:
        os.remove(weights)
    step: int = train_on_rank({"config": config}, tuple)["step"]
    return step


@pytest.mark.slow
def test_a_run_begins_with_its_start_weights_and_goes_on_without_them(source: str, cache: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    config = _config(folder, cache, source)
    config = config.model_copy(update={"launch": config.launch.model_copy(update={"num_workers": 1})})
    import_checkpoint(config, False)
    assert config.start_weights is not None
    model = build_model(config.model, config.kernels, seed=0)
    fill_weights(model, WeightsFile(config.start_weights))
    expected = _held_out_loss(config, model)
    fresh = _held_out_loss(config, build_model(config.model, config.kernels, seed=config.run.seed))
    assert run_ranks(_stop_then_go_on, 1, config_to_json(config), config.start_weights) == [9]
    first, *_ = rows(folder, "held_out")
    assert first["step"] == 0
    assert first["validation/held_out_loss"] == pytest.approx(expected, rel=1e-5)
    assert abs(fresh - expected) > 1e-2
    assert sorted(row["step"] for row in rows(folder, "train")) == list(range(9))


@torch.no_grad()
def _held_out_loss(config: RunConfig, model: nn.Module) -> float:
    cache = LatentCache.open(config.precompute.cache)
    loader = build_loader(config, cache, 0, 1)
    loader.enter(0, 0)
    objective = PyramidFlowMatching(
        config.objective, LatentNormalization.from_json(cache.manifest["normalization"]).normalize
    )
    return sum(float(objective(model, batch).loss) for batch in loader.held_out())
