"""What a library may draw from beside the slot seeds that training draws from: torch's generators of this process."""

import base64
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def random_state() -> dict[str, str]:
    """This rank's state, as JSON."""
    state = {"torch": _to_text(torch.get_rng_state())}
    if torch.cuda.is_available():
        state["cuda"] = _to_text(torch.cuda.get_rng_state())
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` gave."""
    torch.set_rng_state(_from_text(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_text(state["cuda"]))


def _to_text(values: Tensor) -> str:
    return base64.b64encode(bytes(values.tolist())).decode()


def _from_text(text: str) -> Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
