"""The scan beside attention and beside mamba-ssm: medians of whole calls by number of tokens, as markdown.

Legend: `l` tokens, `h` heads, `p` head width, `g` groups, `n` state size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from m4v_dist.bench.hardware import describe
from m4v_dist.bench.markdown import table
from m4v_dist.bench.stopwatch import (
    NUM_TIMED,
    NUM_WARM_UP,
    bytes_per_second,
    median_graph_ms,
    median_ms,
    peak_bytes,
)
from m4v_dist.config.schema import RunConfig
from m4v_dist.kernels.backend import Backend, BackendUnavailable, require_backend
from m4v_dist.kernels.scan import ssd_scan

MAX_PLAIN_TOKENS = 8192
"""Past this the plain scan is left out, and said to be."""


@dataclass(frozen=True)
class Form:
    """One way to mix tokens: makes inputs for `l` tokens, and mixes them.

    Args:
        name: column of the table.
        draw: inputs of l tokens, each requiring a gradient.
        mix: outputs of the inputs.
        most_tokens: beyond which it is left out; None: never.
    """

    name: str
    draw: Callable[[int], list[Tensor]]
    mix: Callable[[list[Tensor]], Tensor]
    most_tokens: int | None = None


def scan_report(config: RunConfig, device: torch.device) -> str:
    """Time forward, and forward with backward, of every form that can run on this device.

    Args:
        config: its model's SSM and heads, `benchmark.tokens`, and the run's seed.
        device: where; on a GPU inputs are bfloat16, and each call is timed eagerly and as a replayed graph.
    """
    forms, left_out = scan_forms(config, device)
    speed = bytes_per_second(device)
    rows = [
        [
            f"{tokens:,}",
            *(_cell(form, tokens, device) for form in forms),
            f"{_fewest_bytes(config, tokens) / speed * 1e3:.3g}",
        ]
        for tokens in config.benchmark.tokens
    ]
    heads = ["tokens", *(form.name for form in forms), "fewest bytes, forward"]
    return "\n\n".join(
        [_note(config, device, speed), table(heads, rows), *([f"Left out: {'; '.join(left_out)}."] if left_out else [])]
    )


def _note(config: RunConfig, device: torch.device, speed: float) -> str:
    ssm = config.model.ssm
    on_gpu = "; then the same two as replays of a CUDA graph; then peak GiB beside the inputs"
    return (
        f"ms, forward / forward and backward, eagerly{on_gpu if device.type == 'cuda' else ''}. Median of {NUM_TIMED} "
        f"calls after {NUM_WARM_UP}. Scan: {config.model.ssm_num_heads} heads of {ssm.head_dim}, state "
        f"{ssm.state_dim}, {ssm.num_groups} groups, chunks of {ssm.chunk_size}; attention: {config.model.num_heads} "
        f"heads of {config.model.head_dim}. Last column: reading x, B, C and writing y at the {speed / 1e12:.3g} TB/s "
        f"of a copy here. {describe(device)}."
    )


def scan_forms(config: RunConfig, device: torch.device) -> tuple[list[Form], list[str]]:
    """The forms that can run on this device, and why the others cannot."""
    forms, left_out = [], []
    backends: tuple[Backend, ...] = ("triton", "mamba_ssm", "reference_chunked")
    for backend in backends:
        try:
            require_backend(backend)
            if backend != "reference_chunked" and device.type != "cuda":
                raise BackendUnavailable(f"{backend} runs on a GPU only")
        except BackendUnavailable as error:
            left_out.append(str(error).rstrip("."))
            continue
        forms.append(_scan_form(config, device, backend))
    kernels = [("cuDNN attention", SDPBackend.CUDNN_ATTENTION), ("Flash attention", SDPBackend.FLASH_ATTENTION)]
    if device.type != "cuda":
        kernels = [("SDPA", SDPBackend.MATH)]
    forms += [_attention_form(config, device, name, kernel) for name, kernel in kernels]
    return forms, left_out


def _fewest_bytes(config: RunConfig, tokens: int) -> int:
    ssm = config.model.ssm
    return 2 * tokens * (2 * config.model.ssm_num_heads * ssm.head_dim + 2 * ssm.num_groups * ssm.state_dim)


def _scan_form(config: RunConfig, device: torch.device, backend: Backend) -> Form:
    ssm, heads = config.model.ssm, config.model.ssm_num_heads
    draw_one = _draws(config, device)
    decays = -torch.linspace(1, 16, heads, device=device)

    def draw(l: int) -> list[Tensor]:
        x = draw_one(1, l, heads, ssm.head_dim)
        B, C = (draw_one(1, l, ssm.num_groups, ssm.state_dim) for _ in range(2))
        return [x, draw_one(1, l, heads), B, C]

    def mix(inputs: list[Tensor]) -> Tensor:
        x, dt, B, C = inputs
        y, _ = ssd_scan(x, dt, decays, B, C, None, dt_softplus=True, chunk_size=ssm.chunk_size, backend=backend)
        return y

    name = {"triton": "scan (ours)", "mamba_ssm": "scan (mamba-ssm)"}.get(backend, "scan (plain torch)")
    return Form(name, draw, mix, MAX_PLAIN_TOKENS if backend == "reference_chunked" else None)


def _attention_form(config: RunConfig, device: torch.device, name: str, kernel: SDPBackend) -> Form:
    draw_one = _draws(config, device)

    def draw(l: int) -> list[Tensor]:
        return [draw_one(1, config.model.num_heads, l, config.model.head_dim) for _ in range(3)]

    def mix(inputs: list[Tensor]) -> Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2])

    return Form(name, draw, mix)


def _draws(config: RunConfig, device: torch.device) -> Callable[..., Tensor]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(config.run.seed)
    return lambda *shape: torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_()


def _cell(form: Form, tokens: int, device: torch.device) -> str:
    if form.most_tokens is not None and tokens > form.most_tokens:
        return f"not run: more than {form.most_tokens:,} tokens"
    inputs = form.draw(tokens)
    gradient = torch.ones_like(form.mix(inputs))

    def forward() -> None:
        with torch.no_grad():
            form.mix(inputs)

    def both() -> None:
        torch.autograd.grad(form.mix(inputs), inputs, gradient)

    both()
    before = peak_bytes(device, reset=True)
    cell = " / ".join(f"{median_ms(call, device):.3g}" for call in (forward, both))
    if device.type != "cuda":
        return cell
    peak = (peak_bytes(device) - before) / 2**30
    replayed = " / ".join(f"{median_graph_ms(call, device):.3g}" for call in (forward, both))
    return f"{cell}, {replayed}, {peak:.2f}"
