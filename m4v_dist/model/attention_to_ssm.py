"""Attention's weights into an SSM mixer: v to x, k to B, q to C, as far as each variant has a place for them.

A unified block has no output projection of its own attention: proj_out[:, :d] is it, and stays where it is, so a
mixer's out_proj becomes the mean of its copies of the values.

- mil has a place for every weight, and so computes attention's own v, k, q. Its gate starts open, D at zero, and its
  norm brings the output near attention's size: it starts as causal linear attention with decays.
- mamba2 has one B and C for all heads: the mean of the heads' rows, each times its norm's weight; values stand
  `expand` times.
- mamba1 makes B, C and dt from the convolved x, not from the token: keys and queries have no place and are left out.

What is not attention's afterwards: dt and the decays are fresh, and positions are order alone. In mamba2 and mamba1
the gate is fresh too, and a fresh silu(z) turns the sign of a value where z is negative (no bias could open it); their
fresh taps mix neighbours with random signs, and a SiLU bends what comes out; mamba2's gated norm brings the output to
RMS 1, whatever attention's was. mil's taps start as the identity, without SiLU.

Source: Mamba-in-the-Llama (Wang et al. 2024), section 3 and code at jxiw/MambaInLlama, for v, k, q to x, B, C.

Legend: `d` width, `e` inner width, `h` attention heads, `p` their width, `n` state size, `k` taps.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from m4v_dist.blocks.mamba1_mixer import Mamba1Mixer
from m4v_dist.blocks.ssm_mixer import MilMixer, SsmMixer

State = Literal["loaded", "mapped", "set"]
OPEN_GATE = 1.2785
"""z whose silu is 1."""
SHARE_OF_VALUES = 0.3
"""Size of mil's output beside the values, chosen on a tiny model: attention's is about 0.6 of theirs there, and of what
the scan gives a part alone points the same way."""


@dataclass(frozen=True)
class Part:
    """What fills some rows of one parameter.

    Args:
        target: the parameter.
        rows: of its first axis.
        state: loaded: taken as it is; mapped: made from other weights; set: a constant.
        sources: what it is made from; none for a constant.
        rule: the making, in words.
        fill: from the rows as they stand, the sources and the `own` to the rows.
        own: other parameters of the same model, as they stand, that it is made with.
    """

    target: str
    rows: slice
    state: State
    sources: tuple[str, ...]
    rule: str
    fill: Callable[..., Tensor]
    own: tuple[str, ...] = ()

    def within(self, target_prefix: str, source_prefix: str) -> "Part":
        """The same with whole names."""
        return replace(
            self,
            target=target_prefix + self.target,
            sources=tuple(source_prefix + name for name in self.sources),
            own=tuple(target_prefix + name for name in self.own),
        )


def as_it_is(target: str, source: str) -> Part:
    """A parameter of the same meaning and shape."""
    return Part(target, slice(None), "loaded", (source,), "as it is", _same)


def attention_to_ssm(mixer: nn.Module, head_width: int, *, is_closed: bool = False) -> list[Part]:
    """List what of a mixer attention's parameters fill; the rest stays fresh.

    Args:
        mixer: one of `build_ssm_mixer`; may be on the meta device.
        head_width: p.
        is_closed: zero the mixer's last weight, so that it gives zero until it has learnt: beside attention, in a
            parallel block, which then starts as attention alone.

    Returns:
        Parts whose targets are parameters of the mixer, and sources those of `QueryKeyValue`.
    """
    if isinstance(mixer, MilMixer):
        parts = _to_mil(mixer)
    elif isinstance(mixer, SsmMixer):
        parts = _to_mamba2(mixer, head_width)
    elif isinstance(mixer, Mamba1Mixer):
        parts = _to_mamba1(mixer)
    else:
        raise TypeError(f"attention_to_ssm: no rule for a {type(mixer).__name__}.")
    if not is_closed:
        return parts
    last = "norm_weight" if isinstance(mixer, MilMixer) else "out_proj.weight"
    closed = Part(last, slice(None), "set", (), "zero: closed at the start", torch.zeros_like)
    return [*(part for part in parts if part.target != last), closed]


def _to_mil(mixer: MilMixer) -> list[Part]:
    parts = [
        Part(f"in_proj.{leaf}", mixer.rows[rows], "mapped", (f"{source}.{leaf}",), f"{rows} <- {source}", _same)
        for leaf in ("weight", "bias")
        for rows, source in (("x", "to_v"), ("B", "to_k"), ("C", "to_q"))
    ]
    norms = (("norm_B", "norm_k"), ("norm_C", "norm_q"))
    parts += [
        Part(f"{norm}.weight", slice(None), "mapped", (f"{source}.weight",), f"{norm} <- {source}", _same)
        for norm, source in norms
    ]
    return parts + _open(mixer)


def _open(mixer: MilMixer) -> list[Part]:
    """Gate and skip, which attention has not, put out of the way; and the norm, at attention's size."""
    z, width = mixer.rows["z"], mixer.settings.head_dim
    open_gate = OPEN_GATE if mixer.settings.gate == "silu" else 0.0

    def share_of_values(_: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return repeat(SHARE_OF_VALUES * _rms_of_heads(weight, bias, width), "h -> (h p)", p=width)

    fill_gate = partial(torch.full_like, fill_value=open_gate)
    rule = f"{SHARE_OF_VALUES} of the RMS of a head's values"
    return [
        Part("in_proj.weight", z, "set", (), "gate open: zero", torch.zeros_like),
        Part("in_proj.bias", z, "set", (), f"gate open: z = {open_gate}", fill_gate),
        Part("D", slice(None), "set", (), "zero: no skip", torch.zeros_like),
        Part("norm_weight", slice(None), "mapped", ("to_v.weight", "to_v.bias"), rule, share_of_values),
    ]


def _rms_of_heads(weight: Tensor, bias: Tensor, width: int) -> Tensor:
    """RMS of each head's channels over white inputs of RMS 1: h."""
    return rearrange(weight.square().sum(1) + bias.square(), "(h p) -> h p", p=width).mean(1).sqrt()


def _to_mamba2(mixer: SsmMixer, head_width: int) -> list[Part]:
    groups, state = mixer.settings.num_groups, mixer.settings.state_dim

    def mean_of_heads(_: Tensor, weight: Tensor, norm: Tensor) -> Tensor:
        """Rows (h p) and a norm of p to (g n): mean over heads, then repeated or cut from p to n."""
        mean = rearrange(weight, "(h p) ... -> h p ...", p=head_width).mean(0)
        scaled = mean * norm.view(-1, *[1] * (mean.ndim - 1))
        one = scaled[torch.arange(state, device=scaled.device) % head_width]
        return repeat(one, "n ... -> (g n) ...", g=groups)

    parts = _values(mixer.rows["x"], mixer.settings.expand)
    # The convolution runs over [x, B, C]: its channels are in_proj's rows without z.
    skip = mixer.rows["x"].start
    for rows, source in (("B", "k"), ("C", "q")):
        where = mixer.rows[rows]
        channels = slice(where.start - skip, where.stop - skip)
        rule = f"{rows} <- mean over heads of to_{source}, times norm_{source}"
        norm = f"norm_{source}.weight"
        parts += [
            Part("in_proj.weight", where, "mapped", (f"to_{source}.weight", norm), rule, mean_of_heads),
            _behind_taps(channels, (f"to_{source}.bias", norm), rule, mean_of_heads),
        ]
    return parts


def _to_mamba1(mixer: Mamba1Mixer) -> list[Part]:
    return _values(mixer.rows["x"], mixer.settings.expand)


def _values(rows: slice, expand: int) -> list[Part]:
    """to_v, `expand` times over, to x; out_proj to the mean of the copies."""

    def stack(_: Tensor, values: Tensor) -> Tensor:
        return repeat(values, "d ... -> (expand d) ...", expand=expand)

    def mean_of_copies(like: Tensor) -> Tensor:
        return repeat(torch.eye(like.shape[0], device=like.device), "d c -> d (expand c)", expand=expand) / expand

    rule = f"x <- to_v, {expand} times"
    return [
        Part("in_proj.weight", rows, "mapped", ("to_v.weight",), rule, stack),
        _behind_taps(slice(0, rows.stop - rows.start), ("to_v.bias",), rule, stack),
        Part("out_proj.weight", slice(None), "set", (), f"mean of the {expand} copies", mean_of_copies),
    ]


def _behind_taps(channels: slice, sources: tuple[str, ...], rule: str, make: Callable[..., Tensor]) -> Part:
    """A bias where in_proj has none: through the taps into conv_bias.

    Exact but for a segment's first k - 1 tokens, whose taps reach over its start.
    """

    def fill(like: Tensor, *given: Tensor) -> Tensor:
        *biases, taps = given
        return make(like, *biases) * taps[channels].sum(1)

    return Part("conv_bias", channels, "mapped", sources, f"{rule}, through the taps", fill, own=("conv_weight",))


def _same(_: Tensor, source: Tensor) -> Tensor:
    return source
