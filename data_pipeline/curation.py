"""Between the passes, in the driver: which shards are still to be surveyed, and the clip lists made of all surveys.

A list follows from the surveys, the thresholds and the order of the sources in the config alone, so workers may finish
in any order. A rerun writes the same lists; other thresholds ask for no new survey, and change the fingerprint of just
those shards of which other clips are encoded.

Duplicates are raw clips whose media are the same bytes: of those that pass the thresholds the first is kept, by source,
then shard, then place in the shard. The same record read under two sources (in two sizes, say) is no duplicate of
itself.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from data_pipeline.clip_list import (
    CURATION,
    SurveyedClip,
    digest_kept,
    list_path,
    read_clips,
    read_many,
    survey_path,
    write_clips,
)
from data_pipeline.filters import DUPLICATE, reason_by_thresholds
from data_pipeline.precompute_plan import PrecomputePlan, ShardOutcome, ShardTask, digest_of
from data_pipeline.score_histograms import ScoreHistograms
from data_pipeline.survey import SURVEY_VERSION
from m4v_dist import storage

DUPLICATES = f"{CURATION}/duplicates.txt"
SCORES = f"{CURATION}/scores.json"
_HASH_BYTES = 16


@dataclass(frozen=True)
class ListedShard:
    """What the clip list says of one raw shard.

    Args:
        task: its encoding, with the list in its fingerprint.
        kept: clips to encode.
        dropped: pieces that are not, by reason.
        quarantined: raw clips that could not be surveyed, as in `ShardOutcome`.
    """

    task: ShardTask
    kept: int
    dropped: dict[str, int]
    quarantined: list[dict[str, str]]

    @property
    def num_clips(self) -> int:
        """Pieces and raw clips that are counted by the list."""
        return self.kept + sum(self.dropped.values()) + len(self.quarantined)

    def outcome_with(self, outcome: ShardOutcome) -> ShardOutcome:
        """What became of all of the shard, of what pass 2 never saw too."""
        return replace(
            outcome,
            filtered=dict(Counter(outcome.filtered) + Counter(self.dropped)),
            quarantined=self.quarantined + outcome.quarantined,
        )


class _Copies:
    """Which clips have the media of one before them; 24 bytes are held of each clip."""

    def __init__(self) -> None:
        self._hashes = bytearray()
        self._places = array("q")

    def add(self, media: str, clip: SurveyedClip, number: int, row: int) -> None:
        """Take the next clip that passes: the number of its shard and of its row there."""
        named = f"{clip.content_hash}-{media}-{clip.first_frame}"
        self._hashes += hashlib.blake2b(named.encode(), digest_size=_HASH_BYTES).digest()
        self._places.append(number << 32 | row)

    def first_of(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Place of each clip that has the media of one before it, to the place of the first such."""
        hashes = np.frombuffer(bytes(self._hashes), dtype=f"S{_HASH_BYTES}")
        _, firsts, which = np.unique(hashes, return_index=True, return_inverse=True)
        first = firsts[which]
        copies = np.flatnonzero(first != np.arange(len(first)))
        return {self._place(number): self._place(first[number]) for number in copies.tolist()}

    def _place(self, number: int) -> tuple[int, int]:
        place = self._places[number]
        return place >> 32, place & 0xFFFFFFFF


def surveyed_as(tasks: Sequence[ShardTask]) -> dict[str, str]:
    """Under which task's name each task's raw shard is surveyed: once, though two sources read it in two sizes."""
    names: dict[tuple[str, str], str] = {}
    for task in tasks:
        names[task.path, task.media] = min(task.name, names.get((task.path, task.media), task.name))
    return {task.name: names[task.path, task.media] for task in tasks}


