"""What the demo claims of the held-out loss holds where it fell by the stated margin, and nowhere else."""

import json

import pytest

from m4v_dist.report.claims import ClaimFailedError, prove_held_out_loss_fell
from m4v_dist.report.run_folder import Metrics, parse_metrics


def _held_out(*losses: float) -> Metrics:
    rows = [
        {"attempt": 1, "step": 40 * index, "kind": "held_out", "validation/held_out_loss": loss}
        for index, loss in enumerate(losses)
    ]
    return parse_metrics("".join(json.dumps(row) + "\n" for row in rows))


def test_the_first_and_last_held_out_loss_are_shown() -> None:
    shown = prove_held_out_loss_fell(_held_out(0.5, 0.6, 0.25), num_steps=80, min_steps=80)
    assert "0.5000 after 0 steps, 0.2500 after 80: 50.0% lower (asked for: 5%)" in shown


def test_a_fall_of_5_percent_is_enough_and_less_is_not() -> None:
    shown = prove_held_out_loss_fell(_held_out(0.5, 0.4749), num_steps=80, min_steps=80)
    assert "5.0% lower" in shown
    with pytest.raises(ClaimFailedError, match="did not fall by 5%: 0.5000 after 0 steps, 0.4751 after 40"):
        prove_held_out_loss_fell(_held_out(0.5, 0.4751), num_steps=80, min_steps=80)


@pytest.mark.parametrize("losses", [(0.5, 0.4, 0.5), (0.5, 0.3, 0.6)])
def test_a_short_run_shows_its_figures_and_proves_nothing(losses: tuple[float, ...]) -> None:
    shown = prove_held_out_loss_fell(_held_out(*losses), num_steps=79, min_steps=80)
    assert f"{losses[-1]:.4f} after 80" in shown and "A run of 79 steps proves nothing by it" in shown
    with pytest.raises(ClaimFailedError, match="the model did not learn"):
        prove_held_out_loss_fell(_held_out(*losses), num_steps=80, min_steps=80)


@pytest.mark.parametrize("losses", [(0.5, float("nan")), (float("inf"), 0.5), (0.5,), ()])
def test_a_loss_that_is_missing_or_not_finite_fails_however_short_the_run(losses: tuple[float, ...]) -> None:
    for num_steps in (79, 80):
        with pytest.raises(ClaimFailedError, match=r"not finite|two are needed"):
            prove_held_out_loss_fell(_held_out(*losses), num_steps=num_steps, min_steps=80)


def test_a_claim_that_did_not_hold_is_exit_1() -> None:
    assert ClaimFailedError.exit_code == 1
