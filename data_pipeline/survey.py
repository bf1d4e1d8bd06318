"""One look at a whole raw clip: its scenes, cut into pieces no longer than a clip of the cache, and what each scores.

Runs in a decoder child, frame by frame over small pictures: what is held does not grow with the clip, but for the list
of pieces itself. Nothing is judged here, so that other thresholds need no new survey (`clip_list.py` judges).

A *piece* is a part of one scene: the frames that the longest clip of the cache spans, as many again, and a rest. It is
measured on the frames that it holds.

Legend: `h` `w` pixels, `c` red, green, blue.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data_pipeline.decode import IMAGE_KINDS, DecodeError
from data_pipeline.picture_scores import (
    FLOW_SIDE_PX,
    SHARPNESS_SIDE_PX,
    STATIC_CHANGE,
    FlowMeter,
    Picture,
    PictureScores,
    bars_share,
    change,
    score_picture,
    sharpness,
    small_luma,
)
from data_pipeline.scene_cuts import SceneCuts
from data_pipeline.source_frames import SourceInfo, read_frames
from m4v_dist.frozen.video_file import MediaError, decode_animation, decode_image

SURVEY_VERSION = 1
"""Raised when a score or a rule of the survey changes its meaning, so that shards are surveyed anew."""
SAMPLES_PER_S = 8.0
"""Frames a second that are looked at for motion and sharpness, about."""


@dataclass(frozen=True)
class SurveyRule:
    """What decides a survey; thresholds are not among it.

    Args:
        num_frames: of the longest clip, 8k+1.
        fps: its highest frame rate.
        cut_change, cut_ratio: see `SceneCuts`.
    """

    num_frames: int
    fps: float
    cut_change: float
    cut_ratio: float

    def longest_s(self, source_fps: float) -> float:
        """Seconds from the first to the last frame of the longest clip of a source (see `decode.choose_frames`)."""
        return (self.num_frames - 1) / min(source_fps, self.fps)


@dataclass(frozen=True)
class Piece:
    """A part of a scene that may become a clip.

    Args:
        scene: number of its scene in the file, from 0.
        part: number of the piece in its scene, from 0.
        first_frame: in source frames, in the order of presentation.
        num_frames: in source frames.
        seconds: that it is shown; 0 for a still.
        motion: mean length of the optical flow, in short sides of the picture a second.
        static_share: frames that repeat the one before, of those that have one before them in the piece.
        black_share: frames that are black.
        brightness: mean luma, in [0, 1].
        contrast: mean over the frames of the standard deviation of luma, in [0, 1].
        sharpness: mean variance of the Laplacian, in grey levels squared, at a short side of 256 px.
        bars_share: area of the rows and columns at the edges that stay black throughout, as letterbox bars do.
    """

    scene: int
    part: int
    first_frame: int
    num_frames: int
    seconds: float
    motion: float
    static_share: float
    black_share: float
    brightness: float
    contrast: float
    sharpness: float
    bars_share: float


@dataclass(frozen=True)
class Survey:
    """What a file holds.

    Args:
        height_px, width_px: of a frame, upright.
        fps: mean rate; 0 for a still.
        num_frames: frames that were seen.
        pieces: all of it, in order, without gaps.
    """

    height_px: int
    width_px: int
    fps: float
    num_frames: int
    pieces: tuple[Piece, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Survey":
        """The inverse of `to_json`."""
        return cls(**{**values, "pieces": tuple(Piece(**piece) for piece in values["pieces"])})


@dataclass(frozen=True)
class _Seen:
    """What is kept of one frame until it is known to which scene it belongs.

    Args:
        seconds: when it is shown.
        luma: at the size of flow.
        scores: of the frame by itself.
        is_repeat: whether it repeats the frame before it.
        sharpness: None where the frame is no sample.
        flow: (number of the sample before, length in short sides, seconds since it); None where there is none.
    """

    seconds: float
    luma: Picture
    scores: PictureScores
    is_repeat: bool
    sharpness: float | None
    flow: tuple[int, float, float] | None


@dataclass
class _Sums:
    """Running sums over the frames of one piece; the rate is that of the file, 0 for a still."""

    fps: float
    scene: int
    part: int
    first_frame: int
    num_frames: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    num_repeats: int = 0
    num_black: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    sharpness: list[float] = field(default_factory=lambda: [0.0, 0.0])
    flow: list[float] = field(default_factory=lambda: [0.0, 0.0])
    brightest: Picture | None = None

    def add(self, seen: _Seen) -> None:
        self.num_repeats += seen.is_repeat and self.num_frames > 0
        self.first_s = self.first_s if self.num_frames else seen.seconds
        self.last_s = seen.seconds
        self.num_frames += 1
        self.num_black += seen.scores.is_black
        self.brightness += seen.scores.brightness
        self.contrast += seen.scores.contrast
        if seen.sharpness is not None:
            self.sharpness[0] += seen.sharpness
            self.sharpness[1] += 1
        # flow from a sample before the piece is of another scene, or of a piece that has counted it
        if seen.flow is not None and seen.flow[0] >= self.first_frame:
            self.flow[0] += seen.flow[1]
            self.flow[1] += seen.flow[2]
        self.brightest = seen.luma if self.brightest is None else np.maximum(self.brightest, seen.luma)

    def piece(self) -> Piece:
        assert self.brightest is not None
        return Piece(
            scene=self.scene,
            part=self.part,
            first_frame=self.first_frame,
            num_frames=self.num_frames,
            seconds=round(self.last_s - self.first_s + 1 / self.fps, 3) if self.fps else 0.0,
            motion=round(self.flow[0] / self.flow[1], 4) if self.flow[1] else 0.0,
            static_share=round(self.num_repeats / max(1, self.num_frames - 1), 4),
            black_share=round(self.num_black / self.num_frames, 4),
            brightness=round(self.brightness / self.num_frames, 4),
            contrast=round(self.contrast / self.num_frames, 4),
            sharpness=round(self.sharpness[0] / max(1.0, self.sharpness[1]), 1),
            bars_share=round(bars_share(self.brightest), 4),
        )


def survey_clip(data: bytes, kind: str, rule: SurveyRule) -> Survey:
    """Survey one file in this process; callers with unknown files go through `DecoderPool`.

    Args:
        data: the whole file.
        kind: its extension in lower case, without the dot.
        rule: what decides it.

    Raises:
        DecodeError: it cannot be decoded to its end.
    """
    if kind in IMAGE_KINDS:
        info, frames = _read_picture(data, kind)
    else:
        info, frames = read_frames(data, kind, short_side_px=SHARPNESS_SIDE_PX)
    pieces = tuple(cut_and_score(frames, info.fps, rule))
    if not pieces:
        raise DecodeError("holds no frame")
    num_frames = sum(piece.num_frames for piece in pieces)
    return Survey(info.height_px, info.width_px, info.fps, num_frames, pieces)


def _read_picture(data: bytes, kind: str) -> tuple[SourceInfo, Iterator[tuple[float, Picture]]]:
    """A still, or an animated WebP, as `decode.decode_clip` takes them."""
    try:
        pictures, fps = decode_animation(data) if kind == "webp" else (decode_image(data), 0.0)
    except MediaError as error:
        raise DecodeError(str(error)) from error
    rate = fps if len(pictures) > 1 else 0.0
    info = SourceInfo(pictures.shape[1], pictures.shape[2], rate, len(pictures), kind, kind, "pillow")
    return info, ((number / rate if rate else 0.0, picture) for number, picture in enumerate(pictures))


def cut_and_score(frames: Iterator[tuple[float, Picture]], fps: float, rule: SurveyRule) -> Iterator[Piece]:
    """Cut a stream of frames into pieces and score them.

    Args:
        frames: (seconds, picture h w c) in the order of presentation.
        fps: their mean rate; 0 for a still.
        rule: what decides the cuts.

    Yields:
        the pieces in order; together they hold every frame once.
    """
    longest_s = rule.longest_s(fps) if fps else 0.0
    sums = _Sums(fps, 0, 0, 0)
    for number, (is_cut, seen) in enumerate(_settled(frames, fps, rule)):
        # a microsecond, for time stamps are rounded
        is_full = sums.last_s - sums.first_s >= longest_s - 1e-6
        if sums.num_frames and (is_cut or is_full):
            yield sums.piece()
            sums = _Sums(fps, sums.scene + is_cut, 0 if is_cut else sums.part + 1, number)
        sums.add(seen)
    if sums.num_frames:
        yield sums.piece()


def _settled(frames: Iterator[tuple[float, Picture]], fps: float, rule: SurveyRule) -> Iterator[tuple[bool, _Seen]]:
    """Each frame once it is known whether a scene begins with it, and that."""
    cuts, watch = SceneCuts(rule.cut_change, rule.cut_ratio), _Watch(fps)
    waiting: deque[_Seen] = deque()
    number = 0
    for seconds, picture in frames:
        seen = watch.look(seconds, picture)
        cuts.push(picture, seen.is_repeat)
        waiting.append(seen)
        if len(waiting) > cuts.delay:
            yield cuts.is_cut(number), waiting.popleft()
            number += 1
    while waiting:
        yield cuts.is_cut(number), waiting.popleft()
        number += 1


class _Watch:
    """Looks at frame after frame, and holds the luma of the last one and of the last sample.

    Args:
        fps: mean rate; 0 for a still.
    """

    def __init__(self, fps: float) -> None:
        self._step = max(1, round(fps / SAMPLES_PER_S))
        self._fps = fps
        self._flow = FlowMeter()
        self._frame = 0
        self._last: Picture | None = None
        self._sample: tuple[int, float, Picture] | None = None

    def look(self, seconds: float, picture: Picture) -> _Seen:
        """Measure the next frame."""
        luma = small_luma(picture, FLOW_SIDE_PX)
        is_repeat = self._last is not None and change(self._last, luma) <= STATIC_CHANGE
        how_sharp, flow = None, None
        if self._frame % self._step == 0:
            how_sharp = sharpness(small_luma(picture, SHARPNESS_SIDE_PX))
            flow = self._flow_since_sample(seconds, luma)
            self._sample = (self._frame, seconds, luma)
        self._last = luma
        self._frame += 1
        return _Seen(seconds, luma, score_picture(luma), is_repeat, how_sharp, flow)

    def _flow_since_sample(self, seconds: float, luma: Picture) -> tuple[int, float, float] | None:
        if self._sample is None:
            return None
        number, before_s, before = self._sample
        # a clock that stands still or runs backwards tells nothing: the mean rate does
        elapsed_s = seconds - before_s if seconds > before_s else self._step / self._fps
        return number, self._flow.mean_length(before, luma), elapsed_s
