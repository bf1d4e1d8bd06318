"""Follow a run's metrics.jsonl from outside while it grows."""

import logging
from pathlib import Path
from typing import Any

from m4v_dist import storage

logger = logging.getLogger(__name__)


class MetricsTail:
    """Reads the rows that were added since the last call.

    Args:
        run_folder: local run folder; its metrics.jsonl need not be there yet.
        from_end: start behind the rows that are there now.
    """

    def __init__(self, run_folder: str, *, from_end: bool = False) -> None:
        self._path = Path(run_folder) / "metrics.jsonl"
        self._offset = self._path.stat().st_size if from_end and self._path.exists() else 0
        self.num_torn_lines = 0

    def new_rows(self) -> list[dict[str, Any]]:
        """Complete rows that are new; a line in the middle of its write is left for later, a torn one is counted."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        rows, num_torn = storage.parse_json_lines(complete)
        if num_torn:
            self.num_torn_lines += num_torn
            logger.warning("%s: %d torn lines passed over.", self._path, num_torn)
        return rows