def survey_tasks(plan: PrecomputePlan, tasks: Sequence[ShardTask]) -> list[ShardTask]:
    """The tasks of pass 1, one a raw shard: their fingerprint is of the input and of what decides a survey."""
    rule, names = {"rule": asdict(plan.survey_rule), "version": SURVEY_VERSION}, surveyed_as(tasks)
    return [
        replace(task, fingerprint=digest_of({**rule, "media": task.media, "input": task.input_fingerprint}))
        for task in tasks
        if names[task.name] == task.name
    ]


def unsurveyed(plan: PrecomputePlan, tasks: Sequence[ShardTask]) -> list[ShardTask]:
    """Tasks of pass 1 of which no survey of this very input by this very rule stands; none where curation is off."""
    if not plan.curation.enabled:
        return []
    cache, surveys = plan.precompute.cache, survey_tasks(plan, tasks)
    there = set(storage.list_folder(storage.join(cache, CURATION)))
    found = [task for task in surveys if survey_path("", task.name).rsplit("/", 1)[-1] in there]
    notes = (notes for _, notes in read_many([survey_path(cache, task.name) for task in found]))
    done = {task.name for task, of_task in zip(found, notes, strict=True) if of_task["fingerprint"] == task.fingerprint}
    return [task for task in surveys if task.name not in done]


def make_lists(plan: PrecomputePlan, tasks: Sequence[ShardTask], writes: bool = True) -> dict[str, ListedShard]:
    """Judge all surveyed pieces, and write the clip list of each shard, the duplicates and the histograms.

    Surveys are read one after the other, twice; of the clips little is held (`_Copies`).

    Args:
        plan: thresholds and sources.
        tasks: of pass 2, in the order of the sources; all must be surveyed.
        writes: False only counts.

    Returns:
        what each list says, by task name.
    """
    cache, copies, surveys = plan.precompute.cache, _Copies(), surveyed_as(tasks)
    paths = [survey_path(cache, surveys[task.name]) for task in tasks]
    if plan.curation.remove_duplicates:
        for number, (task, (clips, _)) in enumerate(zip(tasks, read_many(paths), strict=True)):
            for row, clip in enumerate(judged(plan, task, clips)):
                if not clip.reason:
                    copies.add(task.media, clip, number, row)
    first_of = copies.first_of()
    names = _names_of(tasks, paths, first_of)
    histograms = ScoreHistograms()
    listed: dict[str, ListedShard] = {}
    lines: list[str] = []
    for number, (task, (surveyed, notes)) in enumerate(zip(tasks, read_many(paths), strict=True)):
        clips = judged(plan, task, surveyed)
        for row, clip in enumerate(clips):
            first = first_of.get((number, row))
            if first is not None and names[first] != names[number, row]:
                clips[row] = replace(clip, reason=DUPLICATE)
                copy, kept = ("\t".join((tasks[place[0]].source, *names[place])) for place in ((number, row), first))
                lines.append(f"{copy}\t{kept}\n")
        histograms.add(task.source, task.media, clips)
        listed[task.name] = _listed(plan, task, clips, notes["errors"], writes)
    if writes:
        limits = {source.name: plan.thresholds_of(source.name).model_dump() for source in plan.sources}
        _write_if_new(storage.join(cache, DUPLICATES), "".join(lines).encode())
        scores = {"scores": histograms.to_json(limits), "counts": _counts(plan, listed)}
        _write_if_new(storage.join(cache, SCORES), storage.json_bytes(scores))
    return listed


def _write_if_new(path: str, data: bytes) -> None:
    """Leave a file as it stands where nothing has changed, so that a rerun does nothing."""
    if not (storage.exists(path) and storage.read_bytes(path) == data):
        storage.write_bytes(path, data)


def judged(plan: PrecomputePlan, task: ShardTask, clips: Sequence[SurveyedClip]) -> list[SurveyedClip]:
    """Surveyed pieces of a shard, with the reasons of those that the thresholds of its source drop."""
    thresholds, splits = plan.thresholds_of(task.source), plan.curation.long_scenes == "split"
    reasons = (reason_by_thresholds(clip, task.media, thresholds, splits) for clip in clips)
    return [replace(clip, reason=reason or "") for clip, reason in zip(clips, reasons, strict=True)]


