"""Markdown tables and amounts with a prefix."""

from collections.abc import Sequence

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns line up: the first to the left, all others to the right."""
    widths = [max(len(row[number]) for row in (heads, *rows)) for number in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        first, *others = cells
        padded = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:]), ""])
    return "\n".join([line(heads), rule, *map(line, rows)])


def amount(count: float) -> str:
    """Four digits and a prefix: 55.44 T, 960.0 G, 512."""
    for size, prefix in _PREFIXES:
        if count >= size:
            value = count / size
            return f"{value:.{max(0, 3 - len(str(int(value))) + 1)}f} {prefix}"
    return f"{count:,.0f}"
