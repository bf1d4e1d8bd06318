"""The benchmark of decoders: all contestants take the same frames, and the page compares them."""

import pytest

from m4v_dist.bench.decode_times import DecodeTimes, decode_page, decode_times
from m4v_dist.frozen.video_file import encode_mp4
from tests.data_pipeline.made_cache import moving_blocks


def test_every_contestant_is_timed_sparse_and_dense() -> None:
    media = [(encode_mp4(moving_blocks(seed, 20), 24.0), "mp4") for seed in range(2)]
    times = decode_times(media, ((64, 64),), num_rounds=1)
    assert {row.sampling for row in times} == {"sparse", "dense"}
    names = {row.name for row in times}
    assert {"decord alone", "PyAV alone, one pass", "ours, in this process", "ours, in a child"} <= names
    assert {row.num_frames for row in times} == {2 * 17}
    assert all(row.seconds > 0 and row.num_clips == 2 for row in times)


def test_the_page_divides_by_bare_decord() -> None:
    page = decode_page([DecodeTimes("dense", "decord alone", 4, 40, 2.0), DecodeTimes("dense", "ours", 4, 40, 3.0)])
    (row,) = [line for line in page.splitlines() if " ours " in line]
    assert [cell.strip() for cell in row.split("|")[2:6]] == ["ours", "1.33", "13.3", "1.50"]
    assert page.endswith("torchcodec is not installed here.")


@pytest.mark.parametrize("num_frames", [1, 5, 30])
def test_short_clips_are_timed_too(num_frames: int) -> None:
    times = decode_times([(encode_mp4(moving_blocks(1, num_frames), 24.0), "mp4")], ((64, 64),), num_rounds=1)
    assert all(row.num_frames % 8 == 1 for row in times)
