"""Where a loader stands, and which states it may go on from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from data_pipeline.mixture import ORDER_VERSION, Cursor
from m4v_dist.errors import DataError


@dataclass(frozen=True)
class LoaderState:
    """Where the loader stands after the last step that was handed out.

    Args:
        next_step: the step that comes next.
        cursors: per walk.
        samples_seen: slots per source.
        tokens_seen: tokens per source, as the records would have without a pyramid.
    """

    next_step: int = 0
    cursors: Mapping[str, Cursor] = field(default_factory=dict)
    samples_seen: Mapping[str, int] = field(default_factory=dict)
    tokens_seen: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            "next_step": self.next_step,
            "cursors": {name: asdict(cursor) for name, cursor in sorted(self.cursors.items())},
            "samples_seen": dict(sorted(self.samples_seen.items())),
            "tokens_seen": dict(sorted(self.tokens_seen.items())),
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> "LoaderState":
        """The state that `to_json` gave; what else the mapping holds is another's."""
        return cls(
            next_step=state["next_step"],
            cursors={name: Cursor(**cursor) for name, cursor in state["cursors"].items()},
            samples_seen=dict(state["samples_seen"]),
            tokens_seen=dict(state["tokens_seen"]),
        )


def require_order(state: Mapping[str, Any]) -> None:
    """Check that a state's cursors count along the order that this code walks in; states of version 1 did not say.

    Raises:
        DataError: they do not.
    """
    version = state.get("order_version", 1)
    if version != ORDER_VERSION:
        raise DataError(
            f"loader: the checkpoint's cursors are of order version {version}, this code walks the records in order "
            f"{ORDER_VERSION}; going on would repeat and skip records. Go on with the version of the code that wrote "
            "it, or start a new run folder (warm_start.weights takes over weights)."
        )


def require_fields(state: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that a state has every field of `wanted`, and each cursor its own.

    A cursor that lost a field would else start at that field's default and repeat records.

    Raises:
        DataError: naming the missing ones.
    """
    missing = sorted(wanted.keys() - state.keys())
    cursor_fields = {field.name for field in fields(Cursor)}
    for walk, cursor in sorted(state.get("cursors", {}).items()):
        missing += [f"cursors.{walk}.{name}" for name in sorted(cursor_fields - cursor.keys())]
    if missing:
        raise DataError(
            f"loader: the checkpoint's loader state has no {', '.join(missing)}; it is damaged, or another version of "
            "the code wrote it. Remove that checkpoint, so that the run goes on from the one before it, go on with the "
            "version that wrote it, or start a new run folder."
        )
