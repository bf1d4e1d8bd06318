"""Segments of a packed sequence, as every kernel is told of them."""

from torch import Tensor


def check_cu_seqlens(caller: str, cu_seqlens: Tensor, b: int, l: int) -> None:
    """Refuse segment starts that do not fit a packed sequence of `l` tokens; values only where they are on the CPU.

    Raises:
        ValueError: batch other than 1, wrong shape, or values that do not rise from 0 to `l`.
    """
    if b != 1:
        raise ValueError(f"{caller}: cu_seqlens packs segments along l, so b must be 1, but is {b}; pack the batch.")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"{caller}: cu_seqlens must be int32 of shape (segments + 1,), but is {cu_seqlens.dtype} of shape "
            f"{tuple(cu_seqlens.shape)}."
        )
    if cu_seqlens.device.type == "cpu":
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] != l or any(a >= b for a, b in zip(values, values[1:], strict=False)):
            raise ValueError(f"{caller}: cu_seqlens must rise from 0 to l={l} with no empty segment, but is {values}.")
