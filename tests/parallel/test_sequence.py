"""Rows, tails and states between sequence ranks, on two and three gloo ranks, against one rank and against Ulysses."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from m4v_dist.blocks.cut_scan import cut_conv1d, cut_ssd_scan
from m4v_dist.kernels.conv1d import causal_conv1d
from m4v_dist.kernels.scan import ssd_scan
from m4v_dist.parallel.mesh import Mesh, SequenceGroup
from m4v_dist.parallel.sequence import (
    Handover,
    exchange,
    hand_state,
    hand_tail,
    heads_to_tokens,
    share_rows,
    tie,
    tokens_to_heads,
)
from tests.trainer.ranks import run_ranks

HEADS, WIDTH, GROUPS, STATE, TAPS = 6, 4, 1, 5, 4
SEGMENTS = [7, 30, 1, 5]
"""Tokens of each segment."""
CUTS = {2: [0, 21, 43], 3: [0, 9, 11, 43]}
"""Tokens of three ranks: the second holds two in the middle of a segment, so the third's tail lies on two ranks."""


def _handover(sequence: SequenceGroup) -> tuple[Handover, list[int]]:
    """Where the cuts go, and this rank's own segment starts."""
    starts = [sum(SEGMENTS[:number]) for number in range(len(SEGMENTS) + 1)]
    entering, leaving, first, last = [], [], [], []
    for start, stop in pairwise(CUTS[sequence.size]):
        inside = [start, *(s for s in starts if start < s < stop), stop]
        owner = sum(s <= start for s in starts) - 1
        end = sum(s < stop for s in starts) - 1
        entering.append(None if start in starts else owner)
        leaving.append(None if stop in starts else end)
        first.append(inside[1] - inside[0])
        last.append(inside[-1] - inside[-2])
        if len(entering) == sequence.rank + 1:
            own = [s - start for s in inside]
    return Handover(sequence, tuple(entering), tuple(leaving), tuple(first), tuple(last)), own


def _inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    length = sum(SEGMENTS)
    shapes = {
        "x": (1, length, HEADS, WIDTH), "dt": (1, length, HEADS), "B": (1, length, GROUPS, STATE),
        "C": (1, length, GROUPS, STATE), "A": (HEADS,), "D": (HEADS,), "dt_bias": (HEADS,),
        "taps": (HEADS * WIDTH, TAPS), "bias": (HEADS * WIDTH,),
    }  # fmt: skip
    values = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    # Slow decays, so that a state reaches far.
    return values | {"A": -0.1 * values["A"].exp(), "dt_bias": values["dt_bias"] - 2}


def _loss(y: Tensor, start: int) -> Tensor:
    """Another weight for each token and channel."""
    rows = torch.arange(start, start + y.shape[1], dtype=torch.float32)
    return (torch.sin(rows[None, :, None, None] + torch.arange(y.shape[-1])) * y).sum()


def _convolved(values: dict[str, Tensor], cu_seqlens: Tensor, handover: Handover | None) -> Tensor:
    x = values["x"].flatten(2)
    if handover is None:
        return causal_conv1d(x, values["taps"], values["bias"], cu_seqlens=cu_seqlens).view_as(values["x"])
    out = cut_conv1d(x, values["taps"], values["bias"], cu_seqlens=cu_seqlens, handover=handover)
    return out.view_as(values["x"])


def _scanned(values: dict[str, Tensor], x: Tensor, cu_seqlens: Tensor, handover: Handover | None) -> Tensor:
    return cut_ssd_scan(
        x, values["dt"], values["A"], values["B"], values["C"], values["D"], dt_bias=values["dt_bias"],
        cu_seqlens=cu_seqlens, initial_state=None, handover=handover, chunk_size=8, backend="reference_chunked",
    )  # fmt: skip


