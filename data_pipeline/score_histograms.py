"""How the scores of all surveyed pieces are spread, by source, kept and dropped: what the report draws.

Edges are fixed, so that shards can be counted one after the other and two runs be compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.clip_list import SurveyedClip

NUM_BINS = 40


@dataclass(frozen=True)
class Score:
    """One score and the axis that it is drawn on; what lies outside is counted in the outermost bins.

    Args:
        name: field of `SurveyedClip`.
        unit: of the axis.
        low, high: its ends.
        is_log: whether the bins are equally wide in the logarithm; `low` > 0 then.
        limits: thresholds that ask for it.
        is_of_video: whether stills have none.
    """

    name: str
    unit: str
    low: float
    high: float
    is_log: bool
    limits: tuple[str, ...]
    is_of_video: bool = False

    def edges(self) -> NDArray[np.float64]:
        """The `NUM_BINS` + 1 edges."""
        if self.is_log:
            return np.geomspace(self.low, self.high, NUM_BINS + 1)
        return np.linspace(self.low, self.high, NUM_BINS + 1)


SCORES = (
    Score("seconds", "s", 0.05, 500.0, True, ("min_seconds",), is_of_video=True),
    Score("height_px", "px", 16.0, 8192.0, True, ("min_height_px",)),
    Score("width_px", "px", 16.0, 8192.0, True, ("min_width_px",)),
    Score("motion", "short sides a second", 1e-4, 10.0, True, ("min_motion", "max_motion"), is_of_video=True),
    Score("static_share", "share of frames", 0.0, 1.0, False, ("max_static_share",), is_of_video=True),
    Score("black_share", "share of frames", 0.0, 1.0, False, ("max_black_share",)),
    Score("bars_share", "share of the picture", 0.0, 1.0, False, ("max_bars_share",)),
    Score("brightness", "mean luma", 0.0, 1.0, False, ("min_brightness", "max_brightness")),
    Score("contrast", "deviation of luma", 0.0, 0.5, False, ("min_contrast",)),
    Score("sharpness", "grey levels squared", 1.0, 1e4, True, ("min_sharpness",)),
)


class ScoreHistograms:
    """Counts pieces into bins."""

    def __init__(self) -> None:
        self._edges = {score.name: score.edges() for score in SCORES}
        self._counts: dict[tuple[str, str], NDArray[np.int64]] = {}  # 2 NUM_BINS: kept, dropped

    def add(self, source: str, media: str, clips: Sequence[SurveyedClip]) -> None:
        """Count the pieces of one shard."""
        is_dropped = np.array([bool(clip.reason) for clip in clips], dtype=bool)
        for score in SCORES:
            if score.is_of_video and media != "video":
                continue
            counts = self._counts.setdefault((score.name, source), np.zeros((2, NUM_BINS), np.int64))
            values = np.array([float(getattr(clip, score.name)) for clip in clips])
            inside = np.clip(values, score.low, score.high)
            for row, of_row in enumerate((~is_dropped, is_dropped)):
                counts[row] += np.histogram(inside[of_row], self._edges[score.name])[0]

    def to_json(self, limits: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
        """One entry a score: name, unit, edges, and for each source the counts and its thresholds.

        Args:
            limits: thresholds of each source, by name.
        """
        return [
            {
                "name": score.name,
                "unit": score.unit,
                "is_log": score.is_log,
                "edges": [round(float(edge), 6) for edge in self._edges[score.name]],
                "sources": {
                    source: {
                        "kept": counts[0].tolist(),
                        "dropped": counts[1].tolist(),
                        "limits": {name: limits[source][name] for name in score.limits},
                    }
                    for (name, source), counts in sorted(self._counts.items())
                    if name == score.name
                },
            }
            for score in SCORES
        ]
