"""The proof of equal redone steps accepts what is equal, and nothing else."""

import json

import pytest

from m4v_dist.report.claims import ClaimFailedError
from m4v_dist.report.fault import prove_redone_steps_equal, redone_steps
from m4v_dist.report.run_folder import parse_metrics


def _line(attempt: int, step: int, loss: float, norm: float = 1.0) -> str:
    row = {"attempt": attempt, "step": step, "kind": "train", "train/loss": loss, "train/grad_norm": norm}
    return json.dumps(row) + "\n"


def _first_attempt() -> str:
    return "".join(_line(1, step, 1.0 / (step + 1)) for step in range(4))


def test_equal_redone_steps_are_counted() -> None:
    text = _first_attempt() + "".join(_line(2, step, 1.0 / (step + 1)) for step in range(2, 6))
    check = prove_redone_steps_equal(parse_metrics(text), total_steps=6)
    assert check["is_equal"] and [step["step"] for step in check["redone"]] == [2, 3]


def test_a_difference_in_the_last_bit_fails() -> None:
    loss = 1.0 / 4
    text = _first_attempt() + _line(2, 3, loss + 2**-54)
    assert loss + 2**-54 != loss
    with pytest.raises(ClaimFailedError, match="step 3"):
        prove_redone_steps_equal(parse_metrics(text), total_steps=4)


def test_a_different_gradient_norm_fails() -> None:
    text = _first_attempt() + _line(2, 3, 1.0 / 4, norm=1.5)
    with pytest.raises(ClaimFailedError, match="train/grad_norm differ"):
        prove_redone_steps_equal(parse_metrics(text), total_steps=4)


@pytest.mark.parametrize(
    ("first", "second", "differing"),
    [
        (float("nan"), float("nan"), ()),
        (float("inf"), float("inf"), ()),
        (float("nan"), 1.0, ("train/loss",)),
        (1.0, float("nan"), ("train/loss",)),
        (0.0, -0.0, ("train/loss",)),
    ],
)
def test_bits_are_compared_and_not_values(first: float, second: float, differing: tuple[str, ...]) -> None:
    text = _line(1, 0, first) + _line(2, 0, second)
    assert redone_steps(parse_metrics(text))[0].differing == differing


def test_a_missing_value_equals_nothing() -> None:
    row = {"attempt": 2, "step": 0, "kind": "train", "train/loss": 1.0}
    metrics = parse_metrics(_line(1, 0, 1.0) + json.dumps(row) + "\n")
    assert redone_steps(metrics)[0].differing == ("train/grad_norm",)


def test_a_run_that_redid_nothing_fails() -> None:
    text = _first_attempt() + _line(2, 4, 0.1)
    with pytest.raises(ClaimFailedError, match="share no step"):
        prove_redone_steps_equal(parse_metrics(text), total_steps=5)


def test_a_run_that_did_not_end_fails() -> None:
    text = _first_attempt() + _line(2, 3, 1.0 / 4)
    with pytest.raises(ClaimFailedError, match="did not end"):
        prove_redone_steps_equal(parse_metrics(text), total_steps=9)


def test_a_third_attempt_is_compared_with_the_second() -> None:
    text = _first_attempt() + _line(2, 3, 1.0 / 4) + _line(3, 3, 1.0 / 4)
    assert [(s.first_attempt, s.second_attempt) for s in redone_steps(parse_metrics(text))] == [(1, 2), (2, 3)]


def test_a_torn_line_is_counted_and_no_more() -> None:
    metrics = parse_metrics(_line(1, 0, 1.0) + '{"attempt": 1, "ste\n' + _line(2, 1, 1.0))
    assert metrics.num_torn_lines == 1 and len(metrics.rows) == 2


def test_a_row_without_its_keys_is_an_error() -> None:
    with pytest.raises(ValueError, match="line 1"):
        parse_metrics('{"step": 3}\n')
