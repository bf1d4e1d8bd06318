"""A codec that draws its latents is seeded by the record's key: a rerun gives the same bytes."""

from pathlib import Path

import pytest
import torch

from data_pipeline.captions import Caption
from data_pipeline.latent_cache import LatentCache
from data_pipeline.pack import RawClip, write_shards
from data_pipeline.precompute_plan import PrecomputePlan
from m4v_dist.config.data_settings import (
    BucketSettings,
    CodecSettings,
    PrecomputeSettings,
    SourceSettings,
    TextEncoderSettings,
)
from m4v_dist.errors import DataError
from m4v_dist.frozen.video_file import encode_mp4
from m4v_dist.frozen.video_vae import build_codec
from tests.data_pipeline.made_cache import moving_blocks
from tests.data_pipeline.run_here import run_here
from tests.frozen.golden_vae import DESCRIPTION, write_release


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One clip under two keys."""
    folder = tmp_path_factory.mktemp("raw")
    clip = encode_mp4(moving_blocks(1, 9), 8.0)
    write_shards(
        [RawClip(key, "mp4", clip, (Caption("blocks"),)) for key in ("a", "b")],
        f"{folder}/clips-%03d.tar",
        2,
    )
    return f"{folder}/clips-000.tar"


def plan_of(shard: str, cache: Path, codec: CodecSettings) -> PrecomputePlan:
    source = SourceSettings(name="clips", shards=shard, media="video", licence="made up")
    precompute = PrecomputeSettings(
        cache=str(cache), buckets=(BucketSettings(height_px=64, width_px=64),), num_frames=9, fps=8.0
    )
    return PrecomputePlan((source,), precompute, codec, TextEncoderSettings())


@pytest.mark.slow
def test_a_rerun_gives_the_same_bytes_and_each_key_its_own_noise(shard: str, tmp_path: Path) -> None:
    codec = CodecSettings(kind="pyramid", weights=write_release(tmp_path / "vae"))
    found = []
    for name in ("one", "two"):
        plan = plan_of(shard, tmp_path / name, codec)
        run_here(plan)
        cache = LatentCache.open(plan.precompute.cache, build_codec(codec).fingerprint())
        found.append([cache.read(row).latents for row in cache.rows("clips")])
    (first, second), again = found
    assert first.shape == (DESCRIPTION["config"]["latent_channels"], 2, 8, 8)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert not torch.equal(first, second)
    with pytest.raises(DataError, match=r"codec_config.*posterior sample.*posterior mean"):
        mean = CodecSettings(kind="pyramid", weights=codec.weights, posterior="mean")
        LatentCache.open(str(tmp_path / "one"), build_codec(mean).fingerprint())
