"""How long clips take to become frames of a bucket: our verified decoding beside decoders used bare, in one run.

The peers are handed the indices and the size that ours computes, and check nothing. One thread each. This file is
a door of decord, PyAV and torchcodec beside their own, because a peer that went through our code would be none.

Legend: `t` frames, `h` `w` pixels, `c` colours.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_pipeline.decode import DecodeRule, choose_bucket, choose_frames, decode_clip
from data_pipeline.decoder_pool import DecoderPool
from m4v_dist.bench.markdown import table
from m4v_dist.frozen.video_facts import probe_video
from m4v_dist.frozen.video_file import cover_size

NUM_SPARSE = 17
"""Frames of the sparse case, uniform over the clip: the 8k+1 next to sixteen."""
_ALL_FRAMES = 8 * 100_000 + 1
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Clip:
    """One file, with what each contestant is told to take of it.

    Args:
        data: the file.
        kind: its extension.
        size: (height, width) that frames are resized to.
        indices: frames that are wanted, ascending.
        rule: the same, as ours takes it.
    """

    data: bytes
    kind: str
    size: tuple[int, int]
    indices: np.ndarray
    rule: DecodeRule


@dataclass(frozen=True)
class DecodeTimes:
    """One contestant on all clips: the median of whole rounds."""

    sampling: str
    name: str
    num_clips: int
    num_frames: int
    seconds: float


def decode_times(
    media: Sequence[tuple[bytes, str]], buckets: tuple[tuple[int, int], ...], *, num_rounds: int
) -> list[DecodeTimes]:
    """Time every contestant on the same files, in turn within each round.

    Args:
        media: (bytes, kind) of videos that decord decodes.
        buckets: (height, width) that clips go to, as in `precompute.buckets`.
        num_rounds: how often all files are decoded by each; one more comes first and is not counted.
    """
    times = []
    for sampling in ("sparse", "dense"):
        clips = [_clip(data, kind, buckets, is_sparse=sampling == "sparse") for data, kind in media]
        with DecoderPool(1, _TIMEOUT_S, clips[0].rule) as pool:
            contestants: dict[str, Callable[[Clip], object]] = {
                "decord alone": _decord,
                "PyAV alone, one pass": _pyav,
                "probe alone": lambda clip: probe_video(clip.data),
                "ours, in this process": lambda clip: decode_clip(clip.data, clip.kind, clip.rule),
                "ours by PyAV, in this process": lambda clip: decode_clip(
                    clip.data, clip.kind, replace(clip.rule, decoder="pyav")
                ),
                "ours, in a child": lambda clip: pool.decode(clip.data, clip.kind, rule=clip.rule),
            }
            if has_torchcodec():
                contestants["torchcodec alone"] = _torchcodec
            seconds: dict[str, list[float]] = {name: [] for name in contestants}
            for _ in range(num_rounds + 1):
                for name, decode in contestants.items():
                    started = time.perf_counter()
                    for clip in clips:
                        decode(clip)
                    seconds[name].append(time.perf_counter() - started)
        num_frames = sum(len(clip.indices) for clip in clips)
        times += [
            DecodeTimes(sampling, name, len(clips), num_frames, statistics.median(rounds[1:]))
            for name, rounds in seconds.items()
        ]
    return times


def has_torchcodec() -> bool:
    """Whether the optional peer can be loaded here: it needs FFmpeg's shared libraries besides itself."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def decode_page(times: Sequence[DecodeTimes]) -> str:
    """Clips and frames a second, and each contestant's time over decord's, as markdown."""
    base = {row.sampling: row.seconds for row in times if row.name == "decord alone"}
    rows = [
        [
            row.sampling, row.name, f"{row.num_clips / row.seconds:.2f}", f"{row.num_frames / row.seconds:.1f}",
            f"{row.seconds / base[row.sampling]:.2f}",
        ]
        for row in times
    ]  # fmt: skip
    heads = ["frames", "decoder", "clips/s", "frames/s", "time over decord alone"]
    missing = "" if any(row.name == "torchcodec alone" for row in times) else "\n\ntorchcodec is not installed here."
    return table(heads, rows) + missing


def _clip(data: bytes, kind: str, buckets: tuple[tuple[int, int], ...], *, is_sparse: bool) -> Clip:
    facts = probe_video(data)
    num_frames = facts.num_frames
    fps = facts.fps * (NUM_SPARSE - 1) / max(1, num_frames - 1) if is_sparse else facts.fps
    rule = DecodeRule(buckets, NUM_SPARSE if is_sparse else _ALL_FRAMES, min(fps, facts.fps))
    indices, _ = choose_frames(facts.times_s(), facts.fps, rule)
    return Clip(data, kind, cover_size(facts.size, choose_bucket(facts.size, buckets)), indices, rule)


def _decord(clip: Clip) -> object:
    import io

    import decord

    reader = decord.VideoReader(io.BytesIO(clip.data), width=clip.size[1], height=clip.size[0], num_threads=1)
    return reader.get_batch(clip.indices).asnumpy()


def _pyav(clip: Clip) -> object:
    import io

    import av
    from av.video.reformatter import Interpolation

    wanted, (height, width) = set(clip.indices.tolist()), clip.size
    with av.open(io.BytesIO(clip.data), mode="r") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames = []
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                frames.append(
                    frame.to_ndarray(
                        format="rgb24", width=width, height=height, interpolation=Interpolation.BILINEAR, threads=1
                    )
                )
            if number == clip.indices[-1]:
                break
    return np.stack(frames)


def _torchcodec(clip: Clip) -> object:
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    decoder = VideoDecoder(
        clip.data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact", transforms=[Resize(clip.size)]
    )
    return decoder.get_frames_at(clip.indices.tolist()).data.numpy()
