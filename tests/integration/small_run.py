"""A run small enough for seconds: a cache of made-up latents with the real fingerprint, a config of two stages."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipeline.cache_manifest import FORMAT_VERSION, NULL_PROMPT
from data_pipeline.cache_writer import CacheShardWriter, write_manifest
from jobs.train import train_on_rank
from m4v_dist.batch import TextFeatures
from m4v_dist.config.data_settings import CodecSettings, TextEncoderSettings
from m4v_dist.config.load import parse_config
from m4v_dist.config.schema import RunConfig
from m4v_dist.frozen.text_encoder import text_encoder_fingerprint
from m4v_dist.frozen.video_vae import build_codec
from tests.data_pipeline.made_cache import MadeSource, made_row

WIDTH = 384
TOTAL_STEPS = 9
"""Of both curriculum stages: two and seven."""
SOURCES = (
    MadeSource("clips", "video", 8, 3),
    MadeSource("stills", "image", 14, 1),
    MadeSource("unseen", "video", 3, 3, split="held_out"),
)


def make_small_cache(folder: str, sources: Sequence[MadeSource] = SOURCES) -> str:
    """Write a finished cache of smooth made-up latents, as if the run's own codec and text encoder had made it."""
    codec = build_codec(CodecSettings())
    generator = torch.Generator().manual_seed(0)
    for source in sources:
        writer = CacheShardWriter(folder, source.name)
        for position in range(source.num_records):
            base = torch.randn(codec.latent_channels, 1, 1, 1, generator=generator)
            latents = base + 0.3 * torch.randn(
                codec.latent_channels, source.num_latents, 8, 8, generator=generator
            )  # c t h w
            row = made_row(source, position)
            texts = [
                TextFeatures(torch.randn(num, WIDTH, generator=generator), torch.randn(WIDTH, generator=generator))
                for num in row.num_text_tokens
            ]
            writer.add(row, latents.bfloat16(), texts)
        writer.commit({"fingerprint": "made"})
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": codec.fingerprint() | text_encoder_fingerprint(TextEncoderSettings()),
        "normalization": codec.normalization.to_json(),
        "spatial_stride": codec.spatial_stride,
        "null_prompt": NULL_PROMPT,
        "fragments": sorted(source.name for source in sources),
        "sources": {source.name: {"media": source.media} for source in sources},
    }
    write_manifest(folder, manifest, TextFeatures(torch.zeros(2, WIDTH), torch.zeros(WIDTH)))
    return folder


def small_values(folder: str, cache: str, **trainer: Any) -> dict[str, Any]:
    """Settings of a run: two steps of images with frozen double blocks, then seven of clips and images."""
    bucket = {"height_px": 64, "width_px": 64}
    stage = {"buckets": [bucket], "learning_rate": 1e-3, "micro_batch_slots": 3}
    settings = {
        "global_batch_slots": 12, "sync_group": 3, "held_out_slots": 6, "checkpoint_every_steps": 3, "ema_decay": 0.9,
        **trainer,
    }  # fmt: skip
    return {
        "run": {"name": "small", "folder": folder, "seed": 7},
        "sources": [
            {"name": s.name, "shards": "none.tar", "media": s.media, "licence": "made up", "split": s.split}
            for s in SOURCES
        ],
        "precompute": {"cache": cache, "buckets": [bucket], "num_frames": 17},
        "model": {"preset": "tiny", "num_double_blocks": 1, "num_single_blocks": 2},
        "curriculum": [
            {
                **stage,
                "name": "image",
                "num_steps": 2,
                "num_latents": 1,
                "weights": {"stills": 1.0},
                "freeze": ["double_blocks"],
            },
            {
                **stage,
                "name": "video",
                "num_steps": 7,
                "num_latents": 3,
                "weights": {"clips": 0.7, "stills": 0.3},
                "warmup_steps": 2,
            },
        ],
        "trainer": settings,
        "launch": {"num_workers": 2, "max_failures": 2},
        "logging": {"wandb": "disabled"},
    }


def small_config(folder: str, cache: str, **trainer: Any) -> RunConfig:
    """The same as a config."""
    return parse_config(small_values(folder, cache, **trainer), where="small run")


def train_each(configs: list[str]) -> list[int]:
    """Train the runs one after the other on this rank; return how many steps each has done."""
    return [train_on_rank({"config": config}, tuple)["step"] for config in configs]


def rows(folder: str, kind: str) -> list[dict[str, Any]]:
    """Rows of a run folder so far; one in the middle of its write is left out."""
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def to_toml(values: dict[str, Any]) -> str:
    """A config as TOML.

    JSON is TOML's inline form but for `:`; written flat, one key a line, with lists of tables in full.
    """
    lines = []
    for section, content in values.items():
        if isinstance(content, list):
            for item in content:
                lines += [f"[[{section}]]", *(f"{key} = {_inline(value)}" for key, value in item.items())]
        else:
            lines += [f"[{section}]", *(f"{key} = {_inline(value)}" for key, value in content.items())]
    return "\n".join(lines) + "\n"


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value)
