"""Collects the rows of the fault matrix, prints them at the end, and puts them into docs/faults.md."""

import os
import shlex
import time

import pytest

from tests.chaos import fault_table

ROWS = pytest.StashKey[list[list[str]]]()
STARTED = pytest.StashKey[tuple[float, float]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[STARTED] = (time.time(), os.getloadavg()[0])


@pytest.fixture
def fault_rows(request: pytest.FixtureRequest) -> list[list[str]]:
    """Rows so far."""
    return request.config.stash[ROWS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash[ROWS]
    if not found:
        return
    started, load = config.stash[STARTED]
    command = shlex.join(["pytest", *config.invocation_params.args])
    foot = fault_table.foot(len(found), time.time() - started, load, command)
    terminalreporter.section("fault table")
    terminalreporter.write_line(f"{fault_table.table(found)}\n\n{foot}")
    page = fault_table.PAGE.read_text(encoding="utf-8")
    fault_table.PAGE.write_text(fault_table.updated(page, found, foot), encoding="utf-8")
    terminalreporter.write_line(f"written to {fault_table.PAGE}; rows of other cells stay as they were")
