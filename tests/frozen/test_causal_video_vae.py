"""PyramidFlow's causal video VAE gives the reference's numbers, whole, in chunks and in tiles, and their gradients."""

import json
import re

import pytest
import torch
from torch import Tensor

from m4v_dist.frozen.causal_video_vae import RELEASED, CausalVideoVae, Posterior, over_tiles, run_chunks
from m4v_dist.frozen.causal_video_vae_layers import CausalConv3d, Chunk
from tests.conftest import GOLDEN, load_golden
from tests.frozen.golden_vae import CASE, DESCRIPTION, OUTPUTS, TOLERANCE, golden_network, num_in, relative_error

TILE_PX = DESCRIPTION["tile_sample_min_size"]
CHUNKS = [None, 1, 2]
"""Latents of a chunk; None is the whole clip."""


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_golden(CASE)[1]


@pytest.fixture(scope="module")
def network(tensors: dict[str, Tensor]) -> CausalVideoVae:
    return golden_network(tensors)


def longest_latents(tensors: dict[str, Tensor]) -> Tensor:
    return max(
        (tensors[name] for name in tensors if name.startswith("in.latents")), key=lambda latents: latents.shape[2]
    )


def longest_frames(tensors: dict[str, Tensor]) -> Tensor:
    return tensors[max((name for name in tensors if name.startswith("in.frames")), key=num_in)]


@pytest.mark.parametrize("num_latents", CHUNKS)
@pytest.mark.parametrize("name", OUTPUTS)
def test_every_golden_output_is_met(
    name: str, num_latents: int | None, network: CausalVideoVae, tensors: dict[str, Tensor]
) -> None:
    kind, _, how = re.fullmatch(r"out\.(encode|decode)_(frames|latents)\d+_?(.*)", name).groups()  # type: ignore[union-attr]
    used = golden_network(tensors, tile_px=TILE_PX) if how == "tiled" else network
    if kind == "encode":
        assert how in ("", "tiled") or how.startswith("window")
        found = used.encode(tensors[f"in.frames{num_in(name)}"], num_latents=num_latents)
    else:
        assert how in ("", "tiled", "not_first_chunk") or how.startswith("window")
        latents = tensors[f"in.latents{num_in(name)}"]
        found = used.decode(latents, num_latents=num_latents, starts_clip=how != "not_first_chunk")
    assert relative_error(found, tensors[name]) < TOLERANCE[kind]


@pytest.mark.parametrize("num_latents", CHUNKS)
def test_the_gradient_of_a_decode_is_the_references_across_chunks(
    num_latents: int | None, network: CausalVideoVae, tensors: dict[str, Tensor]
) -> None:
    wanted = tensors["grad.latents"]
    latents = tensors[f"in.latents{wanted.shape[2]}"].clone().requires_grad_()
    (network.decode(latents, num_latents=num_latents) * tensors["in.grad_decoded"]).sum().backward()
    assert latents.grad is not None
    assert relative_error(latents.grad, wanted) < TOLERANCE["grad"]


def test_the_gradient_of_an_encode_passes_chunks(network: CausalVideoVae, tensors: dict[str, Tensor]) -> None:
    frames = longest_frames(tensors)
    weight = torch.randn_like(network.encode(frames))
    gradients = []
    for num_latents in (None, 1):
        leaf = frames.clone().requires_grad_()
        (network.encode(leaf, num_latents=num_latents) * weight).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert relative_error(gradients[1], gradients[0]) < TOLERANCE["grad"]


@pytest.mark.parametrize("num_frames", [1, 9, 57, 121])
def test_a_prefix_of_241_frames_gives_the_first_latents_bit_for_bit(num_frames: int, network: CausalVideoVae) -> None:
    frames = torch.rand(1, 3, 241, 16, 16) * 2 - 1
    num_latents = (num_frames - 1) // 8 + 1
    whole = network.encode(frames)
    assert whole.shape[2] == 31
    assert torch.equal(network.encode(frames[:, :, :num_frames]), whole[:, :, :num_latents])
    drawn = Posterior.from_moments(whole).sample(5)
    prefix = Posterior.from_moments(whole[:, :, :num_latents]).sample(5)
    assert torch.equal(prefix, drawn[:, :, :num_latents])


