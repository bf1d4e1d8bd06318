"""What a warm start gives each parameter, counted: rows, a table for people, JSON for what comes after.

A parameter is loaded (as it is in the checkpoint), mapped (made from other weights of it), set (a constant by rule),
fresh (drawn from the seed), or several of these by rows.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from torch import nn

from m4v_dist.model.attention_to_ssm import Part
from m4v_dist.model.warm_start import WarmStart

STATES = ("loaded", "mapped", "set", "fresh")


@dataclass(frozen=True)
class ParameterReport:
    """One of our parameters.

    Args:
        name, shape: the parameter.
        counts: elements by state; they sum to the parameter's.
        sources: names in the checkpoint.
        rules: what was done, in words, in the order of the rows; without what is fresh.
    """

    name: str
    shape: tuple[int, ...]
    counts: dict[str, int]
    sources: tuple[str, ...]
    rules: tuple[str, ...]

    @property
    def state(self) -> str:
        """The states that have elements, as "mapped, fresh"."""
        return ", ".join(state for state in STATES if self.counts[state])


def report_parameters(model: nn.Module, plan: WarmStart) -> list[ParameterReport]:
    """Report every parameter of a model, in its order.

    Args:
        model: the planned one; may be on the meta device.
        plan: of `plan_warm_start`.
    """
    parts_of: dict[str, list[Part]] = {}
    for part in plan.parts:
        parts_of.setdefault(part.target, []).append(part)
    reports = []
    for name, parameter in model.named_parameters():
        parts = sorted(parts_of.get(name, []), key=lambda part: part.rows.start or 0)
        counts = dict.fromkeys(STATES, 0)
        for part in parts:
            counts[part.state] += parameter[part.rows].numel()
        counts["fresh"] = parameter.numel() - sum(counts.values())
        assert counts["fresh"] >= 0, f"{name}: filled twice"
        sources = tuple(dict.fromkeys(source for part in parts for source in part.sources))
        reports.append(
            ParameterReport(name, tuple(parameter.shape), counts, sources, tuple(part.rule for part in parts))
        )
    return reports


def totals(reports: Iterable[ParameterReport]) -> dict[str, int]:
    """Elements of all parameters by state."""
    sums = dict.fromkeys(STATES, 0)
    for report in reports:
        for state, count in report.counts.items():
            sums[state] += count
    return sums


def summary(reports: Iterable[ParameterReport]) -> str:
    """One line: how many parameters of which state."""
    sums = totals(reports)
    return f"{sum(sums.values()):,} parameters: " + ", ".join(f"{count:,} {state}" for state, count in sums.items())


def report_json(reports: list[ParameterReport], plan: WarmStart) -> dict[str, Any]:
    """Every key of ours and of the checkpoint, as JSON values."""
    return {
        "counts": totals(reports),
        "parameters": [{**asdict(report), "state": report.state} for report in reports],
        "unused": list(plan.unused),
        "other_nets": list(plan.other_nets),
    }


def report_table(reports: list[ParameterReport], plan: WarmStart) -> str:
    """The same as text; parameters that differ only in the number of their block share a line, with the blocks."""
    lines = [_line("parameter", "blocks", "state", STATES, "how")]
    for (name, state, rules), found in _by_block(reports):
        numbers = [_block_number(report.name) for report in found]
        blocks = "" if numbers[0] is None else _ranges([number for number in numbers if number is not None])
        sums = totals(found)
        how = "; ".join(rules) if rules else "from the seed"
        lines.append(_line(name, blocks, state, [f"{sums[s]:,}" if sums[s] else "" for s in STATES], how))
    lines.append(_line("all", "", "", [f"{count:,}" for count in totals(reports).values()], ""))
    if plan.unused:
        names = dict.fromkeys(_without_block(name) for name in plan.unused)
        lines.append(f"{len(plan.unused)} of the checkpoint's weights have no place: {', '.join(names)}")
    if plan.other_nets:
        lines.append(f"{len(plan.other_nets)} weights of other networks in the file were left aside")
    return "\n".join(line.rstrip() for line in lines)


def _line(name: str, blocks: str, state: str, counts: Iterable[str], how: str) -> str:
    return f"{name:<46}{blocks:>8}  {state:<14}" + "".join(f"{count:>15}" for count in counts) + f"  {how}"


def _by_block(
    reports: list[ParameterReport],
) -> list[tuple[tuple[str, str, tuple[str, ...]], list[ParameterReport]]]:
    """Reports with equal name but for the block, state and rules; in the order of the first of each."""
    keys = [(_without_block(report.name), report.state, report.rules) for report in reports]
    first = {key: number for number, key in reversed(list(enumerate(keys)))}
    pairs = sorted(zip(keys, reports, strict=True), key=lambda pair: first[pair[0]])
    return [(key, [report for _, report in group]) for key, group in groupby(pairs, key=lambda pair: pair[0])]


def _without_block(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def _block_number(name: str) -> int | None:
    match = re.search(r"\.(\d+)\.", name)
    return None if match is None else int(match[1])


def _ranges(numbers: list[int]) -> str:
    """0-3, or 0,2,4 as they come."""
    is_run = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    if is_run:
        return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
    return ",".join(map(str, numbers))
