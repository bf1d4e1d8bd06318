"""What the codec keeps: cached latents decoded beside the frames that they were made from, with PSNR.

First and later frames apart, because a causal codec codes the first frame alone and better. Measured on the latents as
the cache holds them (bfloat16), so this also checks that the cache holds the clip it says it holds.

Legend: `c` latent channels or colours, `t` frames, `h` `w` pixels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data_pipeline.cache_record import CorruptRecordError
from data_pipeline.decode import DecodeError, DecodeRule
from data_pipeline.decoder_pool import DecoderPool
from data_pipeline.latent_cache import LatentCache
from data_pipeline.manifest import IndexRow
from data_pipeline.pack import RawClip, read_shard
from m4v_dist.errors import DataError
from m4v_dist.frozen.video_file import Frames
from m4v_dist.frozen.video_vae import Codec, frames_to_uint8

_PEAK = 255.0


@dataclass(frozen=True)
class CodecComparison:
    """One clip and its reconstruction.

    Args:
        row: the cache's row.
        frames: t h w c, uint8, what went in.
        reconstruction: t h w c, uint8, what comes out of the cached latents.
        psnr_first_db: PSNR of frame 0.
        psnr_later_db: PSNR of all others together; None for a still.
    """

    row: IndexRow
    frames: Frames
    reconstruction: Frames
    psnr_first_db: float
    psnr_later_db: float | None


def psnr_db(frames: Frames, reconstruction: Frames) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 clips of equal shape; infinite where they are equal."""
    error = np.square(frames.astype(np.float64) - reconstruction.astype(np.float64)).mean()
    return float("inf") if error == 0 else float(10 * np.log10(_PEAK**2 / error))


def compare(row: IndexRow, frames: Frames, latents: torch.Tensor, codec: Codec) -> CodecComparison:
    """Decode latents c t h w (un-normalised) and compare them with the frames t h w c uint8 that they stand for.

    Raises:
        DataError: the two do not have the same shape.
    """
    with torch.no_grad():
        reconstruction = frames_to_uint8(codec.decode(latents.float())).numpy()
    if reconstruction.shape != frames.shape:
        raise DataError(
            f"{row.source}/{row.key}: the cache decodes to frames {reconstruction.shape}, the shard gives "
            f"{frames.shape}; the cache is of other shards or settings: precompute into a new folder."
        )
    later = psnr_db(frames[1:], reconstruction[1:]) if len(frames) > 1 else None
    return CodecComparison(row, frames, reconstruction, psnr_db(frames[:1], reconstruction[:1]), later)


def compare_source(
    cache: LatentCache, source: str, shards: Sequence[str], codec: Codec, rule: DecodeRule, timeout_s: float
) -> Iterator[CodecComparison]:
    """Compare every cached record of a source with its raw clip, in the order of the shards.

    Raises:
        DataError: a cached record is damaged or not in the shards, or its clip cannot be decoded any more.
    """
    wanted: Mapping[str, IndexRow] = {row.key: row for row in cache.rows(source)}
    found: set[str] = set()
    with DecoderPool(1, timeout_s, rule) as pool:
        for shard in shards:
            for raw in read_shard(shard):
                # Records that the cache does not hold were filtered or quarantined, and stand in its report.
                if not isinstance(raw, RawClip) or raw.key not in wanted or raw.kind is None:
                    continue
                row = wanted[raw.key]
                try:
                    clip = pool.decode(raw.data, raw.kind)
                except DecodeError as error:
                    raise DataError(f"{shard}: {raw.key} is in the cache but cannot be decoded: {error}.") from error
                found.add(raw.key)
                try:
                    latents = cache.read(row).latents
                except CorruptRecordError as error:
                    raise DataError(f"cached record {error}; {cache.how_to_redo([error.shard])}.") from error
                yield compare(row, clip.frames, latents, codec)
    missing = sorted(wanted.keys() - found)
    if missing:
        raise DataError(f"{source}: {len(missing)} cached records are not in its shards: {', '.join(missing[:5])}.")
