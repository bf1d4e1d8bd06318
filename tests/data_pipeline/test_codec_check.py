"""PSNR is what it says, first and later frames apart, and a cache of other clips is refused."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.captions import Caption
from data_pipeline.codec_check import compare, compare_source, psnr_db
from data_pipeline.decode import DecodeRule
from data_pipeline.latent_cache import LatentCache
from data_pipeline.manifest import IndexRow
from data_pipeline.pack import RawClip, write_shards
from m4v_dist.config.data_settings import CodecSettings
from m4v_dist.errors import DataError
from m4v_dist.frozen.video_file import encode_png
from m4v_dist.frozen.video_vae import build_codec, frames_from_uint8
from tests.data_pipeline.made_cache import MadeSource, make_cache

ROW = IndexRow("k", "clips", "video", "s", 64, 64, 17, 3, 8.0, ("c",), (1.0,), (5,), 0, 0, "", 64, 64, 17, 8.0)


def _moving_gradient() -> np.ndarray:
    ramp = np.linspace(20, 230, 64)
    frames = [np.roll(np.tile(ramp, (64, 1)), 2 * t, axis=1) for t in range(17)]
    return np.repeat(np.stack(frames)[..., None], 3, axis=-1).astype(np.uint8)


def test_psnr_of_a_known_error() -> None:
    frames = np.full((1, 8, 8, 3), 100, dtype=np.uint8)
    assert psnr_db(frames, frames + np.uint8(5)) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr_db(frames, frames) == math.inf


def test_first_and_later_frames_are_measured_apart() -> None:
    frames = _moving_gradient()
    codec = build_codec(CodecSettings())
    latents = codec.encode(frames_from_uint8(torch.from_numpy(frames)))
    good = compare(ROW, frames, latents, codec)
    spoilt = latents.clone()
    spoilt[:, 1:] = 0
    bad = compare(ROW, frames, spoilt, codec)
    assert bad.psnr_first_db == good.psnr_first_db > 25
    assert good.psnr_later_db is not None and bad.psnr_later_db is not None
    assert bad.psnr_later_db < good.psnr_later_db - 5


def test_a_still_has_no_later_frames() -> None:
    frames = _moving_gradient()[:1]
    codec = build_codec(CodecSettings())
    latents = codec.encode(frames_from_uint8(torch.from_numpy(frames)))
    assert compare(replace(ROW, num_frames=1, num_latents=1), frames, latents, codec).psnr_later_db is None


def test_a_cache_of_other_lengths_is_refused() -> None:
    frames = _moving_gradient()
    codec = build_codec(CodecSettings())
    latents = codec.encode(frames_from_uint8(torch.from_numpy(frames)))
    with pytest.raises(DataError, match="clips/k"):
        compare(ROW, frames[:9], latents, codec)


def test_a_damaged_record_ends_the_check_with_the_fragment_to_remove(tmp_path: Path) -> None:
    still = RawClip("img000", "png", encode_png(_moving_gradient()[0]), (Caption("a ramp"),))
    (shard,) = write_shards([still], f"{tmp_path}/raw-%03d.tar", 1)
    folder = make_cache(f"{tmp_path}/cache", [MadeSource("img", "image", 1, 1)])
    tar = tmp_path / "cache" / "shards" / "img.tar"
    tar.write_bytes(tar.read_bytes()[:600])
    rule = DecodeRule(buckets=((64, 64),), num_frames=9, fps=8.0)
    with pytest.raises(DataError, match=rf"img/img000 .*cut short.*remove {folder}/index/img.parquet"):
        list(compare_source(LatentCache.open(folder), "img", [shard], build_codec(CodecSettings()), rule, 30.0))