def test_nothing_looks_ahead(network: CausalVideoVae) -> None:
    frames = torch.rand(1, 3, 17, 16, 16) * 2 - 1
    changed = frames.clone()
    changed[:, :, 9:] += 0.5
    before, after = (network.encode(x, num_latents=None) for x in (frames, changed))
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.equal(before[:, :, 2:], after[:, :, 2:])
    latents = before[:, : network.config.latent_channels]
    moved = latents.clone()
    moved[:, :, 2] += 0.5
    shown, shown_moved = (network.decode(x, num_latents=None) for x in (latents, moved))
    assert torch.equal(shown[:, :, :9], shown_moved[:, :, :9])
    assert bool((shown[:, :, 9:] != shown_moved[:, :, 9:]).flatten(3).any(3).all())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("is_tiled", [False, True])
def test_the_last_latent_decodes_as_in_the_whole_with_a_gradient_to_it_alone(
    is_tiled: bool, recompute: bool, network: CausalVideoVae, tensors: dict[str, Tensor]
) -> None:
    used = golden_network(tensors, tile_px=TILE_PX) if is_tiled else network
    latents = longest_latents(tensors)
    whole = latents.clone().requires_grad_()
    end = used.decode(whole)[:, :, -8:]
    weight = torch.randn_like(end)
    (end * weight).sum().backward()
    assert whole.grad is not None and bool((whole.grad[:, :, :-1] != 0).any())

    context, last = latents[:, :, :-1].clone().requires_grad_(), latents[:, :, -1:].clone().requires_grad_()
    frames = used.decode_last(context, last, recompute=recompute)
    (frames * weight).sum().backward()
    assert relative_error(frames, end) < TOLERANCE["decode"]
    assert context.grad is None and last.grad is not None
    assert relative_error(last.grad, whole.grad[:, :, -1:]) < TOLERANCE["grad"]


def test_a_last_latent_without_context_is_a_first_frame(network: CausalVideoVae, tensors: dict[str, Tensor]) -> None:
    latents = longest_latents(tensors)[:, :, :1]
    assert torch.equal(network.decode_last(latents[:, :, :0], latents), network.decode(latents))


def test_chunks_keep_copies_of_two_frames_and_the_last_one_keeps_none(
    network: CausalVideoVae, tensors: dict[str, Tensor]
) -> None:
    """A view would keep the whole chunk alive."""
    chunks: list[Chunk] = []

    def run(piece: Tensor, chunk: Chunk) -> Tensor:
        chunks.append(chunk)
        return network.encoder(piece, chunk)

    run_chunks(run, longest_frames(tensors), 8)
    first, last = chunks[0], chunks[-1]
    convolutions = [module for module in network.encoder.modules() if isinstance(module, CausalConv3d)]
    over_time = [module for module in convolutions if module.conv.kernel_size[0] == 3]
    assert set(first.kept) == set(over_time) and not last.kept
    for module, kept in first.kept.items():
        assert kept.shape[2] == (1 if module.conv.stride[0] == 2 else 2)
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


@pytest.mark.parametrize("size", [(16, 16), (32, 48), (40, 72), (50, 33), (97, 8)])
def test_tiles_of_what_needs_no_neighbour_blend_to_the_whole(size: tuple[int, int]) -> None:
    x = torch.randn(1, 2, 1, *size)

    def enlarge(tile: Tensor) -> Tensor:
        return tile.repeat_interleave(8, -1).repeat_interleave(8, -2)

    torch.testing.assert_close(over_tiles(enlarge, x, 16, 128), enlarge(x), atol=1e-6, rtol=0)


def test_tiles_fade_linearly_from_one_to_the_next() -> None:
    number = iter(range(9))
    values = over_tiles(lambda tile: torch.full_like(tile, float(next(number))), torch.zeros(4, 28), 16, 16)
    # tiles of 16 every 12: the second begins at 12 and has a weight of 0, 1/4, 1/2, 3/4, then 1
    assert values[0].tolist() == [0.0] * 12 + [0.0, 0.25, 0.5, 0.75] + [1.0] * 8 + [1.0, 1.25, 1.5, 1.75]


