"""The Mamba-2 mixer, and its twin in attention's own weights (Mamba-in-the-Llama).

`SsmMixer`: in_proj to [z, x, B, C, dt], causal convolution over [x, B, C], scan, gated norm, out_proj. `MilMixer` is
the same with one group per head and attention's head width, so that values, keys and queries are x, B and C.
A_log, dt_bias, D, convolution, norms and scan state are float32 whatever the matmuls run in.

Source: Mamba-2 (Dao & Gu 2024); state-spaces/mamba modules/mamba2.py at e9594ce for order and initialisation;
Mamba-in-the-Llama (Wang et al. 2024) for the attention layout.

Legend: `b` batch, `l` tokens, `d` width, `e` inner width, `h` heads, `p` head width, `g` groups, `n` state size.
"""

import math
from typing import assert_never

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from m4v_dist.blocks.attention import HeadNorm
from m4v_dist.blocks.cut_scan import cut_conv1d, cut_ssd_scan
from m4v_dist.blocks.mamba1_mixer import Mamba1Mixer
from m4v_dist.config.model_settings import KernelSettings, SsmSettings
from m4v_dist.parallel.sequence import Handover

NORM_EPSILON = 1e-5
DT_MIN, DT_MAX = 1e-3, 0.1


def build_ssm_mixer(width: int, settings: SsmSettings, kernels: KernelSettings) -> nn.Module:
    """The mixer that `settings.variant` names; see `SsmMixer` for the arguments."""
    match settings.variant:
        case "mamba2":
            return SsmMixer(width, settings, kernels)
        case "mil":
            return MilMixer(width, settings, kernels)
        case "mamba1":
            return Mamba1Mixer(width, settings, kernels)
        case _:
            assert_never(settings.variant)


