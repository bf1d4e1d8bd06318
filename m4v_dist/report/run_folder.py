"""What a run folder says about the run, read back: metrics, ledger, samples, codec check, fault check.

Plain values only; nothing here draws or formats. A part that is not there is None or empty, and the page says so.
Written by: `trainer/metrics.py` (metrics.jsonl, ledger.json), `data_pipeline/pipeline.py` (the cache's report.json),
`jobs/sample.py` (samples/samples.json), `jobs/check_codec.py` (codec/codec.json), `jobs/demo.py` (kill.json,
fault_check.json, commands.json), `trainer/failure_report.py` (attempts/*_failure.json), `launch/validation.py`
(validation/).
"""

from dataclasses import dataclass
from typing import Any

from m4v_dist import storage
from m4v_dist.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class Metrics:
    """The rows of metrics.jsonl in the order written.

    Args:
        rows: one dict a line; each has `attempt`, `step` and `kind`.
        num_torn_lines: lines that a killed writer left unfinished; counted, and shown in the report.
    """

    rows: tuple[Row, ...]
    num_torn_lines: int

    def of_kind(self, kind: str) -> list[Row]:
        """Rows of one kind, see `Metrics.write` of trainer/metrics.py."""
        return [row for row in self.rows if row["kind"] == kind]

    @property
    def attempts(self) -> list[int]:
        """Attempts that wrote anything, ascending."""
        return sorted({row["attempt"] for row in self.rows})

    def train_by_step(self, attempt: int) -> dict[int, Row]:
        """Train rows of one attempt, by step."""
        return {row["step"]: row for row in self.of_kind("train") if row["attempt"] == attempt}

    def standing_train_rows(self) -> list[Row]:
        """One train row a step, of the latest attempt that did the step: the run as it counts."""
        latest: dict[int, Row] = {}
        for row in self.of_kind("train"):
            latest[row["step"]] = row
        return [latest[step] for step in sorted(latest)]


def parse_metrics(text: str) -> Metrics:
    """Parse the text of metrics.jsonl.

    A line that is no JSON was cut by a kill in the middle of a write: counted, not fatal. A line that is JSON but has
    not the three keys every row has is a fault of the writer.

    Raises:
        ValueError: a row lacks attempt, step or kind.
    """
    rows, num_torn = storage.parse_json_lines(text.encode())
    for number, row in enumerate(rows, start=1):
        if not {"attempt", "step", "kind"} <= row.keys():
            raise ValueError(
                f"metrics.jsonl whole line {number}: needs attempt, step and kind, but is {str(row)[:120]}."
            )
    return Metrics(tuple(rows), num_torn)


def read_metrics(run_folder: str) -> Metrics:
    """Read `<run>/metrics.jsonl`.

    Raises:
        DataError: there is none; the run has not trained.
    """
    path = storage.join(run_folder, "metrics.jsonl")
    if not storage.exists(path):
        raise DataError(f"{path} does not exist; train first: python -m jobs.train --config FILE.")
    return parse_metrics(storage.read_bytes(path).decode("utf-8", errors="replace"))


@dataclass(frozen=True)
class RunRecord:
    """Everything that the report shows. None: the part is not in the run folder.

    Args:
        folder: the run folder.
        metrics: rows of metrics.jsonl.
        ledger: seconds by use, from ledger.json.
        precompute: the cache's report.json.
        manifest: the cache's manifest.json.
        samples: entries of samples/samples.json.
        codec: codec/codec.json.
        kill: kill.json: which worker was killed, when, at which step.
        fault_check: fault_check.json, the proof.
        commands: commands.json: what was run, with exit code and seconds.
        failures: attempts/attempt_0001_failure.json and so on, by attempt: why it ended.
        validation: of each step sampled beside training, its number of videos; None: it failed.
    """

    folder: str
    metrics: Metrics
    ledger: Row | None
    precompute: Row | None
    manifest: Row | None
    samples: list[Row]
    codec: Row | None
    kill: Row | None
    fault_check: Row | None
    commands: list[Row]
    failures: list[Row]
    validation: dict[int, int | None]


def read_run(run_folder: str, cache_folder: str) -> RunRecord:
    """Read a run folder and its cache's report.

    Raises:
        DataError: no metrics, so there is nothing to report on.
        ValueError: a file is damaged; the message names it.
    """

    def optional(folder: str, *parts: str) -> Any:
        path = storage.join(folder, *parts)
        return storage.read_json(path) if storage.exists(path) else None

    return RunRecord(
        folder=run_folder,
        metrics=read_metrics(run_folder),
        ledger=optional(run_folder, "ledger.json"),
        precompute=optional(cache_folder, "report.json"),
        manifest=optional(cache_folder, "manifest.json"),
        samples=optional(run_folder, "samples", "samples.json") or [],
        codec=optional(run_folder, "codec", "codec.json"),
        kill=optional(run_folder, "kill.json"),
        fault_check=optional(run_folder, "fault_check.json"),
        commands=optional(run_folder, "commands.json") or [],
        failures=[
            storage.read_json(storage.join(run_folder, "attempts", name))
            for name in storage.list_folder(storage.join(run_folder, "attempts"))
            if name.endswith("_failure.json")
        ],
        validation=_validation(run_folder),
    )


def _validation(run_folder: str) -> dict[int, int | None]:
    found: dict[int, int | None] = {}
    folder = storage.join(run_folder, "validation")
    for name in storage.list_folder(folder):
        if not name.startswith("step_"):
            continue
        listed = storage.join(folder, name, "samples.json")
        step = int(name.removeprefix("step_"))
        found[step] = len(storage.read_json(listed)) if storage.exists(listed) else None
    return found
