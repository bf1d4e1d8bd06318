"""The mixer in attention's weights: what "maps exactly" means, its initial values, causality and segments."""

import math

import pytest
import torch
from torch import Tensor

from m4v_dist.blocks.attention import AttentionMixer
from m4v_dist.blocks.ssm_mixer import MilMixer, build_ssm_mixer
from m4v_dist.config.model_settings import KernelSettings, SsmSettings
from m4v_dist.model.build import initialize_weights

WIDTH, HEADS = 32, 4


def _mil(**options: object) -> MilMixer:
    settings = SsmSettings(
        variant="mil", expand=1, head_dim=WIDTH // HEADS, state_dim=WIDTH // HEADS, num_groups=HEADS, chunk_size=16,
        **options,
    )  # fmt: skip
    mixer = build_ssm_mixer(WIDTH, settings, KernelSettings())
    assert isinstance(mixer, MilMixer)
    initialize_weights(mixer, seed=0)
    return mixer


def _attention() -> AttentionMixer:
    """Attention whose every parameter is random, norms and biases too."""
    attention = AttentionMixer(WIDTH, HEADS, (4, 2, 2))
    initialize_weights(attention, seed=1)
    for name, parameter in attention.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return attention


@torch.no_grad()
def _take_attention(mixer: MilMixer, attention: AttentionMixer) -> None:
    """v, k, q with their biases to x, B, C; the norms to the norms."""
    qkv = attention.qkv
    for name, linear in (("x", qkv.to_v), ("B", qkv.to_k), ("C", qkv.to_q)):
        mixer.in_proj.weight[mixer.rows[name]] = linear.weight
        mixer.in_proj.bias[mixer.rows[name]] = linear.bias
    mixer.norm_B.weight.copy_(qkv.norm_k.weight)
    mixer.norm_C.weight.copy_(qkv.norm_q.weight)


@torch.no_grad()
def _forget_nothing(mixer: MilMixer) -> None:
    """Decay 1, step 1, no skip: all that is not attention's stands still."""
    mixer.A_log.fill_(-math.inf)
    mixer.in_proj.weight[mixer.rows["dt"]] = 0
    mixer.in_proj.bias[mixer.rows["dt"]] = 0
    mixer.dt_bias.fill_(math.log(math.e - 1))
    mixer.D.zero_()


def _linear_attention(attention: AttentionMixer, tokens: Tensor) -> Tensor:
    """sum over s <= t of (q_t . k_s) v_s, from the mixer's own projections, without positions: l n p."""
    q, k, v = attention.qkv(tokens, None)
    scores = torch.einsum("tnp,snp->nts", q, k).tril()
    return torch.einsum("nts,snp->tnp", scores, v)


def test_with_decay_1_and_step_1_the_scan_is_linear_attention_of_the_same_weights() -> None:
    mixer, attention = _mil(), _attention()
    _take_attention(mixer, attention)
    _forget_nothing(mixer)
    tokens = torch.randn(50, WIDTH)
    y, _ = mixer.scan(tokens[None])
    torch.testing.assert_close(y[0], _linear_attention(attention, tokens), rtol=1e-5, atol=1e-4)


def test_without_a_gate_the_mixer_is_the_norm_of_linear_attention_per_head() -> None:
    mixer, attention = _mil(gate="sum"), _attention()
    _take_attention(mixer, attention)
    _forget_nothing(mixer)
    with torch.no_grad():
        mixer.in_proj.weight[mixer.rows["z"]] = 0
    tokens = torch.randn(50, WIDTH)
    expected = _linear_attention(attention, tokens)
    expected = expected * expected.square().mean(-1, keepdim=True).add(1e-5).rsqrt()
    torch.testing.assert_close(mixer(tokens[None])[0], expected.flatten(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parameter", [name for name, _ in _attention().named_parameters()])
def test_every_parameter_of_attention_has_a_place_that_moves_the_mixer(parameter: str) -> None:
    attention = _attention()
    results = []
    for change in (0.0, 0.1):
        with torch.no_grad():
            attention.get_parameter(parameter).add_(change)
        mixer = _mil()
        _take_attention(mixer, attention)
        results.append(mixer(torch.linspace(-1, 1, 20 * WIDTH).sin().view(1, 20, WIDTH)))
    assert (results[0] - results[1]).abs().max() > 1e-4


def test_a_fresh_convolution_passes_each_token_through() -> None:
    mixer = _mil()
    xBC = torch.randn(1, 9, 3 * WIDTH)
    assert torch.equal(mixer._convolve(xBC, None), xBC)


def test_there_is_no_output_projection_and_the_row_names_tile_in_proj() -> None:
    mixer = _mil()
    assert not any("out_proj" in name for name, _ in mixer.named_parameters())
    assert list(mixer.rows) == ["z", "x", "B", "C", "dt"]
    covered = [row for part in mixer.rows.values() for row in range(part.start, part.stop)]
    assert covered == list(range(mixer.in_proj.out_features)) and covered[-1] == 4 * WIDTH + HEADS - 1


def test_mixer_is_causal_and_differs_by_gate() -> None:
    mixer, tokens = _mil(), torch.randn(1, 40, WIDTH)
    changed = tokens.clone()
    changed[:, 20] += 1
    before, after = mixer(tokens), mixer(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().amax(dim=(0, 2)).min() > 0
    assert (before - _mil(gate="sum")(tokens)).abs().max() > 0.1
