"""The Makefile hands arguments on, says what it waits for, and never throws away what was trained."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def _plan(*arguments: str) -> str:
    """What make would run, without running it."""
    # `make test` itself runs this test: what it hands down to a make below must not change the plan.
    environment = {
        name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
    }
    done = subprocess.run(
        ["make", "-n", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_demo_takes_overrides() -> None:
    plan = _plan("demo", "SKIP_INSTALL=1", "PYTHON=python3", "ARGS=run.seed=7 launch.use_gpu=true")
    assert plan.splitlines()[-1] == "python3 -m jobs.demo run.seed=7 launch.use_gpu=true"


def test_clean_keeps_what_was_trained() -> None:
    removed = _plan("clean").split()
    assert ".venv" in removed and not any(name.startswith("runs") for name in removed)
    assert _plan("clean-runs").split() == ["rm", "-rf", "runs"]


def test_the_quiet_install_says_first_that_it_takes_minutes() -> None:
    plan = _plan("install", "VENV=an-environment-that-does-not-exist").splitlines()
    assert "2-3 minutes" in plan[0] and any("pip install" in line for line in plan[1:])