def _names_of(
    tasks: Sequence[ShardTask], paths: Sequence[str], first_of: Mapping[tuple[int, int], tuple[int, int]]
) -> dict[tuple[int, int], tuple[str, str]]:
    """Raw shard and key of each clip that is a copy or has one; `paths` are of the tasks' surveys."""
    wanted: dict[int, set[int]] = {}
    for number, row in {*first_of, *first_of.values()}:
        wanted.setdefault(number, set()).add(row)
    names = {}
    for number, (clips, _) in zip(wanted, read_many([paths[number] for number in wanted]), strict=True):
        names.update({(number, row): (tasks[number].path, clips[row].clip_key) for row in wanted[number]})
    return names


def _listed(
    plan: PrecomputePlan, task: ShardTask, clips: list[SurveyedClip], errors: dict[str, str], writes: bool
) -> ListedShard:
    """Write a shard's list, unless it stands as it is, and sum it up."""
    digest = digest_kept(clips)
    notes = {"digest": digest, "errors": errors}
    path = list_path(plan.precompute.cache, task.name)
    if writes and not (storage.exists(path) and read_clips(path) == (clips, notes)):
        write_clips(path, clips, notes)
    dropped = Counter(clip.reason for clip in clips if clip.reason)
    shard = task.path.rsplit("/", 1)[-1]
    quarantined = [
        {"key": key, "shard": shard, "source": task.source, "error": f"survey: {error}"}
        for key, error in errors.items()
    ]
    listed_task = replace(task, fingerprint=digest_of([task.fingerprint, digest]), clip_list=digest)
    return ListedShard(listed_task, len(clips) - dropped.total(), dict(sorted(dropped.items())), quarantined)


def describe_settings(plan: PrecomputePlan, listed: Mapping[str, ListedShard]) -> dict[str, Any]:
    """What the manifest records of curation: its settings, and what came of them, by source."""
    return {
        "survey": {**asdict(plan.survey_rule), "version": SURVEY_VERSION},
        "long_scenes": plan.curation.long_scenes,
        "remove_duplicates": plan.curation.remove_duplicates,
        "thresholds": {source.name: plan.thresholds_of(source.name).model_dump() for source in plan.sources},
        "counts": _counts(plan, listed),
    }


def _counts(plan: PrecomputePlan, listed: Mapping[str, ListedShard]) -> dict[str, dict[str, int]]:
    """Pieces by source: kept, dropped by each reason; and raw clips that could not be surveyed."""
    per_source: dict[str, Counter[str]] = {source.name: Counter() for source in plan.sources}
    for shard in listed.values():
        counts = {"kept": shard.kept, "quarantined": len(shard.quarantined), **shard.dropped}
        per_source[shard.task.source].update(counts)
    return {source: dict(sorted(counts.items())) for source, counts in per_source.items()}


def format_counts(listed: dict[str, ListedShard]) -> str:
    """What the lists keep, and why they drop the rest, as a table of reasons by source."""
    per_source: dict[str, Counter[str]] = {}
    for shard in listed.values():
        counts = per_source.setdefault(shard.task.source, Counter())
        counts.update({"pieces": shard.kept + sum(shard.dropped.values()), "kept": shard.kept, **shard.dropped})
        counts["not surveyed"] += len(shard.quarantined)
    reasons = sorted({reason for shard in listed.values() for reason in shard.dropped})
    rows = ["pieces", "kept", *reasons, "not surveyed"]
    lines = ["".join([f"{'':<16}", *(f"{source:>16}" for source in per_source)])]
    lines += ["".join([f"{row:<16}", *(f"{counts[row]:>16}" for counts in per_source.values())]) for row in rows]
    return "\n".join(lines)
