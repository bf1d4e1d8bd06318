"""Sampling from a run folder: the averaged weights of a committed checkpoint, and no other."""

import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import jobs.sample
from jobs import cli
from jobs.sample import read_first_frame, sample
from jobs.sampled_weights import choose_checkpoint, require_trained_settings
from m4v_dist import storage
from m4v_dist.config.load import parse_config
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.frozen.pca_codec import EMBEDDED_WEIGHTS
from m4v_dist.frozen.text_encoder import build_text_encoder
from m4v_dist.frozen.video_file import encode_png, read_video
from m4v_dist.frozen.video_vae import build_codec
from tests.integration.small_run import make_small_cache, to_toml
from tests.jobs.sampled_run import sample_config
from tests.trainer.made_checkpoint import commit_by_hand


def test_each_prompt_becomes_a_video_of_the_asked_size(run: str) -> None:
    config = sample_config(run)
    assert "2 videos from step_00000005" in sample(config, False)
    entries = storage.read_json(f"{run}/samples/samples.json")
    assert [entry["prompt"] for entry in entries] == ["a fox", "a plane"]
    for entry in entries:
        frames, fps = read_video(f"{run}/samples/{entry['file']}")
        assert frames.shape == (9, 64, 64, 3) and fps == 8.0
    assert storage.read_bytes(f"{run}/samples/00.mp4") != storage.read_bytes(f"{run}/samples/01.mp4")


def test_a_prompt_s_video_depends_on_its_own_seed_alone(run: str) -> None:
    sample(sample_config(run), False)
    first = storage.read_bytes(f"{run}/samples/01.mp4")
    sample(sample_config(run, prompts=["a plane"]), False)
    assert storage.read_bytes(f"{run}/samples/00.mp4") == first
    sample(sample_config(run, prompts=["a plane"], seed=1), False)
    assert storage.read_bytes(f"{run}/samples/00.mp4") != first


