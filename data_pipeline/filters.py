"""Which decoded clips are kept; a dropped clip has a reason that is counted, never an error.

Each filter is a pure function that returns a reason, or None to keep. `scores` are measured and stored with every kept
clip, and drop nothing yet: the thresholds come with the curation pass.

Legend: `t` frames, `h` `w` pixels, `c` colours.
"""

import numpy as np

from data_pipeline.decode import DecodedClip

TOO_SHORT = "too_short"
NOT_AN_IMAGE = "not_an_image"


def reason_to_drop(clip: DecodedClip, media: str, min_frames: int) -> str | None:
    """Why a clip is not kept, or None.

    Args:
        clip: after the frame rule.
        media: "video" or "image", what its source holds.
        min_frames: shortest video kept, in frames at the cached rate.
    """
    num_frames = len(clip.frames)
    if media == "image":
        return NOT_AN_IMAGE if num_frames != 1 else None
    return TOO_SHORT if num_frames < min_frames else None


def scores(clip: DecodedClip) -> dict[str, float]:
    """Measure what a curation may want to know, on every fourth pixel; in [0, 1], four decimals.

    Returns:
        `brightness`: mean of all pixels; `motion`: mean absolute change from frame to frame, 0 for a still.
    """
    coarse = clip.frames[:, ::4, ::4].astype(np.int16)  # t h w c
    motion = float(np.abs(np.diff(coarse, axis=0)).mean()) if len(coarse) > 1 else 0.0
    return {"brightness": round(float(coarse.mean()) / 255, 4), "motion": round(motion / 255, 4)}
