"""Sampling the start weights that `jobs.import_checkpoint` wrote, with no training step between."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import cli
from jobs.import_checkpoint import import_checkpoint
from jobs.sample import require_something_to_sample, sample
from m4v_dist import storage, tensor_files
from m4v_dist.batch import derive_seed
from m4v_dist.config.load import parse_config
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.frozen.text_encoder import build_text_encoder
from m4v_dist.frozen.video_file import encode_mp4
from m4v_dist.frozen.video_vae import build_codec, frames_to_uint8
from m4v_dist.model.build import build_model
from m4v_dist.model.checkpoint_names import to_pyramidflow_name
from m4v_dist.objective.pyramid_schedule import PyramidSchedule
from m4v_dist.sampling.pyramid_sampler import sample_latents
from tests.integration.small_run import to_toml
from tests.jobs.sampled_run import sample_config


def _config(run: str, source: str | None, *, model: dict[str, Any] | None = None, **sampling: Any) -> RunConfig:
    values = sample_config(run, prompts=["a fox"]).model_dump(mode="json", exclude={"model"})
    values["model"] = {
        "preset": "tiny", "num_double_blocks": 1, "num_single_blocks": 1, "mixer": "attention",
        "has_temporal_branch": False, **(model or {}),
    }  # fmt: skip
    values["warm_start"] = {"source": source}
    values["sampling"] |= {"weights": "start", **sampling}
    return parse_config(values, where="test")


def _model(config: RunConfig) -> torch.nn.Module:
    """The model that is released; its last layers are not zero, so that all of it has a say."""
    model = build_model(config.model, config.kernels, seed=11)
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PyramidFlow's transformer as released, in the model's sizes."""
    folder = str(tmp_path_factory.mktemp("release") / "diffusion_transformer_384p")
    weights = {to_pyramidflow_name(name): tensor for name, tensor in _model(_config("r", "s")).state_dict().items()}
    tensor_files.write_tensors(f"{folder}/diffusion_pytorch_model.safetensors", weights)
    return folder


@pytest.fixture(scope="module")
def imported(source: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    run = str(tmp_path_factory.mktemp("imported") / "run")
    import_checkpoint(_config(run, source), False)
    return run


@pytest.fixture
def run(imported: str, tmp_path: Path) -> str:
    return str(shutil.copytree(imported, tmp_path / "run"))


def _expected_mp4(config: RunConfig) -> bytes:
    """The first prompt's video by the sampler itself, with the weights as they were released."""
    codec, sampling = build_codec(config.codec), config.sampling
    texts = [sampling.prompts[0] + sampling.prompt_suffix, sampling.negative_prompt]
    text, null_text = build_text_encoder(config.text_encoder).encode(texts)
    (latents,) = sample_latents(
        _model(config),
        [text],
        null_text,
        schedule=PyramidSchedule(3),
        num_latents=sampling.num_latents,
        grid_height=8,
        grid_width=8,
        channels=codec.latent_channels,
        first_unit_steps=sampling.first_unit_steps,
        later_unit_steps=sampling.later_unit_steps,
        first_unit_guidance=sampling.first_unit_guidance,
        later_unit_guidance=sampling.later_unit_guidance,
        generators=[torch.Generator().manual_seed(derive_seed("sample", 0, sampling.prompts[0]))],
    )
    return encode_mp4(frames_to_uint8(codec.decode(codec.normalization.denormalize(latents))), sampling.fps)


@pytest.mark.parametrize(
    "sampling", [{}, {"prompt_suffix": ", Ultra HD", "negative_prompt": "blurred, grey"}], ids=["plain", "with texts"]
)
def test_an_imported_checkpoint_is_sampled_at_once_and_as_it_was_released(
    source: str, run: str, sampling: dict[str, str]
) -> None:
    config = _config(run, source, **sampling)
    line = sample(config, False)
    path = f"{run}/warm_start/weights.safetensors"
    assert line == f"1 videos from the start weights {path} in {run}/samples"
    assert storage.read_bytes(f"{run}/samples/00.mp4") == _expected_mp4(config)
    (entry,) = storage.read_json(f"{run}/samples/samples.json")
    assert (entry["weights"], entry["checkpoint"], entry["start_weights"]) == ("start", None, path)


def test_a_dry_run_says_that_start_weights_would_be_sampled_and_checks_them(source: str, run: str) -> None:
    before = sorted(Path(run).rglob("*"))
    path = f"{run}/warm_start/weights.safetensors"
    assert sample(_config(run, source), True).endswith(f"from the start weights {path}")
    assert sorted(Path(run).rglob("*")) == before
    os.truncate(path, os.path.getsize(path) - 1)
    with pytest.raises(DataError, match=r"weights.safetensors: holds \d+ bytes.*cut short"):
        sample(_config(run, source), True)


def test_start_weights_of_another_config_are_refused(source: str, run: str) -> None:
    with pytest.raises(ConfigError, match=r"imported with warm_start.source='.*384p', the config says '/other'"):
        sample(_config(run, "/other"), True)
    with pytest.raises(ConfigError, match=r"imported for another model: model.num_single_blocks: 1 -> 2 .*import_ch"):
        sample(_config(run, source, model={"num_single_blocks": 2}), True)
    with pytest.raises(ConfigError, match=r"no such file.*run jobs.import_checkpoint"):
        sample(_config(f"{run}2", source), True)
    with pytest.raises(ConfigError, match=r"sampling.weights='start', but neither warm_start.source nor warm_start"):
        sample(_config(run, None), True)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"rope_axes": [24, 20, 20]}, r"model.rope_axes: \[16, 24, 24\] -> \[24, 20, 20\]"),
        ({"has_temporal_mask": False}, "model.has_temporal_mask: True -> False"),
        ({"num_zigzag_paths": 1}, "model.num_zigzag_paths: 8 -> 1"),
    ],
)
def test_start_weights_of_a_model_of_the_same_shapes_are_refused_too(
    source: str, run: str, model: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=f"{words} .file -> config.. Run jobs.import_checkpoint again"):
        sample(_config(run, source, model=model), True)
    # What changes no output may differ.
    sample(_config(run, source, model={"recompute": "blocks", "ssm": {"chunk_size": 32}}), True)


