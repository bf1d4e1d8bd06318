"""Mixture: shares follow the weights, draws depend on the step alone, slots are packed evenly."""

import random
from collections import Counter

import pytest

from data_pipeline.mixture import Cursor, Mixture, Walk, pack_slots, spread_slots
from m4v_dist.batch import derive_seed

WALKS = {"vid": Walk("vid@x", 11, True), "img": Walk("img@x", 17, False)}


def make_mixture(weights: dict[str, float], seed: int = 1) -> Mixture:
    return Mixture(seed, derive_seed, weights=weights, walks={n: WALKS[n] for n in weights}, num_groups=4, group_size=3)


def test_shares_follow_the_weights() -> None:
    mixture = make_mixture({"vid": 3.0, "img": 1.0})
    cursors: dict[str, Cursor] = {}
    counts: Counter[str] = Counter()
    for step in range(500):
        picks, cursors = mixture.plan(step, cursors)
        counts.update(pick.source for pick in picks)
    # 2000 groups, p = 0.75: four standard deviations are 0.039
    assert counts["vid"] / counts.total() == pytest.approx(0.75, abs=0.039)


def _pack_by_the_rule(num_tokens: list[int], num_bins: int) -> list[list[int]]:
    """As `pack_slots` says it, in time of slots times bins."""
    room = -(-len(num_tokens) // num_bins)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for slot in sorted(range(len(num_tokens)), key=lambda slot: (-num_tokens[slot], slot)):
        open_bins = [members for members in bins if len(members) < room]
        # The first of equal ones.
        min(open_bins, key=lambda members: sum(num_tokens[other] for other in members)).append(slot)
    return [sorted(members) for members in bins]


@pytest.mark.parametrize("seed", range(20))
def test_packing_is_the_stated_rule_for_any_number_of_slots_and_bins(seed: int) -> None:
    draw = random.Random(seed)
    # Few sizes, so that loads are often equal.
    tokens = [draw.choice([0, 3, 3, 5, 8, 1000]) for _ in range(draw.randint(1, 60))]
    num_bins = draw.randint(1, 25)
    assert pack_slots(tokens, num_bins) == _pack_by_the_rule(tokens, num_bins)


def test_a_step_planned_alone_equals_the_step_in_a_row() -> None:
    mixture = make_mixture({"vid": 3.0, "img": 1.0})
    cursors: dict[str, Cursor] = {}
    for step in range(9):
        before = dict(cursors)
        picks, cursors = mixture.plan(step, cursors)
    assert make_mixture({"img": 1.0, "vid": 3.0}).plan(8, before) == (picks, cursors)


def test_a_shared_walk_moves_once_a_group_and_another_once_a_slot() -> None:
    _, cursors = make_mixture({"vid": 1.0}).plan(0, {})
    assert cursors == {"vid@x": Cursor(0, 4)}
    _, cursors = make_mixture({"img": 1.0}).plan(0, {"img@x": Cursor(0, 10)})
    assert cursors == {"img@x": Cursor(1, 5)}


def test_weights_that_change_let_each_walk_go_on_where_it_stood() -> None:
    """As between two curriculum stages: an epoch of each source holds each record once, across the change."""
    cursors: dict[str, Cursor] = {}
    rows: dict[str, list[int]] = {"vid": [], "img": []}
    for step in range(24):
        weights = {"vid": 5.0, "img": 1.0} if step < 11 else {"vid": 1.0, "img": 2.0}
        picks, cursors = make_mixture(weights).plan(step, cursors)
        rows["vid"] += [pick.row for pick in picks if pick.source == "vid" and pick.member == 0]
        rows["img"] += [pick.row for pick in picks if pick.source == "img"]
    for source, taken in rows.items():
        size = WALKS[source].num_rows
        epochs = [taken[at : at + size] for at in range(0, len(taken) - size, size)]
        assert len(epochs) > 2 and all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_a_step_of_ten_million_records_needs_no_table() -> None:
    """Positions are asked for alone: no part of a plan grows with the number of records."""
    walk = Walk("vid@x", 10_000_000, False)
    mixture = Mixture(1, derive_seed, weights={"vid": 1.0}, walks={"vid": walk}, num_groups=4, group_size=3)
    picks, cursors = mixture.plan(0, {"vid@x": Cursor(3, 9_999_995)})
    assert cursors == {"vid@x": Cursor(4, 7)}
    assert len({pick.row for pick in picks[:5]}) == 5 and all(0 <= pick.row < 10_000_000 for pick in picks)
    assert not [value for value in vars(mixture).values() if isinstance(value, list | dict) and len(value) > 3]


def test_another_seed_gives_another_order() -> None:
    rows = [[pick.row for pick in make_mixture({"img": 1.0}, seed).plan(0, {})[0]] for seed in (1, 2)]
    assert rows[0] != rows[1]


def test_packed_bins_are_full_even_and_hold_each_slot_once() -> None:
    tokens = [960, 60, 60, 60, 240, 240, 900, 60, 60, 240, 960, 60]
    bins = pack_slots(tokens, 4)
    assert sorted(slot for members in bins for slot in members) == list(range(12))
    assert {len(members) for members in bins} == {3}
    loads = [sum(tokens[slot] for slot in members) for members in bins]
    assert max(loads) - min(loads) < 960
    assert max(loads) <= 1080


def test_ranks_get_a_full_and_an_empty_micro_batch_each_and_all_slots_once() -> None:
    """Half of the slots are long: packed in order, the first ranks would have two full micro-batches each."""
    tokens = [1000 + slot for slot in range(8)] + [10 + slot for slot in range(8)]
    ranks = spread_slots(tokens, 4, 4)
    assert [len(rank) for rank in ranks] == [4] * 4
    assert sorted(slot for rank in ranks for members in rank for slot in members) == list(range(16))
    loads = [sum(tokens[slot] for members in rank for slot in members) for rank in ranks]
    assert max(loads) - min(loads) < 10
    first_four = pack_slots(tokens, 16)[:4]
    assert sum(tokens[slot] for members in first_four for slot in members) > max(loads) + 1000


def test_the_nth_micro_batches_of_all_ranks_are_alike() -> None:
    """Under ZeRO-3 the ranks wait for one another in each of them."""
    tokens = [1000 + slot for slot in range(8)] + [10 + slot for slot in range(8)]
    for row in zip(*spread_slots(tokens, 4, 4), strict=True):
        loads = [sum(tokens[slot] for slot in members) for members in row]
        assert max(loads) - min(loads) < 10
