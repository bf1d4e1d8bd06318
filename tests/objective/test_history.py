"""Unit choice, history layout, token counts and history noise."""

import re
from collections import Counter

import pytest
import torch

from m4v_dist.objective.history import (
    add_history_noise,
    choose_unit,
    choose_unit_of_reference,
    history_clips,
    history_layout,
    history_noise_ceiling,
    num_segment_tokens,
)
from tests.conftest import load_golden


def _golden_choices() -> list[tuple[int, int, int, list[list[int]]]]:
    table = load_golden("pyramid_schedule")[0]["unit_choice"]["table"]
    rows = []
    for key, calls in table.items():
        match = re.fullmatch(r"T=(\d+),G=(\d+),rank=(\d+)", key)
        assert match is not None, key
        rows.append((int(match[1]), int(match[2]), int(match[3]), calls))
    return rows


def test_unit_choice_of_reference_equals_the_golden_table() -> None:
    for num_units, group_size, rank, calls in _golden_choices():
        for call, expected in enumerate(calls, start=1):
            ours = [choose_unit_of_reference(num_units, group_size, rank, call, stage, 3) for stage in range(3)]
            assert ours == expected, (num_units, group_size, rank, call)


def test_unit_choice_equals_the_golden_table_where_the_group_divides_the_clip() -> None:
    checked = 0
    for num_units, group_size, rank, calls in _golden_choices():
        if num_units % group_size:
            continue
        for call, expected in enumerate(calls, start=1):
            assert [choose_unit(num_units, group_size, rank, call, stage, 3) for stage in range(3)] == expected
            checked += 1
    assert checked


@pytest.mark.parametrize(
    ("num_units", "group_size"), [(1, 1), (1, 8), (3, 2), (3, 8), (8, 4), (16, 8), (31, 8), (31, 1)]
)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_unit_choice_trains_every_unit_equally_often(num_units: int, group_size: int, stage: int) -> None:
    counts = Counter(
        choose_unit(num_units, group_size, member, turn, stage, 3)
        for turn in range(num_units)
        for member in range(group_size)
    )
    assert counts == dict.fromkeys(range(1, num_units + 1), group_size)


@pytest.mark.parametrize(("num_units", "group_size"), [(31, 8), (3, 2), (16, 8)])
def test_unit_choice_covers_the_clip_in_as_few_turns_as_can_be(num_units: int, group_size: int) -> None:
    turns = -(-num_units // group_size)
    units = {choose_unit(num_units, group_size, m, turn, 2, 3) for turn in range(turns) for m in range(group_size)}
    assert units == set(range(1, num_units + 1))


def test_reference_never_trains_the_last_units_of_a_ragged_clip_at_the_finest_stage() -> None:
    """Why `choose_unit` is not the reference's: 31 latents in groups of 8."""
    units = {choose_unit_of_reference(31, 8, member, turn, 2, 3) for turn in range(31) for member in range(8)}
    assert units == set(range(1, 25))


def test_reference_choice_refuses_a_clip_shorter_than_its_group() -> None:
    with pytest.raises(ValueError, match="use choose_unit"):
        choose_unit_of_reference(3, 8, 0, 0, 2, 3)


def test_one_stage_walks_upwards() -> None:
    assert [choose_unit(4, 2, member, 1, 0, 1) for member in range(2)] == [3, 4]


def test_rows_of_a_group_are_balanced_in_tokens() -> None:
    """Model facts at 768p, 32 latents: rows of [low, mid, mid, high] hold 17,760 to 33,120 tokens, never 41,520."""
    rows = []
    for turn in range(4):
        for member in range(8):
            columns = [(stage, choose_unit(32, 8, member, turn, stage, 3)) for stage in (0, 1, 1, 2)]
            rows.append(sum(num_segment_tokens(unit, stage, 3, (96, 160), 2) for stage, unit in columns))
    assert (min(rows), max(rows)) == (17_760, 33_120)


@pytest.mark.parametrize(
    ("unit", "grid", "expected"),
    [
        (1, (48, 80), (60, 240, 960)),
        (8, (48, 80), (480, 840, 2_460)),
        (16, (48, 80), (960, 1_320, 2_940)),
        (31, (48, 80), (1_860, 2_220, 3_840)),
        (1, (96, 160), (240, 960, 3_840)),
        (8, (96, 160), (1_920, 3_360, 9_840)),
        (16, (96, 160), (3_840, 5_280, 11_760)),
        (31, (96, 160), (7_440, 8_880, 15_360)),
    ],
)
def test_token_counts_equal_the_reference_packing(
    unit: int, grid: tuple[int, int], expected: tuple[int, int, int]
) -> None:
    assert tuple(num_segment_tokens(unit, stage, 3, grid, 2) for stage in range(3)) == expected


def test_token_count_refuses_a_grid_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="level 0"):
        num_segment_tokens(1, 0, 3, (10, 8), 2)
    with pytest.raises(ValueError, match="patch_size=2"):
        num_segment_tokens(1, 0, 3, (12, 8), 2)
    with pytest.raises(ValueError, match="numbered from 1"):
        num_segment_tokens(0, 0, 3, (16, 16), 2)


