"""Files and annotations to records: each entry that cannot be packed is told with its line or file."""

import json
from pathlib import Path

import pytest

from data_pipeline.captions import Caption
from data_pipeline.media_list import list_media, read_annotations, read_media
from m4v_dist.errors import DataError


def write_files(folder: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


def write_lines(path: Path, *lines: object) -> str:
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines) + b"\n"
    )
    return str(path)


def test_a_folder_s_media_are_taken_by_path_with_the_texts_beside_them(tmp_path: Path) -> None:
    folder = write_files(
        tmp_path,
        {
            "b/clip.v2.mp4": b"2", "b/clip.v2.txt": b"from txt",
            "a.MP4": b"1", "a.json": b'{"captions": ["one", "two"], "licence": "CC0"}', "a.txt": b"json goes before",
            "狐/x.webm": b"3", "狐/x.txt": "über".encode(),
            "poster.jpg": b"4", "poster.txt": b"a picture's own", "README": b"notes",
        },
    )  # fmt: skip
    found = list_media(folder, "video", 3)
    assert found.errors == [] and found.num_ignored == 3
    clips = list(read_media(found.entries, 2))
    assert [(clip.key, clip.kind, clip.data, [c.text for c in clip.captions]) for clip in clips] == [
        ("a", "mp4", b"1", ["one", "two"]), ("b/clip_v2", "mp4", b"2", ["from txt"]), ("狐/x", "webm", b"3", ["über"]),
    ]  # fmt: skip
    assert clips[0].metadata == {"licence": "CC0", "file": "a.MP4"}
    assert [entry.key for entry in list_media(f"{folder}/", "image", 1).entries] == ["poster"]


def test_files_that_cannot_be_packed_are_told_by_name(tmp_path: Path) -> None:
    folder = write_files(
        tmp_path,
        {
            "bare.mp4": b"1",
            "empty.mp4": b"", "empty.txt": b"x",
            "latin.mp4": b"1", "latin.txt": b"caf\xe9",
            "bad.mp4": b"1", "bad.json": b'{"captions": []}',
            "same.mp4": b"1", "same.mkv": b"2", "same.txt": b"x",
            "alone.txt": b"x",
            "good.mp4": b"1", "good.txt": b"x",
        },
    )  # fmt: skip
    found = list_media(folder, "video", 2)
    assert [entry.key for entry in found.entries] == ["good", "same"]
    assert found.errors == [
        "bad.mp4: captions is [], not a list of at least one",
        "bare.mp4: caption is missing",
        f"empty.mp4: {folder}/empty.mp4 is empty",
        "latin.mp4: txt is no UTF-8 (byte 0xe9 at 3); write it anew in UTF-8",
        "same.mp4: key 'same' stands at same.mkv too; several captions of a clip go into `captions`",
        "alone.txt: no media stands beside it",
    ]
    with pytest.raises(DataError, match="no such folder, or nothing in it"):
        list_media(f"{folder}/none", "video", 1)


def test_pyramidflow_s_annotations_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = write_files(tmp_path, {"videos/a.b.mp4": b"1", "videos/c.mp4": b"2", "pictures/p.jpg": b"3"})
    path = write_lines(
        tmp_path / "video_text.jsonl",
        {"video": "videos/a.b.mp4", "text": "a fox", "latent": "latent/a-latent-384-2.pt", "text_fea": "text_fea/a.pt"},
        {"video": f"{folder}/videos/c.mp4", "text": "two foxes", "latent": "l.pt", "text_fea": "t.pt"},
    )
    found = read_annotations(path, None, "video")
    assert found.errors == []
    first, second = read_media(found.entries, 2)
    assert (first.key, first.data, first.captions) == ("videos/a_b", b"1", (Caption("a fox"),))
    assert first.metadata == {
        "file": "videos/a.b.mp4", "latent": "latent/a-latent-384-2.pt", "text_fea": "text_fea/a.pt",
    }  # fmt: skip
    assert second.key == f"{folder}/videos/c".lstrip("/") and second.data == b"2"
    path = write_lines(tmp_path / "image_text.jsonl", {"image": "p.jpg", "text": "a picture"})
    (entry,) = read_annotations(path, f"{folder}/pictures", "image").entries
    assert (entry.key, entry.path) == ("p", f"{folder}/pictures/p.jpg")


def test_lines_that_cannot_be_packed_are_told_by_number(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.mp4": b"1", "p.jpg": b"3"})
    path = write_lines(
        tmp_path / "list.jsonl",
        {"video": "a.mp4", "captions": [{"text": "x", "weight": 2}]},
        b"",
        {"video": "a.mp4", "text": "again"},
        {"video": "none.mp4", "text": "x"},
        {"video": "far/away.mp4", "text": "x"},
        {"text": "no path"},
        {"video": "a.mp4", "image": "p.jpg", "text": "two paths"},
        {"video": 7, "text": "x"},
        {"video": "p.jpg", "text": "x"},
        {"video": "a.mp4"},
        b"{not json",
        b'{"video": "a.mp4", "text": "caf\xe9"}',
        b'["a.mp4", "x"]',
    )
    found = read_annotations(path, None, "video")
    assert [(entry.key, entry.captions) for entry in found.entries] == [("a", (Caption("x", 2.0),))]
    reasons = dict(error.split(": ", 1) for error in found.errors)
    expected = {
        "line 3": "key 'a' stands at line 1 too", "line 4": f"{tmp_path}/none.mp4 is not there",
        "line 5": f"{tmp_path}/far/away.mp4 is not there", "line 6": "needs one path", "line 7": "needs one path",
        "line 8": "needs one path", "line 9": "p.jpg is no video: it ends in none of avi, ",
        "line 10": "key 'a' stands",
        "line 11": "json is no JSON", "line 12": "json is no UTF-8 (byte 0xe9", "line 13": "json is ['a.mp4', 'x']",
    }  # fmt: skip
    assert reasons.keys() == expected.keys()
    for line, start in expected.items():
        assert start in reasons[line], line
    with pytest.raises(DataError, match="no such file of annotations"):
        read_annotations(f"{tmp_path}/none.jsonl", None, "video")
