"""Where one scene ends and the next begins, frame by frame: the only file that imports PySceneDetect.

A hard cut is a frame that differs from the one before by `cut_change` and by `cut_ratio` times as much as its
neighbours do (PySceneDetect's adaptive detector, in hue, saturation and brightness). Where a film fades to black and
comes back, the new scene begins with the first frame that is light again (its threshold detector). A slow cross-fade
has no frame of its own and is not found.

Frames that repeat the one before are left out, a few in a row: in a film that is drawn on threes, every third frame
would else differ from neighbours that stand still, and be a cut.
"""

from typing import Any

import numpy as np

from data_pipeline.picture_scores import Picture

WINDOW = 2
"""Frames on each side that a frame is compared with."""
MAX_REPEATS = 5
"""Repeats in a row that are left out: 4 drawings a second in a film of 24 frames; a longer stop is seen as one."""
FADE_LEVEL = 12
"""Mean of red, green and blue, of 255, under which a film has faded out."""


class SceneCuts:
    """Finds cuts in a stream of frames, and holds no frame but the last.

    Args:
        cut_change: mean change in hue, saturation and brightness, of 255, from which a frame may be a cut.
        cut_ratio: and how many times that of its neighbours it must be; 0 asks for the change alone.
    """

    delay = WINDOW * (MAX_REPEATS + 1)
    """Whether a frame is a cut is known once this many frames came after it, or none will."""

    def __init__(self, cut_change: float, cut_ratio: float) -> None:
        from scenedetect.detectors import AdaptiveDetector, ThresholdDetector

        # no shortest scene here: of two cuts that lie close both are true, and a short scene is dropped with a count
        adaptive = AdaptiveDetector(
            adaptive_threshold=cut_ratio, min_content_val=cut_change, window_width=WINDOW, min_scene_len=1
        )
        fades = ThresholdDetector(threshold=FADE_LEVEL, fade_bias=1.0, min_scene_len=1)
        self._detectors = (adaptive, fades)
        self._num_frames = self._num_repeats = 0
        self._cuts: set[int] = set()

    def push(self, picture: Picture, is_repeat: bool) -> None:
        """Take the next frame.

        Args:
            picture: h w c uint8.
            is_repeat: whether it repeats the one before.
        """
        from scenedetect import FrameTimecode

        number = self._num_frames
        self._num_frames += 1
        if is_repeat and self._num_repeats < MAX_REPEATS:
            self._num_repeats += 1
            return
        self._num_repeats = 0
        bgr = np.ascontiguousarray(picture[..., ::-1])
        # detectors count frames; the rate is asked for and decides nothing
        timecode: Any = FrameTimecode(number, fps=25.0)
        for detector in self._detectors:
            self._cuts.update(cut.frame_num for cut in detector.process_frame(timecode, bgr))

    def is_cut(self, frame: int) -> bool:
        """Whether a scene begins with this frame; asked in order, each frame once it is known."""
        is_cut = frame in self._cuts
        self._cuts = {cut for cut in self._cuts if cut > frame}
        return is_cut
