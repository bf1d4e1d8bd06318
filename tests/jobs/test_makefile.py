"""The Makefile hands arguments on, says what it waits for, and never throws away what was trained."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def _make(*arguments: str) -> "subprocess.CompletedProcess[str]":
    # `make test` itself runs this test: what it hands down to a make below must not change the plan.
    environment = {
        name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
    }
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment | {"LC_ALL": "C"}, capture_output=True, text=True, check=False
    )


def _plan(*arguments: str) -> str:
    """What make would run, without running it."""
    done = _make("-n", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_demo_takes_overrides() -> None:
    plan = _plan("demo", "SKIP_INSTALL=1", "PYTHON=python3", "ARGS=run.seed=7 launch.use_gpu=true")
    assert plan.splitlines()[-1] == "python3 -m jobs.demo run.seed=7 launch.use_gpu=true"


def test_chaos_runs_the_whole_matrix() -> None:
    plan = _plan("chaos", "SKIP_INSTALL=1", "PYTHON=python3")
    assert plan.splitlines()[-1] == "python3 -m pytest -s -m chaos tests/chaos"


def test_clean_keeps_what_was_trained() -> None:
    removed = _plan("clean").split()
    assert ".venv" in removed and not any(name.startswith("runs") for name in removed)
    assert _plan("clean-runs").split() == ["rm", "-rf", "runs"]


def test_the_quiet_install_says_first_that_it_takes_minutes() -> None:
    plan = _plan("install", "VENV=an-environment-that-does-not-exist").splitlines()
    assert "2-3 minutes" in plan[0] and any("pip install" in line for line in plan[1:])


def test_make_ends_with_2_and_names_the_code_of_the_step_in_its_last_line(tmp_path: Path) -> None:
    """What the README says of exit codes."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'demo: DataError: no such clip' >&2\nexit 3\n")
    python.chmod(0o755)
    done = _make("demo", "SKIP_INSTALL=1", f"PYTHON={python}")
    reason, last = done.stderr.splitlines()[-2:]
    assert done.returncode == 2
    assert reason == "demo: DataError: no such clip" and last.endswith("Error 3")
