"""Follow a run's metrics.jsonl from outside while it grows. The standard library alone."""

import json
from pathlib import Path
from typing import Any


class MetricsTail:
    """Reads the rows that were added since the last call.

    Args:
        run_folder: local run folder; its metrics.jsonl need not be there yet.
        from_end: start behind the rows that are there now.
    """

    def __init__(self, run_folder: str, *, from_end: bool = False) -> None:
        self._path = Path(run_folder) / "metrics.jsonl"
        self._offset = self._path.stat().st_size if from_end and self._path.exists() else 0

    def new_rows(self) -> list[dict[str, Any]]:
        """Complete rows that are new; a line that is still being written is left for the next call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [json.loads(line) for line in complete.splitlines() if line.strip()]
