"""The Mamba-1 mixer: in_proj to [x, z], causal convolution over x, [dt, B, C] from what it gives, selective scan.

A_log, dt_bias, D, convolution and scan state are float32 whatever the matmuls run in. There is no norm.

Source: Mamba (Gu & Dao 2023), section 3.4; state-spaces/mamba modules/mamba_simple.py at e9594ce for order and
initialisation.

Legend: `b` batch, `l` tokens, `d` width, `e` inner width, `n` state size, `r` rank of the step sizes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m4v_dist.blocks.cut_scan import cut_conv1d, cut_selective_scan
from m4v_dist.config.model_settings import KernelSettings, SsmSettings
from m4v_dist.parallel.sequence import Handover

DT_MIN, DT_MAX = 1e-3, 0.1


class Mamba1Mixer(nn.Module):
    """Mixes tokens along `l`, each reading only those before it in its segment.

    Args:
        width: d.
        settings: sizes and gate.
        kernels: which scan backend runs.
    """

    def __init__(self, width: int, settings: SsmSettings, kernels: KernelSettings) -> None:
        super().__init__()
        self.settings, self.backend = settings, kernels.backend
        self.inner_width = e = width * settings.expand
        self.in_proj = nn.Linear(width, 2 * e, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(e, settings.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(e))
        self.x_proj = nn.Linear(e, settings.dt_rank + 2 * settings.state_dim, bias=False)
        self.dt_proj = nn.Linear(settings.dt_rank, e, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(e))
        self.A_log = nn.Parameter(torch.empty(e, settings.state_dim))
        self.D = nn.Parameter(torch.empty(e))
        self.out_proj = nn.Linear(e, width, bias=False)

    @property
    def rows(self) -> dict[str, slice]:
        """Rows of in_proj by what they make: x, z, in this order."""
        return {"x": slice(0, self.inner_width), "z": slice(self.inner_width, 2 * self.inner_width)}

    def initialize(self, generator: torch.Generator) -> None:
        """A = -(1..n) in every channel, step sizes log-uniform in [1e-3, 0.1] after softplus, D one; linears stay."""
        bound = self.settings.conv_width**-0.5
        nn.init.uniform_(self.conv_weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.conv_bias)
        bound = self.settings.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound, generator=generator)
        nn.init.uniform_(self.dt_bias, math.log(DT_MIN), math.log(DT_MAX), generator=generator)
        nn.init.ones_(self.D)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.settings.state_dim + 1).log().expand_as(self.A_log))
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
            initial_state: segments e n, or None for zero.
            handover: which segments lie on several ranks (then collective); None where none does.

        Returns:
            b l d.
        """
        n = self.settings.state_dim
        x, z = self.in_proj(tokens).chunk(2, dim=-1)  # b l e
        x = F.silu(cut_conv1d(x, self.conv_weight, self.conv_bias, cu_seqlens=cu_seqlens, handover=handover))
        dt, B, C = self.x_proj(x).split([self.settings.dt_rank, n, n], dim=-1)
        has_silu_gate = self.settings.gate == "silu"
        y = cut_selective_scan(
            x,
            self.dt_proj(dt),
            -torch.exp(self.A_log.float()),
            B,
            C,
            self.D,
            z=z if has_silu_gate else None,
            dt_bias=self.dt_bias,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            handover=handover,
            chunk_size=self.settings.chunk_size,
            backend=self.backend,
        )
        return self.out_proj(y if has_silu_gate else y + z)