def test_history_is_coarser_the_older_it_is() -> None:
    assert history_layout(0, 2) == ()
    assert history_layout(1, 2) == ((2, 1),)
    assert history_layout(2, 2) == ((1, 1), (2, 1))
    assert history_layout(5, 2) == ((0, 3), (1, 1), (2, 1))
    assert history_layout(5, 1) == ((0, 4), (1, 1))
    assert history_layout(1, 0) == ((0, 1),)
    assert history_layout(5, 0) == ((0, 4), (0, 1))


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("num_history", [0, 1, 2, 3, 6])
def test_history_clips_hold_each_past_latent_once_in_order(num_history: int, stage: int) -> None:
    latents = torch.arange(float(num_history)).reshape(1, num_history, 1, 1).expand(2, num_history, 8, 16)
    clips, levels = history_clips(latents, stage, 3)
    seen = [float(frame.mean()) for clip in clips for frame in clip[0]]
    assert seen == list(range(num_history))
    grids = [(8 // 2 ** (2 - level), 16 // 2 ** (2 - level)) for level in levels]
    assert [tuple(clip.shape[2:]) for clip in clips] == grids
    tokens = sum(clip[0].numel() for clip in clips) + (8 // 2 ** (2 - stage)) * (16 // 2 ** (2 - stage))
    assert tokens == num_segment_tokens(num_history + 1, stage, 3, (8, 16), 1)


def test_history_noise_ceiling_grows_linearly_and_stays() -> None:
    ceilings = [history_noise_ceiling(step, 0.3, 100) for step in (0, 50, 100, 1000)]
    assert ceilings == pytest.approx([0.0, 0.15, 0.3, 0.3])
    assert history_noise_ceiling(0, 0.3, 0) == 0.3


def test_history_noise_is_a_mixture_of_clip_and_noise() -> None:
    clip, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    (mixed,) = add_history_noise([clip], [noise], 0.25)
    torch.testing.assert_close(mixed, 0.25 * noise + 0.75 * clip)
    with pytest.raises(ValueError, match="draw one for each"):
        add_history_noise([clip], [noise[:, :1]], 0.25)


def test_history_noise_by_index_grows_over_all_latents_up_to_the_level() -> None:
    """Latent j of i gets level * (j + 1) / i, counted over the clips, whatever their grids."""
    clips = [torch.zeros(2, 3, 2, 2), torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 8, 8)]
    noise = [torch.ones_like(clip) for clip in clips]
    mixed = add_history_noise(clips, noise, 0.5, is_by_index=True)
    fractions = [float(latent.mean()) for clip in mixed for latent in clip.unbind(1)]
    assert fractions == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    clean = add_history_noise(noise, clips, 0.5, is_by_index=True)
    assert [float(latent.mean()) for clip in clean for latent in clip.unbind(1)] == pytest.approx(
        [0.9, 0.8, 0.7, 0.6, 0.5]
    )


def test_history_noise_of_one_latent_is_the_same_in_both_readings() -> None:
    clip, noise = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    (by_index,) = add_history_noise([clip], [noise], 0.25, is_by_index=True)
    torch.testing.assert_close(by_index, add_history_noise([clip], [noise], 0.25)[0])
    assert add_history_noise([], [], 0.25, is_by_index=True) == ()


def _rows_of_every_member(num_units: int, group_size: int, num_stages: int) -> list[list[int]]:
    """Units of each stage, per turn and member, over as many turns as it takes until the walk repeats."""
    return [
        [choose_unit(num_units, group_size, member, turn, stage, num_stages) for stage in range(num_stages)]
        for turn in range(num_units)
        for member in range(group_size)
    ]


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 5, 8, 16])
def test_every_unit_meets_every_stage_equally_often_for_any_length(group_size: int, num_stages: int) -> None:
    """Lengths up to the paper's 31 latents and past it, whether or not the group divides them."""
    for num_units in range(1, 34):
        rows = _rows_of_every_member(num_units, group_size, num_stages)
        for stage in range(num_stages):
            counts = Counter(row[stage] for row in rows)
            assert counts == dict.fromkeys(range(1, num_units + 1), group_size), (num_units, stage)


@pytest.mark.parametrize("group_size", [1, 3, 4, 8, 16])
def test_rows_stay_balanced_in_tokens_for_any_length(group_size: int) -> None:
    """A row of [low, mid, mid, high] stays far from one whose columns are all at the last unit.

    The finest column's unit u meets the coarser ones' T + 1 - u, wherever the turn stands: one long history a row.
    """
    for num_units in range(1, 34):
        rows = _rows_of_every_member(num_units, group_size, 3)
        assert all(row[0] == row[1] == num_units + 1 - row[2] for row in rows)
        tokens = [sum(num_segment_tokens(row[stage], stage, 3, (48, 80), 2) for stage in (0, 1, 1, 2)) for row in rows]
        worst = sum(num_segment_tokens(num_units, stage, 3, (48, 80), 2) for stage in (0, 1, 1, 2))
        assert max(tokens) <= worst
        if num_units >= 8:
            assert max(tokens) < 0.9 * worst and max(tokens) < 2 * min(tokens)
