"""What a demo's run is to show, and the error of a claim that does not hold. The proof after a kill: fault.py."""

import math

from m4v_dist.errors import JobError
from m4v_dist.report.figures import held_out_points
from m4v_dist.report.run_folder import Metrics

MIN_HELD_OUT_FALL = 0.05
"""Part of the first held-out loss that the last must be below it: less may be the draw of few clips, not learning."""


class ClaimFailedError(JobError):
    """All was done, but something that the demo is to show did not hold: exit code 1."""


def prove_held_out_loss_fell(metrics: Metrics, *, num_steps: int, min_steps: int) -> str:
    """Compare the first and the last held-out loss of a run; return both as a line to show.

    Args:
        metrics: the whole metrics.jsonl.
        num_steps: optimizer steps of the run.
        min_steps: a run of fewer learns too little to be asked for a fall; the line says so.

    Raises:
        ClaimFailedError: fewer than two were measured, one is not finite, or the last is not MIN_HELD_OUT_FALL below
            the first.
    """
    points = held_out_points(metrics)
    if len(points) < 2:
        raise ClaimFailedError(f"{len(points)} held-out losses were measured; two are needed to compare.")
    (start, first), (end, last) = points[0], points[-1]
    figures = f"{first:.4f} after {start} steps, {last:.4f} after {end}"
    if not (math.isfinite(first) and math.isfinite(last)):
        raise ClaimFailedError(f"the held-out loss is not finite: {figures}.")
    shown = f"Held-out loss, on clips never trained on: {figures}"
    if num_steps < min_steps:
        return (
            f"{shown}. A run of {num_steps} steps proves nothing by it: a fall of {MIN_HELD_OUT_FALL:.0%} is asked for "
            f"from {min_steps} steps on, as the whole demo has."
        )
    if last > (1 - MIN_HELD_OUT_FALL) * first:
        raise ClaimFailedError(
            f"the held-out loss did not fall by {MIN_HELD_OUT_FALL:.0%}: {figures}; the model did not learn."
        )
    return f"{shown}: {1 - last / first:.1%} lower (asked for: {MIN_HELD_OUT_FALL:.0%})."
