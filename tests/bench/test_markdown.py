"""Markdown tables line up, and amounts carry the right prefix."""

import pytest

from m4v_dist.bench.markdown import amount, table


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999_999, "999,999"),
        (1_000_000, "1.000 M"),
        (73_730_000, "73.73 M"),
        (960_000_000_000, "960.0 G"),
        (57.83e12, "57.83 T"),
        (1972e15, "1.972 E"),
        (1972e18, "1972 E"),
    ],
)
def test_an_amount_has_four_digits_and_a_prefix(count: float, text: str) -> None:
    assert amount(count) == text


def test_a_table_lines_up_and_keeps_every_cell() -> None:
    lines = table(["part", "n"], [["a", "1,000"], ["longer", "2"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "|--------|------:|"
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == ["longer", "2"]
