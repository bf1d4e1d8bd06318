"""Blocks through torch.compile, one by one: what is elementwise fuses; scan, attention and gathers stay as they are.

Compiled with symbolic sizes, so that another length of text or video needs no new code. What does need one: another
number of columns in a micro-batch, gradients on or off, a text of one token, another kind of mixer, a frozen block.
Code is shared by blocks of one kind. Past a limit of versions the run stops with an error: torch's own way would be to
run uncompiled from there on, with a line in the log.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

MAX_VERSIONS = 32
"""Of one function's code; a curriculum needs about 8."""


def compile_blocks(blocks: Sequence[nn.Module], *, backend: str = "inductor") -> None:
    """Compile each block's forward in place; its hooks (ZeRO 3's gather and release) stay outside.

    Args:
        blocks: that own all their parameters.
        backend: of torch.compile; inductor needs a C++ compiler on a CPU.
    """
    for block in blocks:
        block.forward = _limited(torch.compile(block.forward, dynamic=True, backend=backend))  # type: ignore[method-assign]


def _limited(compiled: Any) -> Any:
    def forward(*args: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=MAX_VERSIONS, fail_on_recompile_limit_hit=True):
            return compiled(*args)

    return forward
