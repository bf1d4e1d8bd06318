"""The table of the fault matrix: what it counts, and that a part of the matrix does not pass for the whole."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import fault_table
from tests.chaos.fault_table import BEGIN, COLUMNS, END, Cost, cells, cost_of, rows_of, updated
from tests.chaos.faults import FAULTS

COST = Cost(3, 8.75, 9.5, 10.0, 2)


def _run(folder: Path, found: list[dict[str, Any]], num_attempts: int) -> str:
    (folder / "attempts").mkdir(parents=True)
    for attempt in range(1, num_attempts + 1):
        (folder / "attempts" / f"attempt_{attempt:04d}.json").touch()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(folder)


def _row(kind: str, attempt: int, step: int, time: float, **values: Any) -> dict[str, Any]:
    return {"kind": kind, "attempt": attempt, "step": step, "time": time, **values}


def test_a_restart_costs_its_redone_steps_and_the_time_to_the_next_the_new_and_the_saved_one(tmp_path: Path) -> None:
    before = [_row("train", 1, step, float(step)) for step in range(4)] + [_row("checkpoint", 1, 2, 2.5)]
    after = [_row("restart", 2, 2, 9.0, lost_steps=2)] + [_row("train", 2, step, 8.0 + step) for step in range(2, 6)]
    # The fault at 2.8; step 3 was still written down.
    folder = _run(tmp_path / "run", [*before, *after, _row("checkpoint", 2, 5, 13.5)], 2)
    assert cost_of(folder, 2.8) == Cost(2, *(pytest.approx(time - 2.8) for time in (10.0, 12.0, 13.5)), 2)


def test_an_attempt_that_goes_on_costs_no_steps(tmp_path: Path) -> None:
    found = [_row("train", 1, step, float(step)) for step in range(4)] + [_row("checkpoint", 1, 3, 3.5)]
    folder = _run(tmp_path / "run", found, 1)
    assert cost_of(folder, 1.5) == Cost(0, pytest.approx(0.5), pytest.approx(0.5), pytest.approx(2.0), 1)


def test_steps_that_the_trainer_does_not_count_as_lost_are_found(tmp_path: Path) -> None:
    found = [_row("train", 1, 0, 0.0), _row("train", 1, 1, 1.0), _row("train", 2, 1, 5.0)]
    with pytest.raises(AssertionError, match="1 steps were done again, but the trainer counts 0"):
        cost_of(_run(tmp_path / "run", found, 2), 1.5)


def test_a_part_of_the_matrix_replaces_its_own_rows_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *_ = FAULTS
    monkeypatch.setattr(fault_table, "commit", lambda: "aaaaaaa")
    whole = [cells(fault, stage, "bit-identical", COST, (0,), "") for fault in (second, first) for stage in (1, 2)]
    page = updated(f"# Faults\n{BEGIN}\n{END}\nbelow\n", whole, "a foot")
    assert [(row[0], row[1]) for row in rows_of(page).values()] == [
        (first, "1"), (first, "2"), (second, "1"), (second, "2")
    ]  # fmt: skip
    monkeypatch.setattr(fault_table, "commit", lambda: "bbbbbbb")
    page = updated(page, [cells(second, 2, "FAILED", None, (), "a | b\nc")], "another foot")
    assert [row[-1] for row in rows_of(page).values()] == ["aaaaaaa"] * 3 + ["bbbbbbb"]
    assert rows_of(page)[second, "2"][2:] == ["FAILED", *[""] * 6, "a / b c", "bbbbbbb"]
    assert page.startswith("# Faults\n") and page.endswith(f"another foot\n{END}\nbelow\n") and "a foot" not in page


def test_a_page_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for the table"):
        updated("# Faults\n", [], "")


def test_the_docs_hold_each_cell_of_the_matrix_once() -> None:
    """And none of them failed, when it was last run."""
    found = rows_of(fault_table.PAGE.read_text(encoding="utf-8"))
    assert set(found) == {(fault, str(stage)) for fault in FAULTS for stage in (1, 2, 3)}
    assert not [row for row in found.values() if len(row) != len(COLUMNS) or row[2] == "FAILED"]
