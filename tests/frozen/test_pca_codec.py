"""The embedded codec: causal to the bit, differentiable, orthonormal, and as good as its file says."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m4v_dist import storage, tensor_files
from m4v_dist.config.data_settings import CodecSettings
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.frozen.latent_normalization import LatentNormalization
from m4v_dist.frozen.pca_codec import EMBEDDED_WEIGHTS, PcaCodec, diffusion_scale, fit_pca_weights
from m4v_dist.frozen.video_vae import build_codec, frames_from_uint8, frames_to_uint8


@pytest.fixture(scope="module")
def codec() -> PcaCodec:
    return PcaCodec.from_file(EMBEDDED_WEIGHTS)


def random_frames(num_frames: int, height: int = 24, width: int = 32) -> Tensor:
    return torch.rand(num_frames, height, width, 3) * 2 - 1


def test_8k_plus_1_frames_give_k_plus_1_latents(codec: PcaCodec) -> None:
    latents = codec.encode(random_frames(25))
    assert latents.shape == (16, 4, 3, 4) and latents.dtype == torch.float32
    assert codec.decode(latents).shape == (25, 24, 32, 3)


@pytest.mark.parametrize("num_frames", [1, 9, 17])
def test_a_prefix_of_the_frames_gives_the_same_bits(codec: PcaCodec, num_frames: int) -> None:
    frames = random_frames(33)
    whole = codec.encode(frames)
    changed = frames.clone()
    changed[num_frames:] = 0.5
    num_latents = (num_frames - 1) // 8 + 1
    assert torch.equal(codec.encode(frames[:num_frames]), whole[:, :num_latents])
    assert torch.equal(codec.encode(changed)[:, :num_latents], whole[:, :num_latents])
    assert not torch.equal(codec.encode(changed)[:, num_latents:], whole[:, num_latents:])
    assert torch.equal(codec.decode(whole[:, :num_latents]), codec.decode(whole)[:num_frames])


def test_a_latent_depends_on_its_own_eight_frames_and_pixels(codec: PcaCodec) -> None:
    frames = random_frames(17)
    changed = frames.clone()
    changed[9, 8:16, 16:24] += 0.1
    moved = (codec.encode(changed) != codec.encode(frames)).any(0)
    assert moved.nonzero().tolist() == [[2, 1, 2]]


def test_decoding_is_an_orthonormal_map_that_encoding_undoes(codec: PcaCodec) -> None:
    latents = torch.randn(16, 3, 2, 2) * 3
    frames = codec.decode(latents)
    torch.testing.assert_close(codec.encode(frames), latents, atol=1e-4, rtol=1e-4)
    shift = codec.decode(latents + 1) - frames
    # 16 channels of 3 x 2 x 2 latents moved by one each: an isometry moves the frames as far
    torch.testing.assert_close(shift.square().sum(), torch.tensor(192.0), atol=1e-2, rtol=1e-4)


def test_gradients_pass_both_ways(codec: PcaCodec) -> None:
    frames = random_frames(9, 8, 8).double().requires_grad_()
    latents = codec.encode(frames)
    codec.decode(latents).square().sum().backward()
    assert frames.grad is not None
    assert bool((frames.grad.abs().flatten(1).sum(1) > 0).all())


@pytest.mark.parametrize("shape", [(8, 16, 16, 3), (9, 12, 16, 3), (9, 16, 16, 4)])
def test_shapes_that_break_the_rules_are_refused(codec: PcaCodec, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="pca codec: "):
        codec.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="pca codec: "):
        codec.decode(torch.zeros(15, 2, 2, 2))


def test_the_fingerprint_follows_the_weights(codec: PcaCodec, tmp_path: Path) -> None:
    assert build_codec(CodecSettings()).fingerprint() == codec.fingerprint()
    tensors = tensor_files.read_tensors(EMBEDDED_WEIGHTS)
    tensors["later_mean"] += 1e-3
    tensor_files.write_tensors(f"{tmp_path}/other.safetensors", tensors)
    other = build_codec(CodecSettings(weights=f"{tmp_path}/other.safetensors")).fingerprint()
    assert {name for name in other if other[name] != codec.fingerprint()[name]} == {"codec_weights_sha256"}


def test_missing_and_foreign_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        build_codec(CodecSettings(weights=f"{tmp_path}/none.safetensors"))
    tensor_files.write_tensors(f"{tmp_path}/x.safetensors", {"weight": torch.zeros(2)})
    with pytest.raises(DataError, match=r"codec.weights=.*x.safetensors: .*8 missing \(first_basis, .* and 3 more\)"):
        build_codec(CodecSettings(weights=f"{tmp_path}/x.safetensors"))
    (tmp_path / "x.safetensors").write_text("no tensors")
    with pytest.raises(DataError, match="x.safetensors: 10 bytes are no safetensors file"):
        build_codec(CodecSettings(weights=f"{tmp_path}/x.safetensors"))
    (tmp_path / "vae.bin").write_text("")
    with pytest.raises(ConfigError, match=r"codec.weights=.*vae.bin: codec.kind='pca' reads a .safetensors file"):
        build_codec(CodecSettings(weights=f"{tmp_path}/vae.bin"))


def test_weights_of_a_wrong_shape_are_named_with_both(tmp_path: Path) -> None:
    tensors = tensor_files.read_tensors(EMBEDDED_WEIGHTS) | {"first_mean": torch.zeros(3)}
    tensor_files.write_tensors(f"{tmp_path}/x.safetensors", tensors)
    with pytest.raises(DataError, match=r"first_mean: file \[3\], wanted \[192\]"):
        build_codec(CodecSettings(weights=f"{tmp_path}/x.safetensors"))


def test_normalization_is_undone_and_treats_the_first_latent_apart() -> None:
    normalization = LatentNormalization((1.0, 2.0), (2.0, 2.0), (3.0, 4.0), (5.0, 10.0))
    latents = torch.arange(24.0).reshape(2, 3, 2, 2)
    normal = normalization.normalize(latents)
    assert normal[0, 0, 0, 1] == 0.0 and normal[1, 0, 0, 0] == (12 - 2) / 2
    assert normal[0, 2, 0, 0] == pytest.approx((8 - 3) / 5) and normal[1, 1, 0, 0] == pytest.approx((16 - 4) / 10)
    torch.testing.assert_close(normalization.denormalize(normal), latents)
    assert LatentNormalization.from_json(json.loads(json.dumps(normalization.to_json()))) == normalization
    with pytest.raises(ValueError, match="c=2"):
        normalization.normalize(torch.zeros(3, 1, 2, 2))


def test_a_fit_finds_the_directions_of_its_clips() -> None:
    generator = torch.Generator().manual_seed(1)
    shades = torch.rand(6, 1, 2, 2, 3, generator=generator) * 1.6 - 0.8
    clips = [shade.expand(9, 2, 2, 3).repeat_interleave(8, 1).repeat_interleave(8, 2) for shade in shades]
    weights = fit_pca_weights(clips, 3, {"clips": "flat colours"})
    codec = PcaCodec.from_bytes(weights.to_bytes())
    torch.testing.assert_close(codec.decode(codec.encode(clips[0])), clips[0], atol=1e-4, rtol=0)
    assert weights.provenance["later_explained_variance"] == pytest.approx(1.0, abs=1e-4)
    assert weights.to_bytes() == fit_pca_weights(clips, 3, {"clips": "flat colours"}).to_bytes()


def test_the_scale_keeps_the_square_root_of_a_channels_weight() -> None:
    std = torch.tensor([16.0, 4.0, 1.0, 0.0])
    normalized = std / diffusion_scale(std)
    assert float(normalized.square().mean()) == pytest.approx(1.0, abs=2e-3)
    assert float(normalized[0] / normalized[1]) == pytest.approx(2.0)
    assert float(diffusion_scale(std)[3]) > 0.01


@pytest.mark.skipif(
    importlib.util.find_spec("comfyui_workflow_templates_media_video") is None, reason="needs the demo extra's clips"
)
def test_the_stated_psnr_is_what_unseen_clips_give(codec: PcaCodec) -> None:
    from data_pipeline.codec_fit import measure
    from jobs.fit_codec import CLIP_LIST

    provenance = json.loads(tensor_files.read_tensor_metadata(EMBEDDED_WEIGHTS)["provenance"])
    held_out = [clip for clip in storage.read_json(CLIP_LIST)["clips"] if clip["split"] == "held_out"]
    assert [clip["stem"] for clip in held_out] == provenance["held_out_clips"]
    assert not set(provenance["held_out_clips"]) & set(provenance["training_clips"])
    figures = measure(codec, held_out, 64)
    assert figures == pytest.approx(provenance["held_out_psnr"]["64px"], abs=0.05)


def test_uint8_frames_survive_the_round_trip() -> None:
    frames = torch.arange(192, dtype=torch.uint8).reshape(1, 8, 8, 3)
    assert torch.equal(frames_to_uint8(frames_from_uint8(frames)), frames)
    assert frames_to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
