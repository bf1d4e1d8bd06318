"""Frames by torchcodec, where a user has installed it and asks for it: the one door of torchcodec.

It brings torch into the decoder child, and needs FFmpeg's shared libraries on the machine.

Legend: `t` frames, `h` `w` pixels, `c` colours.
"""

import numpy as np

from m4v_dist.errors import ConfigError
from m4v_dist.frozen.video_facts import VideoFacts
from m4v_dist.frozen.video_file import Frames, MediaError

_STAMP_TOLERANCE_S = 1e-3


def torchcodec_frames(data: bytes, facts: VideoFacts, size: tuple[int, int], indices: np.ndarray) -> Frames:
    """Frames of a file by torchcodec, upright, resized inside it.

    Args:
        data: the file.
        facts: what `probe_video` said of it.
        size: (height, width) of the frames.
        indices: of frames in the order they are shown; int64, ascending.

    Returns:
        t h w c uint8.

    Raises:
        MediaError: torchcodec fails, or counts or times frames otherwise than the file's packets do.
        ConfigError: torchcodec or FFmpeg is missing.
    """
    try:
        from torchcodec.decoders import VideoDecoder
        from torchcodec.transforms import Resize
    # torchcodec raises RuntimeError where it finds no FFmpeg that it can load
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(
            f"precompute.decoder='torchcodec', but it cannot be imported ({str(error).splitlines()[0]}); install "
            "torchcodec for this torch, and FFmpeg's shared libraries, on every node."
        ) from error
    if facts.num_outside_edit:
        # seen: it counts the frames inside and gives those outside
        raise MediaError("torchcodec gives wrong frames where an edit list cuts; set precompute.decoder='auto'")
    try:
        decoder = VideoDecoder(
            data, stream_index=facts.stream, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact",
            transforms=[Resize(size)],
        )  # fmt: skip
        num_frames = decoder.metadata.num_frames
        if num_frames != facts.num_frames:
            raise MediaError(f"torchcodec counts {num_frames} frames, the packets are {facts.num_frames}")
        batch = decoder.get_frames_at(indices.tolist())
        frames: Frames = batch.data.numpy()
    except (RuntimeError, ValueError, IndexError) as error:
        raise error if isinstance(error, MediaError) else MediaError(f"torchcodec: {error}") from error
    if frames.shape != (len(indices), *size, 3):
        raise MediaError(f"torchcodec gave frames {frames.shape}, where {(len(indices), *size, 3)} were asked for")
    if facts.stamps:
        wanted = np.asarray(facts.stamps, dtype=np.int64)[indices] * float(facts.time_base)
        difference = float(np.abs(batch.pts_seconds.numpy() - wanted).max())
        if difference > _STAMP_TOLERANCE_S:
            raise MediaError(f"torchcodec shows frames up to {difference:.3f} s off the times that their packets say")
    return frames
