"""mamba-ssm's scan as our backend, on a GPU where it is installed."""

from functools import partial

import pytest
import torch

from m4v_dist.kernels.scan_reference import ssd_scan_chunked
from tests.kernels.scan_cases import draw_inputs, outputs_and_gradients, worst_error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("lengths", [[200], [63, 65, 300]])
def test_outputs_and_gradients_are_those_of_the_reference(lengths: list[int]) -> None:
    pytest.importorskip("mamba_ssm", reason="mamba-ssm is not installed")
    from m4v_dist.kernels.scan_mamba_ssm import ssd_scan_mamba_ssm

    drawn = draw_inputs(sum(lengths), h=4, g=1, p=64, n=128, segments=len(lengths), dtype=torch.bfloat16)
    inputs = {name: value.cuda() for name, value in drawn.items()}
    options = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(), "dt_softplus": True, "chunk_size": 64}
    expected = outputs_and_gradients(ssd_scan_chunked, inputs, torch.float64, **options)
    found = outputs_and_gradients(partial(ssd_scan_mamba_ssm), inputs, torch.bfloat16, **options)
    error, name = worst_error(found, expected)
    assert error < 2e-2, (name, error)
