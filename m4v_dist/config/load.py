"""TOML and dotted overrides to a `RunConfig`, strict, with "did you mean" (`explain.py`); JSON out.

The only other file besides `schema.py` that knows pydantic.
"""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from m4v_dist.config.explain import explain
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
        tried = "" if Path(path).is_absolute() else f" ({Path(path).absolute()})"
        raise ConfigError(f"{path}{tried}: no such config file; see jobs/configs/ for examples.") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a TOML file, see jobs/configs/.") from error
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
        raise ConfigError("\n".join(explain(error.errors(), where))) from error
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
    parts = dotted.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form section.key=value.")
    target: Any = values
    for depth, part in enumerate(parts[:-1]):
        if isinstance(target, list):
            target = target[_position(target, parts, depth, override)]
        else:
            target = target.setdefault(part, {})
        if not isinstance(target, dict | list):
            section = ".".join(parts[: depth + 1])
            raise ConfigError(f"override {override!r}: {section} is a value, not a section; set it as {section}=...")
    if isinstance(target, list):
        raise ConfigError(_refuse_item(target, parts, override))
    target[parts[-1]] = _parse_value(text.strip())


def _position(items: list[Any], parts: list[str], depth: int, override: str) -> int:
    """Position that `parts[depth]` names in the list that `parts[:depth]` leads to."""
    part, path = parts[depth], ".".join(parts[:depth])
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    rest = ".".join(parts[depth + 1 :]) if depth + 1 < len(parts) else part
    named = [index for index, item in enumerate(items) if isinstance(item, dict) and item.get("name") == part]
    example = f"{path}.{named[0] if named else 0}.{rest}"
    hint = f"; its items are named by position, from 0, as in {example}=..." if items else "."
    raise ConfigError(f"override {override!r}: {part!r} is no position in {path}, a list of {len(items)}{hint}")


def _refuse_item(items: list[Any], parts: list[str], override: str) -> str:
    """Why a list's item cannot be set as a whole."""
    path, last = ".".join(parts[:-1]), len(parts) - 1
    if items and not isinstance(items[0], dict):
        return f"override {override!r}: {path} is a list of values; set all of it, as in {path}={items}."
    position = _position(items, parts, last, override)
    item = f"{path}.{position}"
    return f"override {override!r}: {item} is a whole section; name a key in it, as in {item}.key=..."


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