def _ulysses_scanned(values: dict[str, Tensor], x: Tensor, sequence: SequenceGroup) -> Tensor:
    """The slow twin: each rank scans all tokens of its heads."""
    lengths = [stop - start for start, stop in pairwise(CUTS[sequence.size])]
    share = HEADS // sequence.size
    heads = slice(sequence.rank * share, (sequence.rank + 1) * share)

    def all_tokens(tokens: Tensor) -> Tensor:
        return tokens_to_heads(tokens, lengths, sequence)

    B, C = (values[name][0].repeat_interleave(HEADS, dim=1) for name in ("B", "C"))
    starts = [sum(SEGMENTS[:number]) for number in range(len(SEGMENTS) + 1)]
    y, _ = ssd_scan(
        all_tokens(x[0])[None], all_tokens(values["dt"][0])[None], values["A"][heads], all_tokens(B)[None],
        all_tokens(C)[None], values["D"][heads], dt_bias=values["dt_bias"][heads], dt_softplus=True,
        cu_seqlens=torch.tensor(starts, dtype=torch.int32), chunk_size=8, backend="reference_chunked",
    )  # fmt: skip
    return heads_to_tokens(y[0], lengths, sequence)[None]


def _one_rank() -> tuple[Tensor, dict[str, Tensor]]:
    values = {name: value.requires_grad_() for name, value in _inputs().items()}
    starts = torch.tensor([sum(SEGMENTS[:number]) for number in range(len(SEGMENTS) + 1)], dtype=torch.int32)
    y = _scanned(values, _convolved(values, starts, None), starts, None)
    _loss(y, 0).backward()
    return y.detach(), {name: value.grad for name, value in values.items()}  # type: ignore[misc]


def cut_on_rank(form: str) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's y, and gradients: of its own tokens, and of parameters summed over ranks."""
    sequence = Mesh.of_process_group(use_gpu=False, sequence_size=torch.distributed.get_world_size()).sequence
    start, stop = CUTS[sequence.size][sequence.rank : sequence.rank + 2]
    values = _inputs()
    for name in ("x", "dt", "B", "C"):
        values[name] = values[name][:, start:stop].contiguous()
    values = {name: value.requires_grad_() for name, value in values.items()}
    handover, own = _handover(sequence)
    starts = torch.tensor(own, dtype=torch.int32)
    x = _convolved(values, starts, handover)
    y = _scanned(values, x, starts, handover) if form == "states" else _ulysses_scanned(values, x, sequence)
    _loss(y, start).backward()
    gradients = {name: value.grad.clone() for name, value in values.items()}  # type: ignore[union-attr]
    for name in gradients.keys() - {"x", "dt", "B", "C"}:
        torch.distributed.all_reduce(gradients[name])
    return y.detach(), gradients


