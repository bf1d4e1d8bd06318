"""The demo's list holds together, and a clip of an installed package becomes an mp4 and two stills."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.captions import Caption
from data_pipeline.decode import DecodeError, DecodeRule, decode_clip
from data_pipeline.demo_clips import (
    BROKEN_KEY,
    DemoClip,
    break_record,
    media_records,
    pack_demo,
    package_file,
    read_clip_list,
)
from data_pipeline.pack import RawClip, read_shard
from m4v_dist.errors import DataError

LIST = str(Path(__file__).parents[2] / "jobs" / "configs" / "demo_clips.json")
RULE = DecodeRule(buckets=((64, 64),), num_frames=17, fps=8.0)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package that ships one animated WebP of 24 frames with an odd size."""
    from PIL import Image

    folder = tmp_path / "clips_for_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (65, 67, 3), dtype=np.uint8)
    pictures = [Image.fromarray(np.roll(noise, 2 * t, axis=1)) for t in range(24)]
    buffer = io.BytesIO()
    pictures[0].save(buffer, format="WEBP", save_all=True, append_images=pictures[1:], duration=50)
    (folder / "a.webp").write_bytes(buffer.getvalue())
    monkeypatch.syspath_prepend(str(tmp_path))
    return "clips_for_test/a.webp"


def _clip(file: str, still_frame: int = 3) -> DemoClip:
    return DemoClip("a", file, "train", "noise that moves", still_frame, 15.0, "MIT", True)


def test_the_committed_list_splits_without_overlap() -> None:
    clips = read_clip_list(LIST)
    train = {clip.file for clip in clips if clip.split == "train"}
    held_out = {clip.file for clip in clips if clip.split == "held_out"}
    in_demo = {clip.split: sum(other.is_in_demo for other in clips if other.split == clip.split) for clip in clips}
    assert in_demo == {"train": 10, "held_out": 6}
    assert len(train) >= 20 and len(held_out) >= 4 and not train & held_out
    assert all(clip.caption.strip() and clip.licence for clip in clips)


def test_a_webp_becomes_an_mp4_that_decord_reads_and_two_stills(package: str) -> None:
    ((video, stills),) = list(media_records([_clip(package)], num_threads=1))
    clip = decode_clip(video.data, video.kind, RULE)
    assert clip.source_num_frames == 24 and clip.source_size == (64, 66)
    assert len({video.key, *(still.key for still in stills)}) == 3
    for still in stills:
        assert video.captions == still.captions == (Caption("noise that moves"),)
        assert decode_clip(still.data, still.kind, RULE).frames.shape == (1, 64, 64, 3)


def test_the_broken_record_cannot_be_decoded(package: str) -> None:
    ((video, _),) = list(media_records([_clip(package)], num_threads=1))
    broken = break_record(video)
    assert broken.captions == video.captions and broken.key != video.key
    with pytest.raises(DecodeError):
        decode_clip(broken.data, broken.kind, RULE)


def test_a_still_past_the_end_is_an_error(package: str) -> None:
    with pytest.raises(DataError, match="24 frames"):
        list(media_records([_clip(package, still_frame=24)], num_threads=1))


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(DataError, match="no_such_package is not installed"):
        package_file("no_such_package/a.webp")


def test_a_dot_in_a_stem_does_not_reach_the_key(package: str) -> None:
    clip = DemoClip("v1.5_a", package, "train", "noise", 0, 15.0, "MIT", True)
    ((video, stills),) = list(media_records([clip], num_threads=1))
    assert [video.key, *(still.key for still in stills)] == ["v1_5_a", "v1_5_a_still_0000", "v1_5_a_still_0012"]


def test_a_stem_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    entry = json.loads(Path(LIST).read_text())["clips"][0]
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"clips": [entry, entry]}))
    with pytest.raises(DataError, match="stand twice"):
        read_clip_list(str(path))


def test_packing_writes_three_sources_with_the_broken_file_among_its_neighbours(package: str, tmp_path: Path) -> None:
    clips = [DemoClip(f"c{n}", package, "train", f"caption {n}", 0, 15.0, "MIT", True) for n in range(2)]
    clips.append(DemoClip("u", package, "held_out", "unseen", 0, 15.0, "MIT", True))
    clips.append(DemoClip("left_out", package, "train", "for the codec only", 0, 15.0, "MIT", False))
    out = str(tmp_path / "shards")
    assert list(pack_demo(clips, out, num_clips_per_shard=2, num_threads=1)) == ["c0", "c1", "u"]

    def keys(name: str) -> list[str]:
        records = list(read_shard(f"{out}/{name}.tar"))
        assert all(isinstance(record, RawClip) and record.captions for record in records)
        return [record.key for record in records if isinstance(record, RawClip)]

    assert keys("clips-000") + keys("clips-001") == ["c0", "c1", BROKEN_KEY]
    assert keys("stills-000") == [f"c{n}_still_{frame}" for n in range(2) for frame in ("0000", "0012")]
    assert keys("unseen-000") == ["u"]
