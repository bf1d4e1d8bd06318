"""The fault matrix: each fault under each ZeRO stage, in the 31-latent (241-frame) stage of `tiny`, on two Ray workers.

A run that a fault was done to must end, and end where the undisturbed one ends: every row's loss and gradient norm,
redone steps included, then weights, average and all that was saved with them. docs/faults.md says what each fault is,
and holds the table that this writes. Part of `make chaos`, and no part of `make test`.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos.fault_table import cells, cost_of
from tests.chaos.faults import FAULTS, NEEDS_ROOT, Outcome, Scene, can_mount
from tests.chaos.long_run import (
    LEFT_OUT_STEP,
    NUM_RANKS,
    References,
    distance,
    long_config,
    make_long_cache,
    train_here,
    train_references,
)
from tests.chaos.nodes import Nodes, nodes
from tests.integration.small_run import rows
from tests.object_store_server import Outage, object_store, store_environment

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.slow]

TOLERANCE = 1e-5
"""Where a run ends on fewer ranks: its sums are taken in another order."""
EXIT_CODES = {"SIGTERM, submitted again": (5, 0), "second driver": (2, 0)}


@dataclass(frozen=True)
class Stage:
    """What all runs of one ZeRO stage share."""

    zero_stage: int
    cluster: Nodes
    cache: str
    base: Path
    references: References
    store: tuple[str, Outage]


@pytest.fixture(scope="module", params=[1, 2, 3], ids="zero{}".format)
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A cluster of a head and two nodes, a store, a cache, and the runs that nothing happens to."""
    base = tmp_path_factory.mktemp(f"zero{request.param}")
    cache = make_long_cache(str(base / "cache"))
    references = train_references(base, cache, request.param)
    with pytest.MonkeyPatch.context() as patch, object_store(patch) as (bucket, outage):
        port = int(bucket.rpartition("-")[2])
        with nodes(NUM_RANKS, store_environment(port)) as (cluster, _):
            yield Stage(request.param, cluster, cache, base, references, (bucket, outage))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_ends_on_the_curve_through(fault: str, stage: Stage, fault_rows: list[list[str]]) -> None:
    if fault in NEEDS_ROOT and not can_mount():
        fault_rows.append(cells(fault, stage.zero_stage, "not run: needs root", None, (), ""))
        pytest.skip("needs root, to mount a small disk")
    stage.cluster.complete(NUM_RANKS)
    base = stage.base / fault.replace(" ", "-").replace(",", "")
    base.mkdir()
    try:
        outcome = FAULTS[fault](Scene(stage.cluster, base, stage.cache, stage.zero_stage, stage.store))
        ended = _ended(fault, outcome, str(base / "run"), stage)
        cost = cost_of(str(base / "run"), outcome.fault_time)
        assert cost.num_attempts == outcome.num_attempts
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        fault_rows.append(cells(fault, stage.zero_stage, "FAILED", None, (), reason))
        raise
    fault_rows.append(cells(fault, stage.zero_stage, ended, cost, outcome.exit_codes, outcome.seen))
    print(fault_rows[-1])
    shutil.rmtree(base)


def _ended(fault: str, outcome: Outcome, folder: str, stage: Stage) -> str:
    """Hold the run to its curve; say how close it is."""
    assert outcome.exit_codes == EXIT_CODES.get(fault, (0,))
    reference = getattr(stage.references, outcome.reference)
    found = distance(folder, reference, checkpoints=outcome.checkpoints, but=outcome.but)
    if outcome.num_ranks == NUM_RANKS:
        assert found.is_bit_identical, found
    # A run that misses a single step is far outside.
    assert found.largest <= TOLERANCE, found
    if outcome.reference == "left_out":
        return "bit-identical to a run told to leave that step out"
    if found.is_bit_identical:
        return "bit-identical"
    if max(found.loss, found.weights, found.average) == 0.0:
        return f"bit-identical but for gradient norms (within {found.norm:.0e})"
    return f"within {found.largest:.0e} (at most {TOLERANCE:.0e})"


def test_a_run_that_misses_one_step_is_not_on_the_curve(stage: Stage) -> None:
    """The comparison can fail: the mildest wrong weights are a hundred tolerances away."""
    found = distance(stage.references.left_out, stage.references.undisturbed)
    assert not found.is_bit_identical
    assert min(found.loss, found.weights, found.average) > 100 * TOLERANCE, found
    losses, others = (
        [row["train/loss"] for row in rows(folder, "train")]
        for folder in (stage.references.undisturbed, stage.references.left_out)
    )
    assert losses[: LEFT_OUT_STEP + 1] == others[: LEFT_OUT_STEP + 1], "they are one run until then"


@pytest.mark.parametrize("stage", [2], indirect=True, ids="zero{}".format)
def test_a_run_of_another_seed_is_not_on_the_curve(stage: Stage) -> None:
    folder = str(stage.base / "other_seed")
    train_here(long_config(folder, stage.cache, stage.zero_stage, seed=8))
    found = distance(folder, stage.references.undisturbed)
    assert not found.is_bit_identical and found.largest > 1000 * TOLERANCE, found
