"""Which decoded clips are kept; a dropped clip has a reason that is counted, never an error.

Each filter is a pure function that returns a reason, or None to keep. Scene cuts, motion and brightness join with the
curation pass.
"""

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
