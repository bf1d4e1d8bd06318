"""The scan by mamba-ssm's own Triton kernels: the second backend, and the peer that ours is measured beside.

Its kernels take one initial state a batch row and no gradient through the states of packed segments, so segments are
scanned one after the other. Held to the reference on a GPU (`tests/kernels/test_gpu_scan_mamba_ssm.py`).

Source: state-spaces/mamba, mamba_ssm/ops/triton/ssd_combined.py (installed, not copied).
"""

import torch
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from torch import Tensor

from m4v_dist.kernels.backend import BackendUnavailable


def ssd_scan_mamba_ssm(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Scan by mamba-ssm. Arguments and results as `scan.ssd_scan`, whose checks come first.

    Raises:
        BackendUnavailable: x is on no GPU.
        ValueError: a dtype that its kernels do not take.
    """
    if x.device.type != "cuda":
        raise BackendUnavailable(
            f'kernels.backend="mamba_ssm" was asked for, but the tensors are on {x.device}: set launch.use_gpu=true or '
            'kernels.backend="reference_chunked" (plain torch, CPU and GPU).'
        )
    if x.dtype == torch.float64:
        raise ValueError('ssd_scan: backend mamba_ssm takes no float64; cast it, or use backend="reference_chunked".')
    bounds = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    outputs: list[Tensor] = []
    finals: list[Tensor] = []
    for segment, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        part = slice(start, end)
        state = initial_state
        if state is not None and cu_seqlens is not None:
            state = state[segment : segment + 1]
        y, final = mamba_chunk_scan_combined(
            x[:, part], dt[:, part], A, B[:, part].to(x.dtype), C[:, part].to(x.dtype), chunk_size, D=D,
            z=None if z is None else z[:, part], dt_bias=dt_bias, initial_states=state, dt_softplus=dt_softplus,
            return_final_states=True,
        )  # fmt: skip
        outputs.append(y)
        finals.append(final.float())
    return torch.cat(outputs, dim=1), torch.cat(finals)
