"""The survey of one raw clip: cuts where scenes are joined, scores of pieces that are known, bounded memory."""

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from data_pipeline.decode import DecodeError, DecodeRule, choose_frames
from data_pipeline.decoder_pool import ChildPool
from data_pipeline.picture_scores import FLOW_SIDE_PX, change, small_luma
from data_pipeline.survey import Piece, Survey, SurveyRule, cut_and_score, survey_clip
from m4v_dist.frozen.video_file import encode_mp4, encode_png
from tests.data_pipeline.made_scenes import Pictures, blurred, plain, texture

RULE = SurveyRule(num_frames=121, fps=24.0, cut_change=14.0, cut_ratio=2.2)


def pieces_of(frames: Pictures, fps: float = 24.0, rule: SurveyRule = RULE) -> list[Piece]:
    return list(cut_and_score(((number / fps, picture) for number, picture in enumerate(frames)), fps, rule))


def spans(pieces: list[Piece]) -> list[tuple[int, int]]:
    return [(piece.first_frame, piece.num_frames) for piece in pieces]


def test_two_scenes_are_cut_where_they_are_joined() -> None:
    media = encode_mp4(np.concatenate([texture(1, 30), texture(2, 25), texture(3, 12)]), 24.0)
    survey = survey_clip(media, "mp4", RULE)
    assert spans(list(survey.pieces)) == [(0, 30), (30, 25), (55, 12)]
    assert [piece.scene for piece in survey.pieces] == [0, 1, 2]
    assert (survey.height_px, survey.width_px, survey.num_frames) == (96, 96, 67)
    assert survey.fps == pytest.approx(24.0, abs=1e-6)
    assert Survey.from_json(survey.to_json()) == survey


def test_a_steady_scene_has_no_cut_and_its_motion_is_its_shift() -> None:
    (piece,) = pieces_of(texture(4, 49, shift_px=1))
    # 24 pixels a second, of a short side of 96
    assert piece.motion == pytest.approx(24 / 96, rel=0.1)
    assert (piece.static_share, piece.black_share, piece.bars_share) == (0.0, 0.0, 0.0)


def test_motion_is_the_same_at_any_frame_rate() -> None:
    for fps, shift_px in ((12.0, 4), (24.0, 2), (48.0, 1)):
        (piece,) = pieces_of(texture(5, int(2 * fps) + 1, shift_px), fps)
        assert piece.motion == pytest.approx(0.5, rel=0.12), fps


def test_a_still_picture_has_no_motion_and_is_static_throughout() -> None:
    media = encode_mp4(texture(6, 40, shift_px=0), 24.0)
    (piece,) = survey_clip(media, "mp4", RULE).pieces
    assert (piece.motion, piece.static_share) == (0.0, 1.0)
    frames = texture(6, 40).repeat(2, axis=0)  # drawn on twos
    (piece,) = pieces_of(frames)
    assert piece.static_share == pytest.approx(40 / 79, abs=1e-4) and piece.motion > 0.1


def test_a_film_that_fades_to_black_is_cut_where_it_comes_back() -> None:
    down, up = np.linspace(1, 0, 13)[:, None, None, None], np.linspace(0, 1, 13)[:, None, None, None]
    first, second = texture(7, 43), texture(8, 43)
    frames = np.concatenate(
        [
            first[:30],
            (first[30:] * down).astype(np.uint8),
            plain(0, 12),
            (second[:13] * up).astype(np.uint8),
            second[13:],
        ]
    )
    pieces = pieces_of(frames)
    # frames 43 to 54 are black, and those next to them nearly so; black itself may be a scene
    assert 55 <= pieces[-1].first_frame <= 58 and pieces[-1].black_share == 0
    assert sum(piece.black_share * piece.num_frames for piece in pieces) == pytest.approx(14, abs=1)


def test_a_black_film_is_one_black_scene() -> None:
    (piece,) = survey_clip(encode_mp4(plain(0, 30), 24.0), "mp4", RULE).pieces
    assert (piece.black_share, piece.brightness, piece.contrast, piece.sharpness) == (1.0, 0.0, 0.0, 0.0)
    assert piece.bars_share == 1.0


def test_a_blurred_copy_is_less_sharp() -> None:
    sharp, soft = (pieces_of(frames)[0].sharpness for frames in (texture(9, 12), blurred(texture(9, 12), 2)))
    assert 0 < soft < 0.2 * sharp


def test_letterbox_bars_are_measured_over_all_frames() -> None:
    frames = texture(10, 20)
    frames[:, :12], frames[:, -12:] = 0, 0
    (piece,) = pieces_of(frames)
    assert piece.bars_share == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(("fps", "longest"), [(24.0, 17), (48.0, 33), (12.0, 17), (25.0, 18)])
