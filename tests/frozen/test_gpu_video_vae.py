"""The video VAE on a GPU: the reference's numbers, and what recompute is worth at the released sizes."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from m4v_dist.frozen.causal_video_vae import CausalVideoVae
from tests.conftest import load_golden
from tests.frozen.golden_vae import CASE, DESCRIPTION, OUTPUTS, TOLERANCE, golden_network, num_in, relative_error

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _true_float32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def test_golden_outputs_are_met_on_the_gpu() -> None:
    _, tensors = load_golden(CASE)
    tensors = {name: tensor.cuda() for name, tensor in tensors.items()}
    whole = golden_network(tensors).cuda()
    tiled = golden_network(tensors, tile_px=DESCRIPTION["tile_sample_min_size"]).cuda()
    for name in OUTPUTS:
        used = tiled if name.endswith("_tiled") else whole
        if name.startswith("out.encode"):
            found, kind = used.encode(tensors[f"in.frames{num_in(name)}"]), "encode"
        else:
            starts_clip = not name.endswith("not_first_chunk")
            found, kind = used.decode(tensors[f"in.latents{num_in(name)}"], starts_clip=starts_clip), "decode"
        assert relative_error(found, tensors[name]) < TOLERANCE[kind], name


def test_a_prefix_gives_the_same_bits_on_the_gpu() -> None:
    network = golden_network(load_golden(CASE)[1]).cuda()
    frames = torch.rand(1, 3, 57, 32, 48, device="cuda") * 2 - 1
    assert torch.equal(network.encode(frames[:, :, :25]), network.encode(frames)[:, :, :4])


def test_recompute_saves_memory_and_keeps_the_gradient() -> None:
    with torch.device("cuda"):
        network = CausalVideoVae().bfloat16().requires_grad_(False).eval()
        latents = torch.randn(1, 16, 3, 24, 40)
    weights_bytes = torch.cuda.memory_allocated()
    peaks: dict[bool, int] = {}
    gradients: dict[bool, Tensor] = {}
    for recompute in (False, True):
        last = latents[:, :, -1:].clone().requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        network.decode_last(latents[:, :, :-1], last, recompute=recompute).square().sum().backward()
        peaks[recompute] = torch.cuda.max_memory_allocated() - weights_bytes
        assert last.grad is not None
        gradients[recompute] = last.grad
    print({recompute: f"{peak / 2**30:.1f} GiB" for recompute, peak in peaks.items()})
    # What stays is one block's activations at full size: on an H200, 4.8 of 6.2 GiB with the weights.
    assert peaks[True] < 0.85 * peaks[False]
    assert relative_error(gradients[True], gradients[False]) < 0.02
