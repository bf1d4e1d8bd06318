"""What one worker of pass 1 does with a raw shard: read, survey in child processes, commit the rows; no Ray here.

A raw clip whose survey fails is tried again alone, `precompute.num_retries` times, then named in the survey's notes;
pass 2 does not try it again. What cannot be used for other reasons (no caption, a key that stands twice, the rest of a
cut shard) is passed over here and counted by pass 2, which meets it too.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from data_pipeline.attempts import counted_attempt
from data_pipeline.clip_list import SurveyedClip, survey_path, write_clips
from data_pipeline.decode import DecodeError
from data_pipeline.decoder_child import Answer
from data_pipeline.decoder_pool import ChildPool
from data_pipeline.pack import RawClip, ShardDamage, read_shard
from data_pipeline.precompute_plan import PrecomputePlan, ShardTask
from data_pipeline.raw_records import fault_of
from data_pipeline.survey import Survey
from m4v_dist.errors import DataError, JobError
from m4v_dist.lease import Lease, require_held


class SurveyActor:
    """Surveys shards; one call is one shard. Its `__call__` is that of `ShardActor`, its outcome the number of rows.

    Args:
        plan: what to do.
        lease: on the cache, as for `ShardActor`.
    """

    def __init__(self, plan: PrecomputePlan, lease: Lease | None = None) -> None:
        self._plan = plan
        self._lease = lease
        self._rule = asdict(plan.survey_rule)
        self._pool = ChildPool(plan.curation.processes_per_actor, plan.curation.timeout_s)

    def close(self) -> None:
        """End the child processes."""
        self._pool.close()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows: dict[str, list[Any]] = {"name": [], "outcome": [], "error": [], "exit_code": []}
        for text in batch["task"]:
            task = ShardTask(**json.loads(text))
            outcome, error, exit_code = "", "", 0
            # as in `ShardActor`: storage that fails costs this shard alone
            try:
                with counted_attempt(self._plan.precompute.cache, f"survey-{task.name}", task.path):
                    outcome = json.dumps(self.run(task))
            except (JobError, OSError) as problem:
                error = f"{type(problem).__name__}: {problem}"
                exit_code = problem.exit_code if isinstance(problem, JobError) else DataError.exit_code
            found = {"name": task.name, "outcome": outcome, "error": error, "exit_code": exit_code}
            for column, value in found.items():
                rows[column].append(value)
        return rows

    def run(self, task: ShardTask) -> int:
        """Survey one shard and commit it; returns its number of pieces."""
        clips: list[SurveyedClip] = []
        errors: dict[str, str] = {}
        self._require_held()
        for raw, result in self._surveyed(task):
            if isinstance(result, DecodeError):
                errors[raw.key] = str(result)
            else:
                clips += _rows(raw, result)
        clips = _without_clashes(clips, errors)
        notes = {"fingerprint": task.fingerprint, "errors": errors}
        self._require_held()
        write_clips(survey_path(self._plan.precompute.cache, task.name), clips, notes)
        return len(clips)

    def _require_held(self) -> None:
        if self._lease is not None:
            require_held(self._plan.precompute.cache, self._lease)

    def _surveyed(self, task: ShardTask) -> Iterator[tuple[RawClip, Survey | DecodeError]]:
        waiting: list[RawClip] = []

        def media() -> Iterator[tuple[bytes, dict[str, Any]]]:
            seen: set[str] = set()
            for raw in read_shard(task.path):
                if not isinstance(raw, ShardDamage) and fault_of(raw, seen) is None:
                    waiting.append(raw)
                    yield self._item(raw)

        for answer in self._pool.run_all("survey", media()):
            raw = waiting.pop(0)
            for _ in range(self._plan.precompute.num_retries):
                if not isinstance(answer, DecodeError):
                    break
                (answer,) = self._pool.run_all("survey", [self._item(raw)])
            yield raw, _survey(answer)

    def _item(self, raw: RawClip) -> tuple[bytes, dict[str, Any]]:
        return raw.data, {"kind": str(raw.kind), "rule": self._rule}


def _survey(answer: Answer | DecodeError) -> Survey | DecodeError:
    return answer if isinstance(answer, DecodeError) else Survey.from_json(answer[0])


def _rows(raw: RawClip, survey: Survey) -> list[SurveyedClip]:
    content_hash = hashlib.blake2b(raw.data, digest_size=16).hexdigest()
    return [
        SurveyedClip(
            key=raw.key,
            clip_key=raw.key if piece.first_frame == 0 else f"{raw.key}-f{piece.first_frame:06d}",
            content_hash=content_hash,
            fps=survey.fps,
            height_px=survey.height_px,
            width_px=survey.width_px,
            **asdict(piece),
        )
        for piece in survey.pieces
    ]


def _without_clashes(clips: list[SurveyedClip], errors: dict[str, str]) -> list[SurveyedClip]:
    """Leave out raw clips of which a piece would take the name of another record; the first in the shard has it."""
    owners: dict[str, str] = {}
    for clip in clips:
        owner = owners.setdefault(clip.clip_key, clip.key)
        if owner != clip.key:
            errors[clip.key] = f"a piece of it would be named {clip.clip_key}, as one of {owner} is; rename the key"
    return [clip for clip in clips if clip.key not in errors]
