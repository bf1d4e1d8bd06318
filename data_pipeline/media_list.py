"""What a user has before there are shards: media files, with captions in one JSON Lines file or in files beside them.

Each entry is checked by listings and captions alone; no media is read until it is packed. An entry that cannot be
packed is an error with its line or file, never passed over.

PyramidFlow's annotations are taken as they are: {"video" or "image": path, "text": caption}, and their `latent` and
`text_fea`, paths of features that its own tools made, go into the record's metadata like every other key.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, TypeVar

from data_pipeline.captions import Caption, CaptionError, read_captions
from data_pipeline.decode import IMAGE_KINDS, VIDEO_KINDS
from data_pipeline.pack import MEDIA_KINDS, RawClip, printable
from m4v_dist import storage
from m4v_dist.errors import DataError

Media = Literal["video", "image"]
Item = TypeVar("Item")
Result = TypeVar("Result")
_KINDS = {"video": VIDEO_KINDS, "image": IMAGE_KINDS}
_TEXT_KINDS = ("json", "txt")


@dataclass(frozen=True)
class MediaEntry:
    """One record to pack.

    Args:
        where: the line or file that names it.
        path: of the media, local or s3://.
        key: of the record: the path as it was given, without its ending, with `_` for dots.
        captions, metadata: see `RawClip`.
    """

    where: str
    path: str
    key: str
    captions: tuple[Caption, ...]
    metadata: dict[str, Any]


@dataclass
class MediaList:
    """Entries in the order that they are packed in, and what cannot be packed.

    Args:
        entries: with keys that differ.
        errors: where and why, printable, one for each entry that is left out.
        num_ignored: files of a folder that are neither such media nor beside one.
    """

    entries: list[MediaEntry] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    num_ignored: int = 0

    def add(self, entry: MediaEntry, seen: dict[str, str], sizes: Callable[[str], int | None], media: Media) -> None:
        """Take an entry, or say why not."""
        reason = None
        size = sizes(entry.path)
        if _kind(entry.path) not in _KINDS[media]:
            reason = f"{entry.path} is no {media}: it ends in none of {', '.join(sorted(_KINDS[media]))}"
        elif printable(entry.key) != entry.key:
            reason = "its path is no UTF-8, or holds control characters"
        elif entry.key in seen:
            reason = f"key {entry.key!r} stands at {seen[entry.key]} too; several captions of a clip go into `captions`"
        elif size is None:
            reason = f"{entry.path} is not there"
        elif size == 0:
            reason = f"{entry.path} is empty"
        elif not entry.captions:
            reason = "caption is missing"
        seen.setdefault(entry.key, entry.where)
        if reason is None:
            self.entries.append(entry)
        else:
            self.refuse(entry.where, reason)

    def refuse(self, where: str, reason: str) -> None:
        """Note an entry that cannot be packed."""
        self.errors.append(printable(f"{where}: {reason}"))


def read_annotations(path: str, root: str | None, media: Media) -> MediaList:
    """Read JSON Lines, one object a line with `video` or `image` and captions as in a raw shard's json.

    Args:
        path: local or s3://.
        root: where relative paths begin; None: the folder of `path`.
        media: which of the two the entries must be.

    Raises:
        DataError: no such file.
    """
    if not storage.is_file(path):
        raise DataError(f"{storage.shown(path)}: no such file of annotations; correct pack.input.")
    base = os.path.dirname(path) if root is None else root
    found, seen, sizes = MediaList(), dict[str, str](), _Sizes()
    for number, line in enumerate(storage.read_bytes(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            captions, notes = read_captions(line, None)
        except CaptionError as error:
            found.refuse(where, str(error))
            continue
        named = [notes.pop(name) for name in ("video", "image") if name in notes]
        if len(named) != 1 or not isinstance(named[0], str) or not named[0]:
            found.refuse(where, "needs one path, as video or as image")
            continue
        is_whole = storage.is_remote(named[0]) or os.path.isabs(named[0])
        place = named[0] if is_whole else storage.join(base or ".", named[0])
        entry = MediaEntry(where, place, _key(named[0]), captions, {**notes, "file": named[0]})
        found.add(entry, seen, sizes, media)
    return found


def list_media(folder: str, media: Media, num_threads: int) -> MediaList:
    """List a folder with all below it: media, each with `.json` and/or `.txt` of the same name beside it, by path.

    Raises:
        DataError: there is no such folder, or nothing in it.
    """
    files = dict(_walk(folder, ""))
    if not files:
        raise DataError(f"{storage.shown(folder)}: no such folder, or nothing in it; correct pack.input.")
    found, seen = MediaList(), dict[str, str]()
    chosen = sorted(name for name in files if _kind(name) in _KINDS[media])
    stems = {os.path.splitext(name)[0] for name in files if _kind(name) in MEDIA_KINDS}

    def read(name: str) -> MediaEntry | CaptionError:
        stem = os.path.splitext(name)[0]
        texts = {
            kind: storage.read_bytes(storage.join(folder, f"{stem}.{kind}")) if f"{stem}.{kind}" in files else None
            for kind in _TEXT_KINDS
        }
        try:
            captions, notes = read_captions(texts["json"], texts["txt"])
        except CaptionError as error:
            return error
        return MediaEntry(name, storage.join(folder, name), _key(name), captions, {**notes, "file": name})

    for name, entry in zip(chosen, _in_order(read, chosen, num_threads), strict=True):
        if isinstance(entry, CaptionError):
            found.refuse(name, str(entry))
        else:
            found.add(entry, seen, lambda path: files[path.removeprefix(f"{folder.rstrip('/')}/")], media)
    chosen_stems = {os.path.splitext(name)[0] for name in chosen}
    for name in sorted(files.keys() - set(chosen)):
        stem, ending = os.path.splitext(name)
        if ending[1:] in _TEXT_KINDS and stem not in stems:
            found.refuse(name, "no media stands beside it")
        elif stem not in chosen_stems:
            found.num_ignored += 1
    return found


def read_media(entries: Iterable[MediaEntry], num_threads: int) -> Iterator[RawClip]:
    """The records of entries, in order; some are read at once, and no more are in memory."""

    def read(entry: MediaEntry) -> RawClip:
        data = storage.read_bytes(entry.path)
        return RawClip(entry.key, _kind(entry.path), data, entry.captions, entry.metadata)

    return _in_order(read, entries, num_threads)


def _in_order(work: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
    waiting = iter(items)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="pack") as threads:
        while some := list(islice(waiting, num_threads)):
            yield from threads.map(work, some)


class _Sizes:
    """Sizes of files by one listing of each folder; None of what is not there."""

    def __init__(self) -> None:
        self._folders: dict[str, dict[str, int]] = {}

    def __call__(self, path: str) -> int | None:
        folder, _, name = path.rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = storage.list_sizes(folder or "/")
        return self._folders[folder].get(name)


def _walk(folder: str, inside: str) -> Iterator[tuple[str, int]]:
    """(path below the folder, size) of every file."""
    here = storage.join(folder, inside) if inside else folder
    sizes = storage.list_sizes(here)
    for name in storage.list_folder(here):
        path = f"{inside}/{name}" if inside else name
        if name in sizes:
            yield path, sizes[name]
        else:
            yield from _walk(folder, path)


def _kind(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()


def _key(path: str) -> str:
    """A record's key of a path as it was given; WebDataset cuts a key at the file name's first dot."""
    stem = os.path.splitext(path.removeprefix("s3://"))[0]
    *folders, name = [part for part in os.path.normpath(stem).split("/") if part not in ("", "..")]
    return "/".join([*folders, name.replace(".", "_")])
