"""The Triton convolution on a GPU, against plain torch in float64: outputs and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from m4v_dist.kernels.conv1d import causal_conv1d
from m4v_dist.kernels.conv1d_triton import GatherIndex, causal_conv1d_triton, gather_index

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_outputs_and_gradients_are_those_of_plain_torch(dtype: torch.dtype, tolerance: float) -> None:
    """A column of 4,000 rows read out of order, the first 100 of them twice, in two segments."""
    x = torch.randn(1, 4000, 700, device="cuda").to(dtype)
    weight, bias = torch.randn(700, 4, device="cuda"), torch.randn(700, device="cuda")
    source = torch.cat([torch.arange(100), 100 + torch.randperm(3900), torch.arange(100)])
    bounds = torch.tensor([0, 1500, 4100], dtype=torch.int32)
    index = gather_index(source, 4000)
    gather = GatherIndex(index.source.cuda(), index.readers.cuda())
    of_out = torch.randn(1, 4100, 700, device="cuda").to(dtype)

    def run(is_ours: bool) -> list[torch.Tensor]:
        wide = dtype if is_ours else torch.float64
        leaves = [x.to(wide), *(t.to(torch.float32 if is_ours else wide) for t in (weight, bias))]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        if is_ours:
            out = causal_conv1d_triton(*leaves, cu_seqlens=bounds, has_silu=True, gather=gather)
        else:
            out = F.silu(causal_conv1d(leaves[0][:, source.cuda()], *leaves[1:], cu_seqlens=bounds))
        return [out.detach(), *torch.autograd.grad((out * of_out.to(out.dtype)).sum(), leaves)]

    for found, expected in zip(run(True), run(False), strict=True):
        assert float((found.double() - expected).abs().max() / expected.abs().max()) < tolerance