def test_released_sizes_have_the_released_names_and_shapes() -> None:
    wanted = json.loads((GOLDEN / f"keys_{CASE}.json").read_text())
    with torch.device("meta"):
        network = CausalVideoVae(RELEASED)
    assert {name: list(tensor.shape) for name, tensor in network.state_dict().items()} == wanted["keys"]
    assert sum(parameter.numel() for parameter in network.parameters()) == wanted["parameters_total"]


def test_posterior_noise_is_of_its_seed_and_of_the_stated_size() -> None:
    mean, log_variance = torch.zeros(1, 16, 4, 16, 16), torch.full((1, 16, 4, 16, 16), 2.0)
    posterior = Posterior.from_moments(torch.cat([mean, log_variance], dim=1))
    drawn = posterior.sample(7)
    assert torch.equal(drawn, posterior.sample(7)) and not torch.equal(drawn, posterior.sample(8))
    noise = drawn / torch.e
    assert abs(float(noise.mean())) < 0.03 and abs(float(noise.std()) - 1) < 0.03
    assert not torch.equal(noise[:, :, 0], noise[:, :, 1])
    moved = Posterior(mean + 3, log_variance).sample(7)
    torch.testing.assert_close(moved, drawn + 3)


def test_log_variances_are_clamped_as_in_the_reference() -> None:
    posterior = Posterior.from_moments(torch.tensor([0.0, 50.0]).reshape(1, 2, 1, 1, 1))
    assert float(posterior.log_variance) == 20.0
    assert float(Posterior.from_moments(torch.tensor([0.0, -50.0]).reshape(1, 2, 1, 1, 1)).log_variance) == -30.0


def test_a_tile_that_does_not_divide_into_latents_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tile_px=200 is no multiple of 32.*use 224"), torch.device("meta"):
        CausalVideoVae(RELEASED, tile_px=200)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 9, 12, 16), "1 clips of 9 frames of 12 x 16 break the 8k.1 frame rule or the multiple of 8"),
        ((1, 3, 9, 17, 17), "9 frames of 17 x 17 break"),
        ((1, 3, 8, 16, 16), "8 frames of 16 x 16 break.*cut to 1 frames"),
        ((1, 3, 0, 16, 16), "0 frames of 16 x 16 break"),
        ((1, 3, 1, 0, 16), "1 frames of 0 x 16 break"),
        ((0, 3, 1, 16, 16), "0 clips of 1 frames"),
        ((1, 4, 9, 16, 16), r"float b 3 t h w .*got torch.float32 \(1, 4, 9, 16, 16\)"),
        ((3, 9, 16, 16), r"float b 3 t h w .*got torch.float32 \(3, 9, 16, 16\)"),
    ],
)
def test_frames_of_other_shapes_are_refused_by_name(
    shape: tuple[int, ...], words: str, network: CausalVideoVae
) -> None:
    for num_latents in (None, 1):
        with pytest.raises(ValueError, match=f"causal video VAE: .*{words}"):
            network.encode(torch.zeros(shape), num_latents=num_latents)


def test_latents_of_other_shapes_are_refused_by_name(network: CausalVideoVae) -> None:
    channels = network.config.latent_channels
    for shape in ((1, channels, 0, 2, 2), (1, channels + 1, 1, 2, 2), (channels, 1, 2, 2)):
        with pytest.raises(ValueError, match=rf"causal video VAE: latents must be .*c={channels} and t > 0, got \("):
            network.decode(torch.zeros(shape))
    one = torch.zeros(1, channels, 1, 2, 2)
    for context, last in ((one, one.repeat(1, 1, 2, 1, 1)), (one[..., :1], one), (one[0], one)):
        with pytest.raises(ValueError, match="causal video VAE: decode_last wants context b c t h w and one latent"):
            network.decode_last(context, last)


@pytest.mark.parametrize("num_latents", [0, -1])
def test_chunks_of_no_latent_are_refused_by_name(num_latents: int, network: CausalVideoVae) -> None:
    with pytest.raises(ValueError, match=f"causal video VAE: num_latents={num_latents} a chunk; give 1 or more"):
        network.encode(torch.zeros(1, 3, 9, 16, 16), num_latents=num_latents)
    with pytest.raises(ValueError, match=f"causal video VAE: num_latents={num_latents} a chunk; give 1 or more"):
        network.decode(torch.zeros(1, network.config.latent_channels, 2, 2, 2), num_latents=num_latents)
