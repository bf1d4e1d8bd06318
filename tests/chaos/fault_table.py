"""The table of the fault matrix: what a run cost, as rows, and the rows in docs/faults.md.

A row is known by its fault and ZeRO stage. A run of some cells replaces their rows and leaves the others, and every row
says the commit that it was seen at: so a part never passes for the whole.
"""

import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.faults import FAULTS
from tests.integration.small_run import rows
from tests.trainer.ranks import ROOT

PAGE = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- fault table: begin -->", "<!-- fault table: end -->"
COLUMNS = (
    "fault", "ZeRO", "ended", "steps redone", "to next step, s", "to new step, s", "to next commit, s", "attempts",
    "exit codes", "seen", "commit",
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What a fault cost.

    Args:
        steps_redone: steps that were done more than once, each time but the first.
        next_step_s: from the fault to the next finished step: of the attempt after it, if it ended one.
        new_step_s: to the first finished step that had not been done before.
        commit_s: to the first commit after it, as rank 0 notes it in the step after.
        num_attempts: of the run.
    """

    steps_redone: int
    next_step_s: float
    new_step_s: float
    commit_s: float
    num_attempts: int


def cost_of(folder: str, fault_time: float) -> Cost:
    """Read it from a finished run's rows.

    Raises:
        AssertionError: the trainer's own count of redone steps differs.
    """
    train, attempts = rows(folder, "train"), sorted(Path(folder, "attempts").glob("attempt_????.json"))
    # The rows of one that breaks off may end a little later than its fault.
    hit = max((row["attempt"] for row in train if row["time"] <= fault_time), default=1)
    has_ended = any(row["attempt"] > hit for row in train)

    def is_after(row: dict[str, float]) -> bool:
        return row["attempt"] > hit if has_ended else row["time"] > fault_time

    done = max((row["step"] for row in train if not is_after(row)), default=-1)
    times = [row["time"] for row in train if is_after(row)]
    new = [row["time"] for row in train if row["step"] > done]
    commits = [row["time"] for row in rows(folder, "checkpoint") if is_after(row) or row["time"] > fault_time]
    redone = len(train) - len({row["step"] for row in train})
    counted = sum(row["lost_steps"] for kind in ("restart", "damaged_checkpoint") for row in rows(folder, kind))
    assert counted == redone, f"{redone} steps were done again, but the trainer counts {counted}"
    after = (min(found, default=fault_time) - fault_time for found in (times, new, commits))
    return Cost(redone, *after, num_attempts=len(attempts))


def cells(
    fault: str, zero_stage: int, ended: str, cost: Cost | None, exit_codes: Sequence[int], seen: str
) -> list[str]:
    """A row as text."""
    numbers = ["", "", "", "", ""]
    if cost is not None:
        numbers = [f"{cost.steps_redone}", *(f"{s:.1f}" for s in (cost.next_step_s, cost.new_step_s, cost.commit_s))]
        numbers.append(f"{cost.num_attempts}")
    codes = ", ".join(map(str, exit_codes))
    texts = [fault, str(zero_stage), ended, *numbers, codes, seen, commit()]
    return [text.replace("|", "/").replace("\n", " ") for text in texts]


def commit() -> str:
    """Of the tree that runs; with a + if it has other changes than the page itself."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{PAGE.relative_to(ROOT)}")
    return git("rev-parse", "--short=7", "HEAD") + ("+" if changed else "")


def table(found: Iterable[Sequence[str]]) -> str:
    """Rows as Markdown, in the order of the faults."""
    order = list(FAULTS)
    ordered = sorted(found, key=lambda row: (order.index(row[0]) if row[0] in order else len(order), row[1]))
    lines = [COLUMNS, ["---"] * len(COLUMNS), *ordered]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rows_of(page: str) -> dict[tuple[str, str], list[str]]:
    """The rows of a page by fault and ZeRO stage."""
    between = page.partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in between.splitlines() if line.startswith("|")][2:]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(row[0], row[1]): row for row in found if len(row) == len(COLUMNS)}


def updated(page: str, found: Sequence[Sequence[str]], foot: str) -> str:
    """The page with these rows in place of those of the same fault and ZeRO stage, and a new foot.

    Raises:
        ValueError: it has no place for a table.
    """
    if BEGIN not in page or END not in page:
        raise ValueError(f"the page has no place for the table: give it the lines {BEGIN} and {END}.")
    all_rows = {**rows_of(page), **{(row[0], row[1]): list(row) for row in found}}
    head, _, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2]
    return f"{head}{BEGIN}\n{table(all_rows.values())}\n\n{foot}\n{END}{tail}"


def foot(num_rows: int, seconds: float, load_before: float, command: str) -> str:
    """What stands below the table of its newest run."""
    load = os.getloadavg()[0]
    return (
        f"Newest run: {num_rows} of {3 * len(FAULTS)} rows in {seconds / 60:.0f} min by `{command}`, on "
        f"{os.cpu_count()} cores without GPU, load average {load_before:.1f} before and {load:.1f} at the end. Rows of "
        "another commit are older."
    )