def _picture(folder: Path, height_px: int = 64, width_px: int = 64) -> str:
    """A picture, red on the left and blue on the right, with a grey edge left and right that a square crop cuts off."""
    pixels = np.zeros((height_px, width_px, 3), np.uint8)
    margin = (width_px - height_px) // 2
    pixels[:, : width_px // 2, 0] = 200
    pixels[:, width_px // 2 :, 2] = 200
    pixels[:, :margin] = pixels[:, width_px - margin :] = 128
    (folder / "first.png").write_bytes(encode_png(pixels))
    return str(folder / "first.png")


def test_a_video_begins_with_the_given_picture(run: str, tmp_path: Path) -> None:
    sample(sample_config(run), False)
    without, _ = read_video(f"{run}/samples/00.mp4")
    sample(sample_config(run, first_frame=_picture(tmp_path)), False)
    frames, _ = read_video(f"{run}/samples/00.mp4")
    assert frames.shape == (9, 64, 64, 3)
    left, right = frames[0, :, :24].mean((0, 1)), frames[0, :, 40:].mean((0, 1))
    assert np.abs(left - [200, 0, 0]).max() < 25 and np.abs(right - [0, 0, 200]).max() < 25
    assert np.abs(frames[0].astype(float) - without[0]).mean() > 30
    assert {entry["first_frame"] for entry in storage.read_json(f"{run}/samples/samples.json")} == {
        str(tmp_path / "first.png")
    }


def test_a_picture_of_another_shape_covers_the_size_and_loses_its_edges(tmp_path: Path) -> None:
    frame = read_first_frame(sample_config("r", first_frame=_picture(tmp_path, height_px=100, width_px=300)))
    assert frame is not None and frame.shape == (1, 64, 64, 3) and frame.dtype == torch.float32
    assert float(frame.min()) == -1.0 and float(frame.max()) == pytest.approx(200 / 127.5 - 1, abs=0.1)
    torch.testing.assert_close(frame[0, 32, 4], torch.tensor([200 / 127.5 - 1, -1.0, -1.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(frame[0, 32, -4], torch.tensor([-1.0, -1.0, 200 / 127.5 - 1]), atol=0.02, rtol=0)
    assert read_first_frame(sample_config("r")) is None


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_first_frame_that_is_not_there_is_exit_2(run: str, tmp_path: Path, dry_run: bool) -> None:
    with pytest.raises(ConfigError, match="sampling.first_frame=.*none.png: cannot be read .No such file"):
        sample(sample_config(run, first_frame=str(tmp_path / "none.png")), dry_run)
    with pytest.raises(ConfigError, match="cannot be read .Is a directory"):
        sample(sample_config(run, first_frame=str(tmp_path)), dry_run)


def test_a_first_frame_that_is_no_picture_is_exit_3(run: str, tmp_path: Path) -> None:
    (tmp_path / "first.png").write_text("no picture")
    with pytest.raises(DataError, match="first.png: picture cannot be read .* give a picture"):
        sample(sample_config(run, first_frame=str(tmp_path / "first.png")), True)


def test_a_first_frame_that_leaves_nothing_to_sample_is_exit_2(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_latents=1 leaves none to sample"):
        sample_config(str(tmp_path), first_frame="a.png", num_latents=1)


def test_a_dry_run_names_the_first_frame(run: str, tmp_path: Path) -> None:
    picture = _picture(tmp_path)
    assert sample(sample_config(run, first_frame=picture), True).endswith(f"each beginning with {picture}")


def test_linear_guidance_does_not_read_that_of_later_latents(run: str) -> None:
    videos = []
    for is_linear, later in ((True, 5.0), (True, 9.0), (False, 5.0), (False, 9.0)):
        sample(sample_config(run, prompts=["a fox"], has_linear_guidance=is_linear, later_unit_guidance=later), False)
        videos.append(storage.read_bytes(f"{run}/samples/00.mp4"))
    assert videos[0] == videos[1] and len(set(videos)) == 3


def test_an_uncommitted_folder_is_passed_over_with_its_name(run: str, caplog: pytest.LogCaptureFixture) -> None:
    Path(run, "checkpoints", "step_00000009").mkdir()
    with caplog.at_level(logging.WARNING):
        assert choose_checkpoint(sample_config(run)).endswith("step_00000005")
    assert "step_00000009" in caplog.text


def test_an_uncommitted_folder_asked_for_by_name_is_exit_3(run: str) -> None:
    Path(run, "checkpoints", "step_00000009").mkdir()
    with pytest.raises(DataError, match="never finished.*step_00000005"):
        choose_checkpoint(sample_config(run, checkpoint="step_00000009"))


def test_no_checkpoint_is_exit_3_and_lists_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)
    with pytest.raises(DataError, match="no committed checkpoint .*step_00000003"):
        sample(sample_config(str(tmp_path)), False)


def _changed(run: str, section: str, **values: object) -> RunConfig:
    tree = sample_config(run).model_dump(mode="json")
    tree[section] |= values
    return parse_config(tree, where="test")


@pytest.mark.parametrize(
    ("section", "values", "field"),
    [
        ("model", {"num_single_blocks": 2}, "model.num_single_blocks: 1 -> 2"),
        ("model", {"num_zigzag_paths": 1}, "model.num_zigzag_paths: 8 -> 1"),
        ("text_encoder", {"max_tokens": 64}, "text_encoder.max_tokens: 128 -> 64"),
        ("objective", {"gamma": 0.25}, "objective.gamma: 0.333.* -> 0.25"),
    ],
)
def test_settings_of_another_training_are_exit_2_and_named(
    run: str, section: str, values: dict[str, object], field: str
) -> None:
    """zigzag paths, tokens and gamma leave all shapes as they are: without this they would give noise."""
    with pytest.raises(ConfigError, match=f"step_00000005 was trained with other settings: {field}"):
        sample(_changed(run, section, **values), False)


def test_another_number_of_pyramid_stages_is_named(run: str) -> None:
    tree = sample_config(run).model_dump(mode="json")
    tree["objective"] |= {"num_pyramid_stages": 2, "pyramid_stage_columns": [0, 1]}
    tree["sampling"] |= {"first_unit_steps": [1, 1], "later_unit_steps": [1, 1]}
    with pytest.raises(ConfigError, match="objective.num_pyramid_stages: 3 -> 2"):
        sample(parse_config(tree, where="test"), False)


def test_settings_that_training_alone_reads_may_differ(run: str) -> None:
    config = _changed(run, "objective", cfg_dropout=0.0)
    require_trained_settings(config, build_codec(config.codec), choose_checkpoint(config))


def test_moved_codec_weights_are_compared_with_the_cache(run: str, tmp_path: Path) -> None:
    shutil.copy(EMBEDDED_WEIGHTS, tmp_path / "codec.safetensors")
    config = _changed(run, "codec", weights=str(tmp_path / "codec.safetensors"))
    path = choose_checkpoint(config)
    with pytest.raises(DataError, match="precompute"):
        require_trained_settings(config, build_codec(config.codec), path)
    cache = make_small_cache(str(tmp_path / "cache"))
    tree = config.model_dump(mode="json")
    tree["precompute"]["cache"] = cache
    config = parse_config(tree, where="test")
    require_trained_settings(config, build_codec(config.codec), path)


def test_weights_that_do_not_fit_their_own_config_are_exit_3(run: str) -> None:
    before = storage.read_json(f"{run}/checkpoints/step_00000005/attempt_0001/config.json")
    before["model"]["num_single_blocks"] = 2
    _write_again(run, "config.json", json.dumps(before).encode())
    with pytest.raises(DataError, match="differ in name or shape"):
        sample(_changed(run, "model", num_single_blocks=2), False)


def _write_again(run: str, name: str, content: bytes) -> None:
    """Write a file of the checkpoint as if it had been committed so."""
    path = f"{run}/checkpoints/step_00000005"
    storage.write_bytes(f"{path}/attempt_0001/{name}", content)
    commit_by_hand(path)


def _run_command(run: str) -> int:
    toml = Path(run, "run.toml")
    toml.write_text(to_toml(sample_config(run).model_dump(mode="json", exclude_none=True)))
    return cli.main("sample", sample, "x", ["--config", str(toml)])


def test_a_committed_checkpoint_without_its_config_is_exit_3(run: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path(run, "checkpoints", "step_00000005", "attempt_0001", "config.json").unlink()
    assert _run_command(run) == 3
    last = capfd.readouterr().err.splitlines()[-1]
    assert (
        last.startswith("sample: DamagedCheckpointError: ")
        and "step_00000005/attempt_0001/config.json: None bytes" in last
    )


def test_a_checkpoint_s_config_that_was_changed_is_exit_3(run: str, capfd: pytest.CaptureFixture[str]) -> None:
    config = Path(run, "checkpoints", "step_00000005", "attempt_0001", "config.json")
    config.write_bytes(config.read_bytes().replace(b"clips", b"cloud"))
    assert _run_command(run) == 3
    last = capfd.readouterr().err.splitlines()[-1]
    assert "step_00000005/attempt_0001/config.json: 1 blocks" in last and "another checksum" in last


def test_the_text_encoder_is_built_once_for_all_prompts(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []
    monkeypatch.setattr(
        jobs.sample, "build_text_encoder", lambda *given: built.append(given) or build_text_encoder(*given)
    )
    sample(sample_config(run), False)
    assert len(built) == 1


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_prompt_longer_than_the_encoder_reads_is_exit_2_with_its_tokens_and_the_limit(
    run: str, dry_run: bool
) -> None:
    limit = sample_config(run).text_encoder.max_tokens
    fits, cut = " ".join(["fox"] * (limit - 2)), " ".join(["plane"] * (limit - 1))
    with pytest.raises(ConfigError, match=f"at most {limit} tokens .*'plane plane .* has {limit + 1}") as error:
        sample(sample_config(run, prompts=[fits, cut]), dry_run)
    assert "fox" not in str(error.value)
    assert str(error.value).count("plane") < 20, "a long prompt is not repeated whole"
    assert not Path(run, "samples").exists()


def test_the_suffix_s_tokens_count_and_a_long_negative_prompt_is_refused_too(run: str) -> None:
    limit = sample_config(run).text_encoder.max_tokens
    prompt, long = " ".join(["fox"] * (limit - 2)), " ".join(["grey"] * limit)
    with pytest.raises(
        ConfigError, match=f"at most {limit} .*prompts with sampling.prompt_suffix: 'fox .* has {limit + 1}"
    ):
        sample(sample_config(run, prompts=[prompt], prompt_suffix=" red"), False)
    with pytest.raises(ConfigError, match=f"at most {limit} .* sampling.negative_prompt: 'grey .* has {limit + 2}"):
        sample(sample_config(run, negative_prompt=long), False)
    assert not Path(run, "samples").exists()


def test_equal_prompts_are_told_to_give_equal_videos(run: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        sample(sample_config(run, prompts=["a fox", "a plane"]), True)
        assert "more than once" not in caplog.text
        sample(sample_config(run, prompts=["a fox", "a plane", "a fox"]), True)
    assert "'a fox' more than once: their videos will be equal" in caplog.text


@pytest.mark.parametrize(("guidance", "is_read"), [(3.0, True), (1.0, False)])
def test_guidance_leans_away_from_the_negative_prompt(run: str, guidance: float, is_read: bool) -> None:
    def video(**sampling: object) -> bytes:
        strength = {"first_unit_guidance": guidance, "later_unit_guidance": guidance}
        sample(sample_config(run, prompts=["a fox"], **strength, **sampling), False)
        return storage.read_bytes(f"{run}/samples/00.mp4")

    assert (video() != video(negative_prompt="blurred, grey")) == is_read
    (entry,) = storage.read_json(f"{run}/samples/samples.json")
    assert (entry["prompt"], entry["prompt_suffix"], entry["negative_prompt"]) == ("a fox", "", "blurred, grey")
    assert video(prompt_suffix=", hyper quality") != video()


@pytest.mark.parametrize("guided", ["first_unit_guidance", "later_unit_guidance"])
def test_the_negative_prompt_is_read_in_the_first_latent_and_in_later_ones(run: str, guided: str) -> None:
    strength = {"first_unit_guidance": 1.0, "later_unit_guidance": 1.0} | {guided: 3.0}
    videos = set()
    for negative_prompt in ("", "blurred, grey"):
        sample(sample_config(run, prompts=["a fox"], negative_prompt=negative_prompt, **strength), False)
        videos.add(storage.read_bytes(f"{run}/samples/00.mp4"))
    assert len(videos) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_not_there_is_exit_2(run: str) -> None:
    with pytest.raises(ConfigError, match="launch.use_gpu=false"):
        sample(_changed(run, "launch", use_gpu=True), False)


def test_a_size_that_the_pyramid_cannot_make_is_exit_2(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multiples of 64"):
        sample(sample_config(str(tmp_path), height_px=96), False)


def test_no_prompts_is_exit_2(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prompts"):
        sample(sample_config(str(tmp_path), prompts=[]), False)


def test_a_dry_run_names_the_checkpoint_and_writes_nothing(run: str) -> None:
    before = sorted(Path(run).rglob("*"))
    assert re.search("2 videos .* from .*step_00000005", sample(sample_config(run), True))
    assert sorted(Path(run).rglob("*")) == before


def test_a_dry_run_without_a_checkpoint_is_exit_3_like_the_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no committed checkpoint"):
        sample(sample_config(str(tmp_path)), True)
    assert not list(tmp_path.iterdir())


def test_videos_of_an_earlier_call_go_and_other_files_stay(run: str) -> None:
    sample(sample_config(run), False)
    Path(run, "samples", "mine.txt").write_text("kept")
    sample(sample_config(run, prompts=["a plane"]), False)
    assert sorted(storage.list_folder(f"{run}/samples")) == ["00.mp4", "mine.txt", "samples.json"]


def test_a_checkpoint_may_be_named_by_its_path(run: str) -> None:
    path = f"{run}/checkpoints/step_00000005"
    assert choose_checkpoint(sample_config(run, checkpoint=f"{path}/")) == path
    with pytest.raises(DataError, match=r"/elsewhere/step_00000005: no such checkpoint"):
        choose_checkpoint(sample_config(run, checkpoint="/elsewhere/step_00000005"))
