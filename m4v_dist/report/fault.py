"""The proof after a kill: steps that were done twice gave the same losses, bit for bit.

metrics.jsonl is append-only and carries `attempt`, and JSON writes a float with all the digits that tell it from its
neighbours, so two losses that are equal here were equal in memory.
"""

import struct
from dataclasses import asdict, dataclass
from typing import Any

from m4v_dist.report.claims import ClaimFailedError
from m4v_dist.report.run_folder import Metrics

COMPARED_PREFIXES = ("train/loss", "train/grad_norm")
"""What a redone step must repeat: the loss, its parts by pyramid stage, and the gradient norm."""


@dataclass(frozen=True)
class RedoneStep:
    """One step that two attempts did.

    Args:
        step: the global step.
        first_attempt, second_attempt: who did it, in order.
        first_loss, second_loss: `train/loss` of each.
        differing: names of compared values that are not equal; empty is the claim to prove.
    """

    step: int
    first_attempt: int
    second_attempt: int
    first_loss: float
    second_loss: float
    differing: tuple[str, ...]


def redone_steps(metrics: Metrics) -> list[RedoneStep]:
    """All steps that a later attempt did again, compared with the attempt before it that did them."""
    found: list[RedoneStep] = []
    seen: dict[int, dict[str, Any]] = {}
    for row in metrics.of_kind("train"):
        earlier = seen.get(row["step"])
        if earlier is not None and earlier["attempt"] < row["attempt"]:
            found.append(_compare(earlier, row))
        seen[row["step"]] = row
    return found


def _compare(first: dict[str, Any], second: dict[str, Any]) -> RedoneStep:
    names = {name for name in (*first, *second) if name.startswith(COMPARED_PREFIXES)}
    differing = tuple(sorted(name for name in names if not _has_equal_bits(first.get(name), second.get(name))))
    return RedoneStep(
        step=first["step"],
        first_attempt=first["attempt"],
        second_attempt=second["attempt"],
        first_loss=first["train/loss"],
        second_loss=second["train/loss"],
        differing=differing,
    )


def _has_equal_bits(first: float | None, second: float | None) -> bool:
    """Bits, not ==: a NaN that comes again is equal, 0.0 and -0.0 are not, and a missing value equals nothing."""
    return first is not None and second is not None and struct.pack("<d", first) == struct.pack("<d", second)


def prove_redone_steps_equal(metrics: Metrics, total_steps: int) -> dict[str, Any]:
    """Check that the run was interrupted, came back, ended, and repeated its redone steps exactly.

    Args:
        metrics: the whole metrics.jsonl.
        total_steps: steps of the curriculum; each must have been done.

    Returns:
        what `fault_check.json` holds: num_redone, is_equal, redone (list of steps), attempts.

    Raises:
        ClaimFailedError: nothing was redone, a redone step differs, or steps are missing.
    """
    redone = redone_steps(metrics)
    attempts = metrics.attempts
    if not redone:
        raise ClaimFailedError(
            f"fault check: attempts {attempts} share no step, so there is nothing to compare; the kill must fall at "
            "least one step after a checkpoint and before the next."
        )
    different = [step for step in redone if step.differing]
    if different:
        lines = "; ".join(
            f"step {s.step}: {s.first_loss!r} in attempt {s.first_attempt}, {s.second_loss!r} in attempt "
            f"{s.second_attempt} ({', '.join(s.differing)} differ)"
            for s in different[:5]
        )
        raise ClaimFailedError(f"fault check: {len(different)} of {len(redone)} redone steps are not equal: {lines}.")
    num_done = len(metrics.standing_train_rows())
    if num_done != total_steps:
        raise ClaimFailedError(
            f"fault check: metrics.jsonl has train rows of {num_done} steps, the curriculum has {total_steps}; the "
            "run did not end, or logging.every_steps is not 1."
        )
    return {
        "attempts": attempts,
        "num_redone": len(redone),
        "is_equal": True,
        "redone": [asdict(step) for step in redone],
    }
