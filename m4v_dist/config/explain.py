"""What is wrong with a run's values, in words: the problems that pydantic found to lines that name key and way out.

Knows the shape of the settings (`schema.py`), and no pydantic.
"""

import difflib
from collections.abc import Container, Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from m4v_dist.config.schema import RunConfig
from m4v_dist.config.settings import Settings

Location = tuple[int | str, ...]
"""Keys and list positions, from the top of the file."""
ANY_POSITION = "N"
"""Stands in a path for a position that the reader has to choose."""
MISSPELT, ALIKE = 0.92, 0.6
"""Likeness by `difflib`, in [0, 1]: a slip of the finger; somewhat alike, too little to send a reader elsewhere."""
ALSO_CALLED: dict[Location, Location] = {
    ("warm_start", name): ("warm_start", "source") for name in ("checkpoint", "path", "from", "init_from")
}
"""What people call a key, and would be sent elsewhere for."""
MAX_SHOWN = 80
"""Characters of a wrong value that a message repeats."""


def explain(problems: Sequence[Any], where: str) -> list[str]:
    """One line for each cause; what only follows from another problem is left out.

    Args:
        problems: pydantic's `ErrorDetails` of one `RunConfig`.
        where: names the values in the lines.
    """
    faulty = {problem["loc"] for problem in problems}
    suggested = {path for problem in problems if problem["type"] == "extra_forbidden" for path in _suggest(problem)}
    causes = [problem for problem in problems if not _follows_from_another(problem, faulty, suggested)]
    return [f"{where}: {_explain_one(problem)}" for problem in causes]


def _follows_from_another(problem: Any, faulty: set[Location], suggested: set[str]) -> bool:
    location: Location = problem["loc"]
    if problem["type"] == "missing":
        is_for_the_preset = location[:-1] == ("model",) and ("model", "preset") in faulty
        return is_for_the_preset or _dotted(location) in suggested
    # A list is counted after its wrong items are taken out; these have lines of their own.
    return problem["type"] == "too_short" and len(problem["input"]) >= problem["ctx"]["min_length"]


def _explain_one(problem: Any) -> str:
    location, value = problem["loc"], problem["input"]
    name, got = _dotted(location), f"(got {shown(value)})"
    match problem["type"]:
        case "extra_forbidden":
            known = ", ".join(sorted(_section(location[:-1]).model_fields))
            return f"unknown key {name}{_question(_suggest(problem))} Known here: {known}."
        case "missing" if isinstance(location[-1], int):
            return f"{_dotted(location[:-1])}: item {location[-1]}, counted from 0, is missing {got}."
        case "missing":
            return f"{name} is missing; add it."
        case "literal_error":
            close = [repr(choice) for choice in _close_choices(location, value)]
            return f"{name}: {shown(value)} is not a choice{_question(close)} Choices: {problem['ctx']['expected']}."
        case "tuple_type" if _holds_sections(location):
            header = _dotted(tuple(part for part in location if isinstance(part, str)))
            return f"{name} is a list of sections; write [[{header}]] above the keys of each {got}."
        case "tuple_type":
            return f"{name} is a list; write {location[-1]} = [...] {got}."
        case "model_type":
            known = ", ".join(sorted(_section(location).model_fields))
            return f"{name} is a section, not a value; set keys of it {got}. Known here: {known}."
        case "too_short":
            return f"{name} needs at least {problem['ctx']['min_length']} item {got}."
        case "value_error":
            return f"{name}: {problem['msg'].removeprefix('Value error, ')}."
    return f"{name}: {problem['msg']} {got}."


