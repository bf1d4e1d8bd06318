"""Nodes come and go under a run: lost without a word, announced and then lost, added. Each run ends on the undisturbed
one's losses, within the tolerance of sums in another order.

Minutes long, so no part of `make test`: python -m pytest -s -m chaos tests/chaos. Prints how long each recovery took.
"""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from m4v_dist.config.load import config_to_json, parse_config
from m4v_dist.trainer import checkpoint
from tests.chaos.nodes import driver, nodes, steps_of, wait_for
from tests.integration.small_run import make_small_cache, rows, small_values, to_toml, train_each
from tests.trainer.ranks import run_ranks

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.slow]

MANY_STEPS = 5000
"""More than the run will do: it is ended by SIGTERM once all has happened."""


def run_values(folder: str, cache: str, *, num_steps: int, **launch: Any) -> dict[str, Any]:
    values = small_values(folder, cache, checkpoint_every_steps=10, keep_last=1000, held_out_slots=0)
    values["curriculum"][1]["num_steps"] = num_steps
    # Small, so that what is left of two orders of summation does not grow over hundreds of steps.
    values["curriculum"][1]["learning_rate"] = 1e-5
    values["launch"] = {"num_workers": 2, "min_workers": 1, "resize_check_s": 3.0, "stop_margin_s": 5.0, **launch}
    return values


def write_config(path: Path, values: dict[str, Any]) -> str:
    config = parse_config(values, where="chaos")
    path.write_text(to_toml(config.model_dump(mode="json", exclude_none=True)))
    return str(path)


def _undisturbed(base: Path, cache: str, num_steps: int) -> dict[int, float]:
    """Losses of the same run on two ranks that nothing happens to."""
    folder = str(base / "undisturbed")
    config = parse_config(run_values(folder, cache, num_steps=num_steps - 2), where="chaos")
    assert run_ranks(train_each, 2, [config_to_json(config)], timeout_s=900) == [[num_steps]] * 2
    return {row["step"]: row["train/loss"] for row in rows(folder, "train")}


def _assert_on_the_curve(folder: str, base: Path, cache: str) -> None:
    done = checkpoint.step_of(str(checkpoint.newest_committed(f"{folder}/checkpoints")))
    expected = _undisturbed(base, cache, done)
    found = rows(folder, "train")
    assert {row["step"] for row in found} >= set(range(done)), "a step was skipped"
    for row in found:
        if row["step"] in expected:
            assert row["train/loss"] == pytest.approx(expected[row["step"]], rel=1e-3), row


def _restarts(folder: str) -> list[tuple[int, int]]:
    return [(row["world_size_before"], row["world_size"]) for row in rows(folder, "restart")]


def test_a_run_goes_on_with_the_node_that_is_left_and_grows_back_when_one_is_added(tmp_path: Path) -> None:
    folder, log = str(tmp_path / "run"), tmp_path / "driver.log"
    cache = make_small_cache(str(tmp_path / "cache"))
    config = write_config(tmp_path / "run.toml", run_values(folder, cache, num_steps=MANY_STEPS, max_failures=1))
    with nodes(2) as (cluster, each), driver(config, cluster.env, log) as process:
        wait_for("steps on two ranks", lambda: len(steps_of(folder, 1)) >= 15, process, log)
        cluster.lose(each[1])
        lost = rows(folder, "train")[-1]["time"]
        shrunk = wait_for("a step on one rank", lambda: steps_of(folder, 2), process, log)
        wait_for("some more", lambda: len(steps_of(folder, 2)) >= 5, process, log)
        cluster.add()
        added = rows(folder, "train")[-1]["time"]
        grown = wait_for("a step on two ranks again", lambda: steps_of(folder, 3), process, log)
        wait_for("some more", lambda: len(steps_of(folder, 3)) >= 5, process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 5, log.read_text()[-4000:]
    print(
        f"\nlost node to next step on one rank {shrunk - lost:.1f} s; added node to step on two {grown - added:.1f} s"
    )
    assert _restarts(folder) == [(2, 1), (1, 2)]
    loss, growth = rows(folder, "restart")
    print("lost steps:", loss["lost_steps"], growth["lost_steps"], "restart_s:", growth["timing/restart_s"])
    assert growth["resumed_from"].endswith(f"{growth['step']:08d}")
    # It saved first: what is lost is what it did between that save and its end.
    assert growth["lost_steps"] < 10
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert ledger["lost_s"] == pytest.approx(loss["lost_s"] + growth["lost_s"])
    assert json.loads((tmp_path / "run" / "result.json").read_text())["exit_code"] == 5
    _assert_on_the_curve(folder, tmp_path, cache)


def test_an_announced_loss_is_saved_for_and_counts_as_no_failure(tmp_path: Path) -> None:
    folder, log = str(tmp_path / "run"), tmp_path / "driver.log"
    cache = make_small_cache(str(tmp_path / "cache"))
    values = run_values(folder, cache, num_steps=MANY_STEPS, max_failures=0)
    # Far apart, so that a save between two of them was made because of the notice.
    values["trainer"]["checkpoint_every_steps"] = MANY_STEPS
    config = write_config(tmp_path / "run.toml", values)
    with nodes(2) as (cluster, each), driver(config, cluster.env, log) as process:
        wait_for("steps on two ranks", lambda: len(steps_of(folder, 1)) >= 15, process, log)
        cluster.announce_loss(each[1], 20)
        told = rows(folder, "train")[-1]
        wait_for("a save", lambda: rows(folder, "checkpoint")[-1]["step"] >= told["step"], process, log)
        saved = rows(folder, "checkpoint")[-1]["time"]
        # Ray takes the workers off the node at the deadline, or they are lost with it: whichever comes first.
        shrunk = wait_for("a step on one rank", lambda: steps_of(folder, 2), process, log)
        cluster.lose(each[1])
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 5, log.read_text()[-4000:]
    print(f"\nnotice to commit {saved - told['time']:.1f} s, to a step on one rank {shrunk - told['time']:.1f} s")
    (restart,) = rows(folder, "restart")
    print(
        "lost steps:", restart["lost_steps"], "of", steps_of(folder, 1)[-1]["step"] - told["step"], "since the notice"
    )
    assert (restart["world_size_before"], restart["world_size"]) == (2, 1)
    assert restart["step"] >= told["step"]
    _assert_on_the_curve(folder, tmp_path, cache)