def test_a_long_scene_is_cut_into_pieces_that_give_whole_clips(fps: float, longest: int) -> None:
    rule = SurveyRule(num_frames=17, fps=24.0, cut_change=14.0, cut_ratio=2.2)
    indices, _ = choose_frames(np.arange(longest) / fps, fps, DecodeRule(((64, 64),), 17, 24.0))
    assert (len(indices), indices[-1]) == (17, longest - 1)
    pieces = pieces_of(np.concatenate([texture(11, 2 * longest + 5), texture(12, longest)]), fps, rule)
    assert spans(pieces) == [
        (0, longest), (longest, longest), (2 * longest, 5), (2 * longest + 5, longest),
    ]  # fmt: skip
    assert [(piece.scene, piece.part) for piece in pieces] == [(0, 0), (0, 1), (0, 2), (1, 0)]


def test_pieces_of_a_variable_frame_rate_are_cut_by_time() -> None:
    rule = SurveyRule(num_frames=17, fps=24.0, cut_change=14.0, cut_ratio=2.2)
    times = np.cumsum([0.0, *[1 / 48] * 40, *[1 / 12] * 20])
    pieces = list(cut_and_score(zip(times.tolist(), texture(11, 61), strict=True), 24.4, rule))
    assert spans(pieces) == [(0, 33), (33, 15), (48, 9), (57, 4)]
    for piece in pieces[:-1]:
        part = times[piece.first_frame : piece.first_frame + piece.num_frames] - times[piece.first_frame]
        assert len(choose_frames(part, 24.4, DecodeRule(((64, 64),), 17, 24.0))[0]) == 17
        assert len(choose_frames(part[:-1], 24.4, DecodeRule(((64, 64),), 17, 24.0))[0]) < 17


def test_pieces_are_measured_on_their_own_frames_alone() -> None:
    scenes = [texture(13, 30, shift_px=2), texture(14, 30, shift_px=0), plain(60, 30)]
    joined = pieces_of(np.concatenate(scenes))
    alone = [pieces_of(scene)[0] for scene in scenes]
    assert spans(joined) == [(0, 30), (30, 30), (60, 30)]
    for piece, single in zip(joined, alone, strict=True):
        assert (piece.static_share, piece.black_share, piece.bars_share) == (
            single.static_share, single.black_share, single.bars_share,
        )  # fmt: skip
        assert (piece.brightness, piece.contrast) == (single.brightness, single.contrast)
        assert piece.motion == pytest.approx(single.motion, rel=0.05)


def test_a_film_drawn_on_threes_is_not_cut_at_every_drawing() -> None:
    frames = np.concatenate([texture(19, 16, shift_px=2), texture(20, 16, shift_px=2)]).repeat(3, axis=0)
    assert spans(pieces_of(frames)) == [(0, 48), (48, 48)]


def test_static_share_counts_the_frames_that_repeat_one() -> None:
    frames = texture(15, 26).repeat([1] * 10 + [5] + [1] * 15, axis=0)
    luma = [small_luma(picture, FLOW_SIDE_PX) for picture in frames]
    repeats = sum(change(before, after) == 0 for before, after in zip(luma, luma[1:], strict=False))
    (piece,) = pieces_of(frames)
    assert repeats == 4 and piece.static_share == pytest.approx(4 / 29, abs=1e-4)


def test_memory_does_not_grow_with_the_film() -> None:
    def peak(num_frames: int) -> int:
        def frames() -> Iterator[tuple[float, np.ndarray]]:
            scene = texture(16, 8)
            for number in range(num_frames):
                yield number / 24, scene[number % 8]

        tracemalloc.start()
        for _ in cut_and_score(frames(), 24.0, RULE):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(30)
    assert peak(600) < peak(60) + 300_000


def test_a_still_is_one_piece_without_motion() -> None:
    survey = survey_clip(encode_png(texture(17, 1)[0]), "png", RULE)
    assert survey.fps == 0.0 and spans(list(survey.pieces)) == [(0, 1)]
    assert survey.pieces[0].motion == 0.0 and survey.pieces[0].sharpness > 20


@pytest.mark.parametrize(("kind", "data"), [("mp4", b"no film"), ("png", b"no picture"), ("xyz", b""), ("mp4", b"")])
def test_what_cannot_be_decoded_is_refused(kind: str, data: bytes) -> None:
    with pytest.raises(DecodeError):
        survey_clip(data, kind, RULE)


def test_a_film_that_breaks_off_is_refused_and_not_taken_for_a_short_one() -> None:
    media = encode_mp4(texture(18, 60), 24.0)
    with pytest.raises(DecodeError):
        survey_clip(media[: len(media) * 2 // 3], "mp4", RULE)


def test_children_survey_as_this_process_does() -> None:
    media = encode_mp4(np.concatenate([texture(1, 20), texture(2, 20)]), 24.0)
    rule = {"num_frames": 121, "fps": 24.0, "cut_change": 14.0, "cut_ratio": 2.2}
    with ChildPool(1, 60.0) as pool:
        items = [(media, {"kind": "mp4", "rule": rule}), (media[:99], {"kind": "mp4", "rule": rule})]
        found, broken = pool.run_all("survey", items)
    assert not isinstance(found, DecodeError) and Survey.from_json(found[0]) == survey_clip(media, "mp4", RULE)
    assert isinstance(broken, DecodeError)
