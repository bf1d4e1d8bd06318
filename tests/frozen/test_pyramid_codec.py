"""The pyramid codec: released files in, strictly; latents that a rerun repeats; statistics and fingerprint."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from m4v_dist import tensor_files
from m4v_dist.config.data_settings import CodecSettings
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.frozen.causal_video_vae import RELEASED
from m4v_dist.frozen.pca_codec import EMBEDDED_WEIGHTS, PcaCodec
from m4v_dist.frozen.pyramid_codec import PyramidCodec
from m4v_dist.frozen.pyramid_codec_files import read_config
from m4v_dist.frozen.video_vae import Codec, build_codec
from tests.conftest import GOLDEN, load_golden
from tests.frozen.golden_vae import (
    CASE,
    DESCRIPTION,
    TOLERANCE,
    config_of,
    golden_weights,
    num_in,
    relative_error,
    released_config,
    write_release,
)

CHANNELS = DESCRIPTION["config"]["latent_channels"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_golden(CASE)[1]


@pytest.fixture(scope="module")
def codec(folder: str) -> Codec:
    return build_codec(CodecSettings(kind="pyramid", weights=folder))


def random_frames(num_frames: int, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(num_frames, height, width, 3) * 2 - 1


@pytest.mark.parametrize("file", ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "vae.pth"])
def test_folder_and_lone_file_give_the_references_latents_and_frames(
    file: str, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    write_release(tmp_path, file)
    path = str(tmp_path) if file.startswith("diffusion") else str(tmp_path / file)
    codec = build_codec(CodecSettings(kind="pyramid", weights=path))
    name = max((name for name in tensors if name.startswith("in.frames")), key=num_in)
    latents = codec.encode(rearrange(tensors[name], "1 c t h w -> t h w c"))
    wanted = tensors[f"out.encode_frames{num_in(name)}"][0, :CHANNELS]
    assert latents.dtype == torch.float32 and relative_error(latents, wanted) < TOLERANCE["encode"]

    name = max((name for name in tensors if name.startswith("in.latents")), key=num_in)
    frames = codec.decode(tensors[name][0])
    wanted = rearrange(tensors[f"out.decode_latents{num_in(name)}"], "1 c t h w -> t h w c")
    assert frames.dtype == torch.float32 and relative_error(frames, wanted) < TOLERANCE["decode"]


def test_it_keeps_the_frame_rule_and_the_shapes(codec: Codec) -> None:
    latents = codec.encode(random_frames(17))
    assert latents.shape == (CHANNELS, 3, 2, 3)
    assert codec.decode(latents).shape == (17, 16, 24, 3)
    assert codec.encode(random_frames(1)).shape == (CHANNELS, 1, 2, 3)
    assert (codec.latent_channels, codec.spatial_stride, codec.temporal_stride) == (CHANNELS, 8, 8)


def test_the_seed_decides_the_draw_and_no_seed_takes_the_mean(codec: Codec, folder: str) -> None:
    frames = random_frames(9)
    drawn = codec.encode(frames, seed=3)
    assert torch.equal(drawn, codec.encode(frames, seed=3))
    assert not torch.equal(drawn, codec.encode(frames, seed=4))
    mean = codec.encode(frames)
    assert not torch.equal(drawn, mean)
    of_mean = build_codec(CodecSettings(kind="pyramid", weights=folder, posterior="mean"))
    assert torch.equal(of_mean.encode(frames, seed=3), mean)


@pytest.mark.parametrize("seed", [None, 11])
def test_a_prefix_of_the_frames_gives_the_same_bits(seed: int | None, codec: Codec) -> None:
    frames = random_frames(33)
    whole = codec.encode(frames, seed=seed)
    for num_frames in (1, 9, 25):
        assert torch.equal(codec.encode(frames[:num_frames], seed=seed), whole[:, : (num_frames - 1) // 8 + 1])


def test_statistics_of_first_and_later_latents_are_pyramidflows(codec: Codec) -> None:
    latents = torch.randn(CHANNELS, 3, 2, 2)
    normalised = codec.normalization.normalize(latents)
    torch.testing.assert_close(normalised[:, :1], (latents[:, :1] + 0.04) / 1.8726)
    torch.testing.assert_close(normalised[:, 1:], (latents[:, 1:] + 0.2343) / 3.0986)
    torch.testing.assert_close(codec.normalization.denormalize(normalised), latents)


@pytest.mark.parametrize("kind", ["pyramid", "pca"])
def test_the_last_latent_gets_a_gradient_and_the_context_none(kind: str, codec: Codec) -> None:
    used: Codec = codec if kind == "pyramid" else PcaCodec.from_file(EMBEDDED_WEIGHTS)
    latents = used.encode(random_frames(17))
    context, last = latents[:, :-1].clone().requires_grad_(), latents[:, -1:].clone().requires_grad_()
    frames = used.decode_last(context, last)
    torch.testing.assert_close(frames, used.decode(latents)[-8:], atol=1e-5, rtol=1e-5)
    frames.square().sum().backward()
    assert context.grad is None and last.grad is not None and bool(last.grad.any())
    assert used.decode_last(latents[:, :0], latents[:, :1]).shape == (1, 16, 24, 3)
    with pytest.raises(ValueError, match=rf"{kind} codec: decode_last wants context c t h w and one latent"):
        used.decode_last(latents[:, :1], latents[:, 1:])
    with pytest.raises(ValueError, match=rf"{kind} codec: decode_last wants context"):
        used.decode_last(latents[:, :1, :1], latents[:, 1:2])


def test_large_frames_are_tiled(folder: str, tensors: dict[str, Tensor]) -> None:
    tile_px = DESCRIPTION["tile_sample_min_size"]
    codec = build_codec(CodecSettings(kind="pyramid", weights=folder, tile_px=tile_px))
    name = next(name for name in sorted(tensors) if name.startswith("out.encode") and name.endswith("_tiled"))
    latents = codec.encode(rearrange(tensors[f"in.frames{num_in(name)}"], "1 c t h w -> t h w c"))
    assert relative_error(latents, tensors[name][0, :CHANNELS]) < TOLERANCE["encode"]


def test_bfloat16_is_near_float32_and_answers_in_float32(codec: Codec, folder: str) -> None:
    frames = random_frames(9)
    half = build_codec(CodecSettings(kind="pyramid", weights=folder, dtype="bfloat16"))
    latents = half.encode(frames)
    assert latents.dtype == torch.float32
    assert 1e-4 < relative_error(latents, codec.encode(frames)) < 0.1
    assert half.decode(latents).dtype == torch.float32


def test_the_fingerprint_follows_weights_and_all_that_decides_latents(
    codec: Codec, folder: str, tmp_path: Path
) -> None:
    _, tensors = load_golden(CASE)
    bias = golden_weights(tensors)["quant_conv.conv.bias"]
    others = [
        CodecSettings(kind="pyramid", weights=write_release(tmp_path, **{"quant_conv.conv.bias": bias + 1})),
        *(CodecSettings(kind="pyramid", weights=folder, tile_px=tile_px) for tile_px in (0, 512)),
        CodecSettings(kind="pyramid", weights=folder, dtype="bfloat16"),
        CodecSettings(kind="pyramid", weights=folder, posterior="mean"),
        CodecSettings(),
    ]
    prints = [json.dumps(used.fingerprint()) for used in (codec, *map(build_codec, others))]
    assert len(set(prints)) == len(prints)
    again = build_codec(CodecSettings(kind="pyramid", weights=folder))
    assert again.fingerprint() == codec.fingerprint()
    assert set(codec.fingerprint()) == set(build_codec(CodecSettings()).fingerprint())


def test_asking_for_statistics_and_fingerprint_reads_no_weights(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> dict[str, Tensor]:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(tensor_files, "read_tensors", refuse)
    codec = build_codec(CodecSettings(kind="pyramid", weights=folder))
    assert codec.fingerprint()["codec"] == "pyramid" and codec.normalization.first_std[0] == 1.8726


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (torch.zeros(8, 16, 16, 3), "8 frames of 16 x 16 break the 8k.1 frame rule.*cut to 1 frames"),
        (torch.zeros(0, 16, 16, 3), "0 frames of 16 x 16 break"),
        (torch.zeros(9, 12, 16, 3), "9 frames of 12 x 16 break"),
        (torch.zeros(9, 16, 15, 3), "9 frames of 16 x 15 break"),
        (torch.zeros(9, 16, 16, 4), r"float t h w 3 .*got torch.float32 \(9, 16, 16, 4\)"),
        (torch.zeros(9, 16, 16, 3, dtype=torch.uint8), "must be float.*got torch.uint8"),
    ],
    ids=["not 8k+1", "no frames", "odd height", "odd width", "four colours", "uint8"],
)
def test_frames_that_break_the_rules_are_refused(frames: Tensor, words: str, codec: Codec) -> None:
    with pytest.raises(ValueError, match=f"(pyramid codec|causal video VAE): .*{words}"):
        codec.encode(frames)


@pytest.mark.parametrize("shape", [(CHANNELS + 1, 1, 2, 2), (CHANNELS, 0, 2, 2), (CHANNELS, 2, 2)])
def test_latents_of_another_shape_are_refused(shape: tuple[int, ...], codec: Codec) -> None:
    with pytest.raises(ValueError, match=rf"c={CHANNELS} and t > 0, got \(1, {shape[0]}, "):
        codec.decode(torch.zeros(shape))


def test_weights_that_do_not_fit_stop_the_build_by_name(tmp_path: Path) -> None:
    path = write_release(tmp_path, **{"encoder.conv_in.conv.bias": torch.zeros(3), "quant_conv.conv.bias": None})
    width = DESCRIPTION["config"]["block_out_channels"][0]
    with pytest.raises(
        DataError, match=rf"1 missing \(quant_conv.conv.bias\).*conv_in.conv.bias: file \[3\], wanted \[{width}\]"
    ):
        build_codec(CodecSettings(kind="pyramid", weights=path))


def test_a_lone_file_without_a_config_is_of_the_released_sizes(tmp_path: Path) -> None:
    write_release(tmp_path, "vae.safetensors")
    (tmp_path / "config.json").unlink()
    with pytest.raises(DataError, match=r"encoder.conv_in.conv.weight: file \[.*wanted \[128, 3, 3, 3, 3\]"):
        build_codec(CodecSettings(kind="pyramid", weights=str(tmp_path / "vae.safetensors")))


def test_missing_files_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="codec.weights=.*nowhere: there is no such file or folder"):
        PyramidCodec.from_path(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no folder with config.json and diffusion.*it holds \['config.json'\]"):
        PyramidCodec.from_path(f"{tmp_path}/")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"encoder_act_fn": "relu"}, "encoder_act_fn: 'relu', wanted 'silu'"),
        ({"encoder_down_block_types": ["DownEncoderBlock2D"]}, "encoder_down_block_types: .'DownEncoderBlock2D'."),
        ({"encoder_out_channels": "16"}, "encoder_out_channels is '16', wanted int"),
        ({"decoder_in_channels": 99}, "encoder_out_channels=.*decoder_in_channels=99"),
        ({"encoder_layers_per_block": None}, "encoder_layers_per_block is None, wanted list"),
        ({"encoder_layers_per_block": [2, "2"]}, r"encoder_layers_per_block is \[2, '2'\], wanted a list of int"),
        ({"decoder_layers_per_block": [3, 3]}, r"decoder lists of \[4, 2, 4, 4\] levels"),
        ({"encoder_norm_num_groups": 7}, "over 7 groups"),
        ({"encoder_norm_num_groups": 0}, "encoder sizes below 1"),
        ({"encoder_spatial_down_sample": [True] * 4}, "encoder scales space and time by 16 and 8, wanted 8"),
        ({"decoder_temporal_up_sample": [False] * 4}, "decoder scales space and time by 8 and 1, wanted 8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_of_another_network_is_refused(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(released_config(RELEASED) | changed))
    with pytest.raises(DataError, match=f"config.json: .*{words}"):
        read_config(str(path))


def test_a_config_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, words in (
        ("[]", "holds a list"),
        ("{", "not valid JSON"),
        ("{}", "encoder_block_out_channels is missing"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=words):
            read_config(str(path))


def test_released_configs_are_understood_and_unknown_keys_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "config.json"
    full = json.loads((GOLDEN / f"keys_{CASE}.json").read_text())["config"]
    path.write_text(json.dumps(full | {"_diffusers_version": "0.30"}))
    assert read_config(str(path)) == RELEASED and not caplog.records
    path.write_text(json.dumps(released_config(config_of(DESCRIPTION)) | {"new_trick": 1}))
    assert read_config(str(path)) == config_of(DESCRIPTION)
    assert "['new_trick'] are not known here" in caplog.text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "pyramid"}, "no embedded weights; set weights"),
        ({"kind": "pca", "tile_px": 512}, "tile_px=512 has no effect on kind='pca'"),
        ({"kind": "pca", "dtype": "bfloat16", "posterior": "mean"}, "dtype='bfloat16', posterior='mean' has no effect"),
        ({"kind": "pyramid", "weights": "x", "tile_px": 100}, "multiple of 32"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CodecSettings(**values)
