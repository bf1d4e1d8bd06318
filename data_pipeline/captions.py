"""Captions of a raw record: one or several, each with a weight; what is no caption is told apart by its reason.

Read are, in this order, the json member's `captions` (a list of texts or of {"text": ..., "weight": ...}), its
`caption`, its `text`, and the member txt; the first that is there and not blank counts.
"""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_KEYS = ("captions", "caption", "text")
_LARGEST = sys.float_info.max


class CaptionError(Exception):
    """A record's captions cannot be used; the message says why."""


@dataclass(frozen=True)
class Caption:
    """One text of a clip.

    Args:
        text: not blank, no white space at its ends.
        weight: relative to the clip's other captions; finite, >= 0, and not 0 for all of them.
    """

    text: str
    weight: float = 1.0


def read_captions(json_member: bytes | None, txt_member: bytes | None) -> tuple[tuple[Caption, ...], dict[str, Any]]:
    """Captions of a record, and what else its json member holds.

    Args:
        json_member, txt_member: their bytes; None where the record has no such member.

    Returns:
        captions, empty where the record has none or a blank one; and the json object without them.

    Raises:
        CaptionError: a member is no UTF-8, json is no object, or the captions are not as this module's docstring says.
    """
    notes = _json_object(json_member)
    found = {key: notes.pop(key) for key in _KEYS if key in notes}
    if found.get("captions") is not None:
        return _several(found["captions"]), notes
    for key in ("caption", "text"):
        text = "" if found.get(key) is None else _text(found[key], key)
        if text:
            return (Caption(text),), notes
    text = _text(_decode(txt_member or b"", "txt"), "txt")
    return ((Caption(text),) if text else ()), notes


def captions_to_json(captions: tuple[Caption, ...]) -> dict[str, Any]:
    """The keys of a json member that `read_captions` reads back as these captions."""
    match captions:
        case ():
            return {}
        case (Caption(text, 1.0),):
            return {"caption": text}
        case _:
            return {"captions": [{"text": caption.text, "weight": caption.weight} for caption in captions]}


def require_captions(captions: tuple[Caption, ...]) -> None:
    """Check captions that did not come from `read_captions`.

    Raises:
        CaptionError: they would not be read back from a json member.
    """
    _several([{"text": caption.text, "weight": caption.weight} for caption in captions])


def _several(values: object) -> tuple[Caption, ...]:
    if not isinstance(values, list) or not values:
        raise CaptionError(f"captions is {_shown(values)}, not a list of at least one")
    captions = tuple(_caption(value, f"captions[{number}]") for number, value in enumerate(values))
    total = sum(caption.weight for caption in captions)
    if not 0 < total < math.inf:
        raise CaptionError(f"the weights of captions add up to {total:g}; one of them must be above 0")
    return captions


def _caption(value: object, where: str) -> Caption:
    weight: object = 1.0
    if isinstance(value, Mapping):
        if "text" not in value or value.keys() - {"text", "weight"}:
            raise CaptionError(f'{where} has the keys {sorted(value)}, not "text" and "weight"')
        weight, value = value.get("weight", 1.0), value["text"]
    text = _text(value, where)
    if not text:
        raise CaptionError(f"{where} is blank")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= _LARGEST:
        raise CaptionError(f"{where} has the weight {_shown(weight)}, not a finite number of at least 0")
    return Caption(text, float(weight))


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise CaptionError(f"{where} is {_shown(value)}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CaptionError(f"{where} holds half a character (\\u{ord(value[error.start]):04x})") from error
    return value.strip()


def _json_object(data: bytes | None) -> dict[str, Any]:
    if data is None:
        return {}
    text = _decode(data, "json")
    try:
        value = json.loads(text)
    # RecursionError: brackets nested past the interpreter's depth
    except (ValueError, RecursionError) as error:
        raise CaptionError(f"json is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise CaptionError(f"json is {_shown(value)}, not an object")
    return value


def _decode(data: bytes, member: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CaptionError(
            f"{member} is no UTF-8 (byte 0x{data[error.start]:02x} at {error.start}); write it anew in UTF-8"
        ) from error


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}... ({type(value).__name__})"
