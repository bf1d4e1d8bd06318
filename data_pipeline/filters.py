"""Which clips are kept; a dropped clip has a reason that is counted, never an error.

Each filter is a pure function that returns a reason, or None to keep. `reason_by_thresholds` judges a surveyed piece
before anything is encoded; `reason_to_drop` a decoded clip. `scores` are measured where there was no survey.

Legend: `t` frames, `h` `w` pixels, `c` colours.
"""

import numpy as np

from data_pipeline.clip_list import SurveyedClip
from data_pipeline.decode import DecodedClip
from m4v_dist.config.curation_settings import CurationThresholds

TOO_SHORT = "too_short"
NOT_AN_IMAGE = "not_an_image"
REST_OF_SCENE = "rest_of_scene"
DUPLICATE = "duplicate"


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


def reason_by_thresholds(clip: SurveyedClip, media: str, thresholds: CurationThresholds, splits: bool) -> str | None:
    """Why a surveyed piece is not kept, or None; of several reasons the first in this order.

    Args:
        clip: what the survey found.
        media: "video" or "image", what its source holds.
        thresholds: those of its source.
        splits: whether a long scene gives all its pieces; else its first alone.
    """
    limits = thresholds
    is_video = media == "video"
    if not is_video and clip.fps > 0:
        return NOT_AN_IMAGE
    if clip.part > 0 and not splits:
        return REST_OF_SCENE
    faults = {
        "too_small": clip.height_px < limits.min_height_px or clip.width_px < limits.min_width_px,
        TOO_SHORT: is_video and clip.seconds < limits.min_seconds,
        "black": clip.black_share > limits.max_black_share,
        "too_dark": clip.brightness < limits.min_brightness,
        "too_bright": clip.brightness > limits.max_brightness,
        "flat": clip.contrast < limits.min_contrast,
        "bars": clip.bars_share > limits.max_bars_share,
        "blurred": clip.sharpness < limits.min_sharpness,
        "static": is_video and clip.static_share > limits.max_static_share,
        "too_still": is_video and clip.motion < limits.min_motion,
        "too_fast": is_video and clip.motion > limits.max_motion,
    }
    return next((reason for reason, has_fault in faults.items() if has_fault), None)


def scores(clip: DecodedClip) -> dict[str, float]:
    """Measure what a curation may want to know, on every fourth pixel; in [0, 1], four decimals.

    Returns:
        `brightness`: mean of all pixels; `motion`: mean absolute change from frame to frame, 0 for a still.
    """
    coarse = clip.frames[:, ::4, ::4].astype(np.int16)  # t h w c
    motion = float(np.abs(np.diff(coarse, axis=0)).mean()) if len(coarse) > 1 else 0.0
    return {"brightness": round(float(coarse.mean()) / 255, 4), "motion": round(motion / 255, 4)}