@pytest.mark.parametrize("form", ["states", "ulysses"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_states_handed_on_and_heads_exchanged_both_give_the_scan_of_one_rank(num_ranks: int, form: str) -> None:
    """float32, and sums in another order: 1e-5 of the largest."""
    y, gradients = _one_rank()
    answers = run_ranks(cut_on_rank, num_ranks, form)
    torch.testing.assert_close(torch.cat([answer[0] for answer in answers], dim=1), y, rtol=1e-5, atol=1e-5)
    for name, expected in gradients.items():
        if name in ("x", "dt", "B", "C"):
            found = torch.cat([answer[1][name] for answer in answers], dim=1)
        else:
            found = answers[0][1][name]
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5, name


def primitives_on_rank() -> dict[str, Tensor]:
    """What each primitive gives and sends back, on two ranks."""
    mesh = Mesh.of_process_group(use_gpu=False, sequence_size=2)
    sequence, rank = mesh.sequence, mesh.rank
    rows = torch.arange(3.0 + rank)[:, None].expand(-1, 2).contiguous() + 10 * rank
    rows.requires_grad_()
    got = exchange(rows, ((1, 2), (4, 0)), sequence)
    (got * torch.tensor([[1.0, 100.0]]) * (rank + 1)).sum().backward()
    answers = {"got": got.detach(), "sent_back": rows.grad.clone()}  # type: ignore[union-attr]
    rows.grad = None
    shared = share_rows(rows, [3, 4], sequence)
    shared.square().sum().backward()
    answers |= {"shared": shared.detach(), "own": rows.grad.clone(), "rows": rows.detach()}  # type: ignore[union-attr]
    bfloat16 = exchange(rows.detach().bfloat16(), ((0, 3), (4, 0)), sequence)
    return answers | {"bfloat16": bfloat16, "nothing": exchange(rows[:0], ((0, 0), (0, 0)), sequence).detach()}


def test_rows_go_where_the_counts_say_and_gradients_come_back() -> None:
    first, second = run_ranks(primitives_on_rank, 2)
    assert first["got"][:, 0].tolist() == [0, 10, 11, 12, 13]
    assert second["got"][:, 0].tolist() == [1, 2]
    assert first["sent_back"].tolist() == [[1, 100], [2, 200], [2, 200]]
    assert second["sent_back"].tolist() == [[1, 100]] * 4
    for answer in (first, second):
        assert answer["shared"][:, 1].tolist() == [0, 1, 2, 10, 11, 12, 13]
        # of this rank's loss alone: every rank has the whole loss, and it counts once
        assert torch.equal(answer["own"], 2 * answer["rows"])
        assert answer["nothing"].shape == (0, 2)
    assert first["bfloat16"].dtype == torch.bfloat16
    assert first["bfloat16"][:, 0].tolist() == [10, 11, 12, 13]


def test_a_tail_may_lie_on_several_ranks() -> None:
    handover = Handover(SequenceGroup(2, 3), (None, 1, 1), (1, 1, None), (2, 2, 30), (2, 2, 1))
    assert handover.tail_counts(3) == ((0, 2, 1), (0, 0, 2), (0, 0, 0))
    assert handover.tail_counts(None) == ((0, 2, 2), (0, 0, 2), (0, 0, 0))
    assert handover.state_counts() == ((0, 1, 1), (0, 0, 1), (0, 0, 0))
    assert handover.is_entered and handover.is_cut and handover.num_entered == 30 and handover.num_left == 1


def test_where_no_cut_goes_through_a_segment_nothing_is_sent() -> None:
    handover = Handover(SequenceGroup(0, 2), (None, None), (None, None), (2, 3), (2, 3))
    assert not handover.is_cut
    assert hand_tail(torch.zeros(2, 4), 3, handover).shape == (0, 4)


def _compiled_job() -> list[tuple[Tensor, Tensor]]:
    """Tail and state over a cut, forward and backward: in eager, and as each rank compiles it for itself."""
    sequence = Mesh.of_process_group(use_gpu=False, sequence_size=2).sequence
    handover = Handover(sequence, (None, 0), (0, None), (5, 4), (5, 4))

    def body(tokens: Tensor) -> Tensor:
        tail = hand_tail(tokens, 3, handover)
        entering = hand_state(-tokens.abs().sum()[None], tokens.sum(0), handover)
        if handover.is_entered:
            return tokens + tail.sum(0) + entering
        return tie(tie(tokens, tail), entering)

    answers = []
    for function in (body, torch.compile(body, backend="aot_eager", dynamic=True)):
        tokens = torch.arange(10.0).view(5, 2)[sequence.rank :].clone().requires_grad_()
        answer = function(tokens)
        answer.square().sum().backward()
        assert tokens.grad is not None
        answers.append((answer.detach(), tokens.grad))
    return answers


def test_what_ranks_hand_on_does_not_depend_on_what_each_of_them_compiles() -> None:
    for eager, compiled in run_ranks(_compiled_job, 2):
        for one, other in zip(eager, compiled, strict=True):
            assert torch.equal(one, other)