def _suggest(problem: Any) -> list[str]:
    """Full paths that an unknown key may stand for, the likeliest first.

    A misspelt key of its own section, and keys of this very name in others; failing that, a misspelt key of others;
    failing that, a key of its own section that looks somewhat alike; and for a whole unknown section, the keys in it.
    """
    location: Location = problem["loc"]
    key, parent = str(location[-1]), location[:-1]
    siblings = list(_section(parent).model_fields)
    paths = _nearest_first(list(_paths(RunConfig)), location)

    def named(names: Container[int | str]) -> list[Location]:
        return [path for path in paths if path[-1] in names]

    if location in ALSO_CALLED:
        return [_dotted(ALSO_CALLED[location])]
    found: list[Location] = [(*parent, name) for name in _close(key, siblings, MISSPELT)]
    found += named([key]) if found else []
    found = found or named(_close(key, [str(path[-1]) for path in paths], MISSPELT))
    found = found or [(*parent, name) for name in _close(key, siblings)]
    if not found and isinstance(problem["input"], dict):
        found = named(problem["input"])
    return [_dotted(path) for path in found]


def _paths(model: type[Settings], prefix: Location = ()) -> Iterator[Location]:
    """Every key and section below `model`, in the order of the schema; a list's position is `ANY_POSITION`."""
    for name, field in model.model_fields.items():
        path = (*prefix, name)
        yield path
        section = _section_in(field.annotation)
        if section is not None:
            is_list = get_origin(field.annotation) is tuple
            yield from _paths(section, (*path, ANY_POSITION) if is_list else path)


def _nearest_first(paths: Sequence[Location], location: Location) -> list[Location]:
    """`paths` by how much of `location` they share, with its positions put in as far as they share it."""
    placed = [_place(path, location) for path in paths]
    return sorted(placed, key=lambda path: -_num_shared(path, location))


def _place(path: Location, location: Location) -> Location:
    placed: list[int | str] = list(path)
    for index, (part, actual) in enumerate(zip(path, location, strict=False)):
        if part == ANY_POSITION and isinstance(actual, int):
            placed[index] = actual
        elif part != actual:
            break
    return tuple(placed)


def _num_shared(path: Location, location: Location) -> int:
    pairs = list(zip(path, location, strict=False))
    return next((index for index, (part, actual) in enumerate(pairs) if part != actual), len(pairs))


def _section(location: Location) -> type[Settings]:
    """Settings of the section at `location`."""
    model: type[Settings] = RunConfig
    for part in location:
        if isinstance(part, str):
            section = _section_in(model.model_fields[part].annotation)
            assert section is not None, f"{_dotted(location)} is no section"
            model = section
    return model


def _section_in(annotation: Any) -> type[Settings] | None:
    """The settings that a field is, or is a list of."""
    for item in (annotation, *get_args(annotation)):
        if isinstance(item, type) and issubclass(item, Settings):
            return item
    return None


def _annotation(location: Location) -> Any:
    """What the schema says of the key at `location`, or of the list that it is an item of."""
    path = location[:-1] if isinstance(location[-1], int) else location
    return _section(path[:-1]).model_fields[str(path[-1])].annotation


def _holds_sections(location: Location) -> bool:
    return _section_in(_annotation(location)) is not None


def _close_choices(location: Location, value: Any) -> list[Any]:
    """The choice nearest to `value`, if one is near."""
    choices = {str(choice): choice for choice in _literals(_annotation(location))}
    return [choices[name] for name in _close(str(value), list(choices))]


def _literals(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for item in get_args(annotation):
            yield from _literals(item)


def _close(word: str, known: list[str], likeness: float = ALIKE) -> list[str]:
    """The one of `known` nearest to `word`, if one is as near as `likeness`."""
    return difflib.get_close_matches(word.lower(), known, n=1, cutoff=likeness)


def _question(options: Sequence[str]) -> str:
    """The end of a sentence: `; did you mean a, b or c?`, or a full stop."""
    if not options:
        return "."
    *first, last = options
    joined = f"{', '.join(first)} or {last}" if first else last
    has_position = any(ANY_POSITION in option.split(".") for option in options)
    return f"; did you mean {joined}?" + (f" ({ANY_POSITION} counts a list from 0.)" if has_position else "")


def _dotted(location: Location) -> str:
    return ".".join(str(part) or '""' for part in location) if location else "the whole file"


def shown(value: Any) -> str:
    """A value as it was given, cut after `MAX_SHOWN` characters."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
