"""TOML and dotted overrides to a `RunConfig`, strict, with "did you mean"; JSON out.

The only other file besides `schema.py` that knows pydantic.
"""

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from m4v_dist.config.schema import RunConfig
from m4v_dist.config.validate import validate
from m4v_dist.errors import ConfigError


def load_config(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's TOML, apply `section.key=value` overrides, and validate.

    Args:
        path: TOML file.
        overrides: dotted assignments; the value is TOML, or a bare string.

    Raises:
        ConfigError: no such file, not TOML, unknown key, wrong type, out of range, or sections that contradict.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file; see jobs/configs/ for examples.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}.") from error
    for override in overrides:
        _apply_override(values, override)
    return parse_config(values, where=path)


def parse_config(values: dict[str, Any], where: str) -> RunConfig:
    """Build and validate a `RunConfig` from plain values; `where` names them in messages.

    Raises:
        ConfigError: as for `load_config`.
    """
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [_describe(problem, where) for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from error
    try:
        validate(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return config


def config_to_json(config: RunConfig) -> str:
    """The resolved config as JSON with sorted keys."""
    return json.dumps(config.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"


def config_from_json(text: str) -> RunConfig:
    """Read back what `config_to_json` wrote."""
    return parse_config(json.loads(text), where="resolved config")


def _apply_override(values: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise ConfigError(f"override {override!r} is not of the form section.key=value.")
    *sections, key = dotted.strip().split(".")
    target: Any = values
    for section in sections:
        if isinstance(target, list):
            target = _list_item(target, section, dotted)
        else:
            target = target.setdefault(section, {})
        if not isinstance(target, dict | list):
            raise ConfigError(f"override {override!r}: {section} is a value, not a section.")
    value = _parse_value(text.strip())
    if isinstance(target, list):
        raise ConfigError(f"override {override!r}: {dotted} is a whole item of a list; name a key in it.")
    target[key] = value


def _list_item(items: list[Any], position: str, dotted: str) -> Any:
    if not position.isdigit() or int(position) >= len(items):
        raise ConfigError(f"override {dotted}: {position!r} is no position in a list of {len(items)} (0-based).")
    return items[int(position)]


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _describe(problem: Any, where: str) -> str:
    location = ".".join(str(part) for part in problem["loc"]) or "the whole file"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1])
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        parent = ".".join(str(part) for part in problem["loc"][:-1])
        hint = f"; did you mean {parent + '.' if parent else ''}{close[0]}?" if close else "."
        return f"{where}: unknown key {location}{hint} Known here: {', '.join(known)}."
    if problem["type"] == "missing":
        return f"{where}: {location} is missing; add it."
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {location}: {message} (got {problem['input']!r})."


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Field names of the section at `location`, walked through the models' annotations."""
    model: type[BaseModel] = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        annotation: Any = model.model_fields[part].annotation
        nested = [item for item in (annotation, *get_args(annotation)) if isinstance(item, type)]
        model = next(item for item in nested if issubclass(item, BaseModel))
    return sorted(model.model_fields)