def test_start_weights_of_before_are_compared_by_their_shapes(source: str, run: str) -> None:
    """Their metadata does not say for which model they are."""
    path = f"{run}/warm_start/weights.safetensors"
    tensor_files.write_tensors(path, tensor_files.read_tensors(path), {"warm_start.source": source, "run.seed": "42"})
    sample(_config(run, source), True)
    with pytest.raises(DataError, match=r"weights.safetensors: .*missing \(single_blocks.1.*Run jobs.import_"):
        sample(_config(run, source, model={"num_single_blocks": 2}), True)


def test_a_codec_or_text_encoder_that_the_model_is_not_made_for_is_exit_2_with_both_numbers(tmp_path: Path) -> None:
    """A released model of 4096 wide text beside the default encoder: no checkpoint's config is there to compare."""
    for model, message in (
        ({"text_width": 100}, "text_width=100, .* the text of encoder minilm is 384 and 384 wide.*text_encoder.kind"),
        ({"pooled_width": 100}, "pooled_width=100, .* 384 and 384 wide"),
        ({"latent_channels": 4}, "latent_channels=4, but codec pca makes 16.*codec.kind"),
    ):
        run, source = str(tmp_path / "-".join(model)), str(tmp_path / "release" / "-".join(model))
        config = _config(run, source, model=model)
        released = {to_pyramidflow_name(name): tensor for name, tensor in _model(config).state_dict().items()}
        tensor_files.write_tensors(f"{source}/diffusion_pytorch_model.safetensors", released)
        import_checkpoint(config, False)
        with pytest.raises(ConfigError, match=message):
            sample(config, False)
        assert not os.path.exists(f"{run}/samples")


def test_start_weights_beside_a_named_checkpoint_are_exit_2() -> None:
    with pytest.raises(ConfigError, match="sampling: weights='start' .* checkpoint='step_00000005' .*leave out"):
        sample_config("r", weights="start", checkpoint="step_00000005")
    with pytest.raises(ConfigError, match="sampling.weights"):
        sample_config("r", weights="raw")


def test_a_run_without_a_checkpoint_points_to_its_start_weights(source: str, run: str) -> None:
    path = re.escape(f"{run}/warm_start/weights.safetensors")
    with pytest.raises(DataError, match=f"train first, .*, or sample .* {path} with sampling.weights=start"):
        sample(_config(run, source, weights="ema"), True)
    with pytest.raises(DataError, match=r"train first, with jobs.train\.$"):
        sample(_config(f"{run}2", source, weights="ema"), True)


def _call(run: str, config: RunConfig, folder: Path) -> int:
    (folder / "run.toml").write_text(to_toml(config.model_dump(mode="json", exclude_none=True)))
    arguments = ["--config", str(folder / "run.toml"), f"run.folder={run}"]
    return cli.main("sample", sample, "x", arguments, preflight=require_something_to_sample)


def test_start_weights_may_stand_elsewhere_and_a_wrong_run_folder_is_not_made(
    source: str, run: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, new = _config(run, source), str(tmp_path / "new")
    assert _call(new, config, tmp_path) == 2
    assert "new/warm_start/weights.safetensors: no such file" in capfd.readouterr().err.splitlines()[-1]
    assert not os.path.exists(new)
    values = config.model_dump(mode="json") | {"warm_start": {"weights": f"{run}/warm_start/weights.safetensors"}}
    assert _call(new, parse_config(values, where="test"), tmp_path) == 0
    assert storage.list_folder(f"{new}/samples") == ["00.mp4", "samples.json"]