class SsmMixer(nn.Module):
    """Mixes tokens along `l`, each reading only those before it in its segment.

    Args:
        width: d.
        settings: sizes and gate.
        kernels: which scan backend runs.
    """

    has_biases = False
    has_out_proj = True
    has_silu = True

    def __init__(self, width: int, settings: SsmSettings, kernels: KernelSettings) -> None:
        super().__init__()
        self.settings, self.backend = settings, kernels.backend
        self.inner_width = width * settings.expand
        self.num_heads = self.inner_width // settings.head_dim
        self.bc_width = settings.num_groups * settings.state_dim
        conv_channels = self.inner_width + 2 * self.bc_width
        self.in_proj = nn.Linear(width, self.inner_width + conv_channels + self.num_heads, bias=self.has_biases)
        self.conv_weight = nn.Parameter(torch.empty(conv_channels, settings.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(conv_channels))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm_weight = nn.Parameter(torch.empty(self.inner_width))
        if self.has_out_proj:
            self.out_proj = nn.Linear(self.inner_width, width, bias=False)

    @property
    def rows(self) -> dict[str, slice]:
        """Rows of in_proj by what they make: z, x, B, C, dt, in this order."""
        e, bc = self.inner_width, self.bc_width
        rows, start = {}, 0
        for name, count in (("z", e), ("x", e), ("B", bc), ("C", bc), ("dt", self.num_heads)):
            rows[name] = slice(start, start + count)
            start += count
        return rows

    def initialize(self, generator: torch.Generator) -> None:
        """A in -(1..16), step sizes log-uniform in [1e-3, 0.1] after softplus, D and norm one; linears stay."""
        nn.init.uniform_(self.A_log, 1.0, 16.0, generator=generator)
        bound = self.settings.conv_width**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.conv_bias)
        nn.init.uniform_(self.dt_bias, math.log(DT_MIN), math.log(DT_MAX), generator=generator)
        nn.init.ones_(self.D)
        nn.init.ones_(self.norm_weight)
        with torch.no_grad():
            self.A_log.log_()
            dt = self.dt_bias.exp()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt

    def forward(
        self,
        tokens: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        initial_state: Tensor | None = None,
        handover: Handover | None = None,
    ) -> Tensor:
        """Mix.

        Args:
            tokens: b l d.
            cu_seqlens: segments + 1, int32; b must be 1. None: each batch row is one segment.
            initial_state: segments h p n, or None for zero.
            handover: which segments lie on several ranks (then collective); None where none does.

        Returns:
            b l d.
        """
        y, z = self.scan(tokens, cu_seqlens=cu_seqlens, initial_state=initial_state, handover=handover)
        normed = self._gated_norm(rearrange(y, "b l h p -> b l (h p)"), z)
        return self.out_proj(normed) if self.has_out_proj else normed

    def scan(
        self,
        tokens: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        initial_state: Tensor | None = None,
        handover: Handover | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The mixer up to its gate: y, b l h p, and the gate's argument z, b l e. Arguments as `forward`."""
        e, bc = self.inner_width, self.bc_width
        z, xBC, dt = self.in_proj(tokens).split([e, e + 2 * bc, self.num_heads], dim=-1)
        x, B, C = self._convolve(xBC, cu_seqlens, handover).split([e, bc, bc], dim=-1)
        B, C = self._normed_keys(
            rearrange(B, "b l (g n) -> b l g n", g=self.settings.num_groups),
            rearrange(C, "b l (g n) -> b l g n", g=self.settings.num_groups),
        )
        y = cut_ssd_scan(
            rearrange(x, "b l (h p) -> b l h p", h=self.num_heads),
            dt,
            -torch.exp(self.A_log.float()),
            B,
            C,
            self.D,
            dt_bias=self.dt_bias,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            handover=handover,
            chunk_size=self.settings.chunk_size,
            backend=self.backend,
        )
        return y, z

    def _convolve(self, xBC: Tensor, cu_seqlens: Tensor | None, handover: Handover | None = None) -> Tensor:
        return cut_conv1d(
            xBC, self.conv_weight, self.conv_bias, cu_seqlens=cu_seqlens, handover=handover,
            has_silu=self.has_silu, backend=self.backend,
        )  # fmt: skip

    def _normed_keys(self, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        return B, C

    def _gated_norm(self, y: Tensor, z: Tensor) -> Tensor:
        """RMSNorm of y silu(z) (gate "silu") or y + z (gate "sum") over each group's channels: b l e."""
        dtype = torch.promote_types(y.dtype, torch.float32)
        y, z = y.to(dtype), z.to(dtype)
        merged = y * F.silu(z) if self.settings.gate == "silu" else y + z
        groups = rearrange(merged, "b l (g e) -> b l g e", g=self.settings.num_groups)
        normed = F.rms_norm(groups, groups.shape[-1:], None, NORM_EPSILON)
        return rearrange(normed, "b l g e -> b l (g e)") * self.norm_weight.to(dtype)


class MilMixer(SsmMixer):
    """The scan in attention's layout: h = g = attention heads, p = n = head width, so x, B, C are its v, k, q.

    Every weight of an attention without output projection has its place: to_v, to_k, to_q with biases in in_proj's rows
    x, B, C, and norm_k, norm_q in norm_B, norm_C. The convolution starts as the identity and has no SiLU, unlike
    Mamba-2's: a squashed v would not be what the block's proj_out was trained on. proj_out[:, :d] is the output
    projection, as it is for attention.
    """

    has_biases = True
    has_out_proj = False
    has_silu = False

    def __init__(self, width: int, settings: SsmSettings, kernels: KernelSettings) -> None:
        super().__init__(width, settings, kernels)
        self.norm_B = HeadNorm(settings.state_dim)
        self.norm_C = HeadNorm(settings.state_dim)

    def initialize(self, generator: torch.Generator) -> None:
        """As Mamba-2, and a convolution that passes each token through."""
        super().initialize(generator)
        with torch.no_grad():
            self.conv_weight.zero_()
            self.conv_weight[:, -1] = 1

    def _normed_keys(self, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        # After the convolution, so that keys and queries keep their size whatever it learns.
        return self.norm_B(B), self.norm_C(C)
