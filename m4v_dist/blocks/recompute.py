"""Activations of a block computed again in backward: all of them, or all but the outputs of its large operators.

`"selective"` keeps what is dear to compute and small to keep beside it: the outputs of linears, of fused attention, and
of scan kernels that are registered as one operator. Norms, modulation, rotations, gates, activations, gathers and the
plain torch forms of scan, convolution and temporal attention run again.

Source: selective activation recomputation (Korthikanti et al. 2022), by operator as torch.utils.checkpoint has it.
"""

from typing import Any, Literal, assert_never

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts as selective_contexts

Recompute = Literal["none", "blocks", "selective"]
KERNEL_NAMESPACE = "m4v"
"""Namespace of operators of our own: each is one fused kernel."""
_ATEN = torch.ops.aten
SAVED_OPERATORS = frozenset(
    {
        _ATEN.mm.default,
        _ATEN.addmm.default,
        _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
        _ATEN._scaled_dot_product_flash_attention.default,
        _ATEN._scaled_dot_product_efficient_attention.default,
        _ATEN._scaled_dot_product_cudnn_attention.default,
    }
)
"""Batched products are not among them: those of the chunked scan hold a chunk x chunk table for each head."""


def run_block(block: nn.Module, recompute: Recompute, *args: Any) -> Any:
    """Call `block(*args)`, keeping for its backward what `recompute` says; the same bits whatever it says."""
    if not torch.is_grad_enabled():
        return block(*args)
    match recompute:
        case "none":
            return block(*args)
        case "blocks":
            return checkpoint(block, *args, use_reentrant=False)
        case "selective":
            return checkpoint(block, *args, use_reentrant=False, context_fn=_selective_contexts)
    assert_never(recompute)


def _selective_contexts() -> Any:
    return selective_contexts(_policy)


def _policy(_: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_kernel = getattr(operator, "namespace", None) == KERNEL_NAMESPACE
    if operator in SAVED_OPERATORS or is_kernel:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
