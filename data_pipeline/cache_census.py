"""What a cache holds, counted from its index rows alone: by source and bucket, and as numbers to draw distributions of.

Sums are plain loops over rows; nothing is read but the index.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.manifest import IndexRow


@dataclass
class Count:
    """Sums over records.

    Args:
        records, frames, latents, captions, tokens: how many; tokens of all captions together.
        seconds: of video at the cached rate; stills have none.
        size_bytes: of the records in their shards.
    """

    records: int = 0
    frames: int = 0
    latents: int = 0
    seconds: float = 0.0
    captions: int = 0
    tokens: int = 0
    size_bytes: int = 0

    def add(self, row: IndexRow) -> None:
        """Count one record more."""
        self.records += 1
        self.frames += row.num_frames
        self.latents += row.num_latents
        self.seconds += row.num_frames / row.fps if row.fps else 0.0
        self.captions += len(row.captions)
        self.tokens += sum(row.num_text_tokens)
        self.size_bytes += row.size_bytes


def count_by_bucket(rows: Iterable[IndexRow]) -> dict[tuple[str, int, int], Count]:
    """Sums by (source, height, width), sorted."""
    counts: dict[tuple[str, int, int], Count] = {}
    for row in rows:
        counts.setdefault((row.source, row.height_px, row.width_px), Count()).add(row)
    return dict(sorted(counts.items()))


def with_counts(
    manifest: Mapping[str, Any], fragments: Iterable[tuple[Iterable[IndexRow], Mapping[str, Any]]]
) -> dict[str, Any]:
    """A manifest with its counts as the index has them.

    Args:
        manifest: with `sources`; counts in it are replaced.
        fragments: rows and notes of every fragment.

    Returns:
        the manifest; `records` and `dropped` of each source, and `totals` of each bucket.
    """
    totals: dict[str, Count] = {}
    records: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for rows, notes in fragments:
        for row in rows:
            totals.setdefault(f"{row.height_px}x{row.width_px}", Count()).add(row)
            records[row.source] += 1
        dropped.update(entry["source"] for entry in notes.get("dropped", ()))
    sources = {
        name: {**source, "records": records[name], "dropped": dropped[name]}
        for name, source in manifest["sources"].items()
    }
    rounded = {bucket: {**asdict(count), "seconds": round(count.seconds, 3)} for bucket, count in totals.items()}
    return {**manifest, "sources": sources, "totals": rounded}


def distributions(rows: Iterable[IndexRow]) -> dict[str, list[float]]:
    """The numbers of each record whose distribution shows what a cache is like, by what they are; scores come last.

    A record without a number (fps of a still) has none in that list.
    """
    found: dict[str, list[float]] = {
        "frames of a clip": [], "seconds of a clip": [], "frames per second": [], "captions of a clip": [],
        "tokens of a caption": [], "KiB of a record": [], "short side of the file, px": [], "enlarged by": [],
    }  # fmt: skip
    scores: dict[str, list[float]] = {}
    for row in rows:
        found["frames of a clip"].append(row.num_frames)
        if row.fps:
            found["seconds of a clip"].append(row.num_frames / row.fps)
            found["frames per second"].append(row.fps)
        found["captions of a clip"].append(len(row.captions))
        found["tokens of a caption"].extend(row.num_text_tokens)
        found["KiB of a record"].append(row.size_bytes / 1024)
        found["short side of the file, px"].append(min(row.source_height_px, row.source_width_px))
        cover = max(row.height_px / row.source_height_px, row.width_px / row.source_width_px)
        found["enlarged by"].append(cover)
        for name, value in json.loads(row.scores).items():
            if isinstance(value, int | float):
                scores.setdefault(f"score {name}", []).append(float(value))
    return {name: values for name, values in {**found, **dict(sorted(scores.items()))}.items() if values}
