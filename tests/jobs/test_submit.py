"""Every verb of a run also goes through `ray job submit`: a head of our own, jobs that end well and others."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from m4v_dist.config.load import parse_config
from tests.integration.small_run import make_small_cache, rows, small_values, to_toml
from tests.jobs.tiny_run import write_tiny_run
from tests.ray_environment import ray_environment

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 60
JOB_TIMEOUT_S = 180
STOP_TIMEOUT_S = 120

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@dataclass(frozen=True)
class Head:
    """A Ray head of its own: its dashboard's address and the environment of its clients."""

    address: str
    env: dict[str, str]

    def job(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run `ray job ...` as a user would."""
        command = [str(Path(sys.executable).parent / "ray"), "job", *arguments, "--address", self.address]
        if "--" in arguments:  # options end there
            cut = arguments.index("--")
            command = [command[0], "job", arguments[0], "--address", self.address, *arguments[1:cut], *arguments[cut:]]
        return subprocess.run(
            command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=JOB_TIMEOUT_S, check=False
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head --block` as a child, on loopback, with a token; ended by SIGTERM to its pid alone."""
    with ray_environment() as (folder, env):
        port = _free_port()
        env |= {
            "PYTHONUNBUFFERED": "1",
            # A job's `python` is looked up where the head runs: this environment's must come first.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2",
            "--node-ip-address=127.0.0.1", f"--port={_free_port()}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={port}", f"--temp-dir={folder}/ray", "--object-store-memory=100000000",
            # Ports with a fixed default: a second Ray on the machine must not clash with ours.
            f"--dashboard-agent-listen-port={_free_port()}", f"--ray-client-server-port={_free_port()}",
            "--disable-usage-stats", "--include-dashboard=true",
        ]  # fmt: skip
        with open(f"{folder}/head.log", "wb") as log:
            process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_until_up(f"http://127.0.0.1:{port}", process, Path(folder, "head.log"))
            yield Head(f"http://127.0.0.1:{port}", env)
        finally:
            process.send_signal(signal.SIGTERM)
            # With idle workers about, `ray start --block` takes its time to end them all.
            process.wait(timeout=STOP_TIMEOUT_S)


def _wait_until_up(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the head ended: {log.read_text()[-2000:]}"
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=2)
            return
        except urllib.error.HTTPError:
            return  # it answers, if only to ask for the token
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"no head after {START_TIMEOUT_S} s: {log.read_text()[-2000:]}")


def _submit(head: Head, name: str, verb: str, config: str, *overrides: str) -> "subprocess.CompletedProcess[str]":
    return head.job(
        "submit", "--submission-id", name, "--runtime-env", "cluster/runtime_env.yaml", "--working-dir", ".",
        "--", "python", "-m", f"jobs.{verb}", "--config", config, *overrides,
    )  # fmt: skip


def test_submitted_jobs_do_a_whole_run_on_workers_of_the_cluster(head: Head, tmp_path: Path) -> None:
    """Data by absolute paths: the jobs run in a copy of the working directory that is gone afterwards."""
    config = write_tiny_run(tmp_path, num_training_clips=1)
    # Braces come through: Ray gives the line to a shell once more, and quotes it for that.
    shards = f"sources.0.shards={tmp_path}/shards/clips-{{000..000}}.tar"
    # Those that stand together do not wait for one another; the report says what is not there yet.
    for verbs in (["precompute_latents"], ["train"], ["check_codec", "sample", "report"]):
        with ThreadPoolExecutor() as pool:
            for submitted in pool.map(lambda verb: _submit(head, verb, verb, config, shards), verbs):
                assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    status = head.job("status", "train")
    assert "'train' succeeded" in status.stdout
    assert _ask(head, "precompute_latents")["status"] == "SUCCEEDED"
    logs = _ask(head, "precompute_latents/logs")["logs"]
    assert "precompute_latents: 2 records kept" in logs and "joined the Ray cluster" in logs
    assert "train: 2 steps done" in _ask(head, "train/logs")["logs"]
    run = tmp_path / "run"
    assert (run / "checkpoints" / "step_00000002" / "COMMITTED").exists()
    assert "1 videos from step_00000002" in _ask(head, "sample/logs")["logs"]
    assert (run / "samples" / "00.mp4").stat().st_size > 0
    assert (run / "codec" / "codec.json").exists()
    assert "tiny" in (run / "report.html").read_text()


def test_a_job_whose_data_is_missing_gives_1_and_carries_code_and_reason(head: Head, tmp_path: Path) -> None:
    """The command line of `ray job submit` has one exit code for all failures; ours stand in the job's message."""
    config = write_tiny_run(tmp_path, num_training_clips=1)
    submitted = _submit(head, "no-cache", "train", config)
    assert submitted.returncode == 1
    info = _ask(head, "no-cache")
    assert info["status"] == "FAILED" and info["driver_exit_code"] == 3
    assert "run jobs.precompute_latents first" in str(info["message"])
    assert json.loads((tmp_path / "run" / "result.json").read_text())["exit_code"] == 3


def test_a_job_with_a_typo_gives_1_and_carries_code_and_reason(head: Head, tmp_path: Path) -> None:
    config = write_tiny_run(tmp_path, num_training_clips=1)
    assert _submit(head, "typo", "precompute_latents", config, "trainer.zero_stagee=2").returncode == 1
    info = _ask(head, "typo")
    assert info["status"] == "FAILED" and info["driver_exit_code"] == 2
    assert "did you mean trainer.zero_stage?" in str(info["message"])
    assert "did you mean trainer.zero_stage?" in head.job("logs", "typo").stdout


def test_a_job_that_would_write_into_its_own_copy_of_the_code_is_exit_2(head: Head, tmp_path: Path) -> None:
    """That copy is gone after the job, and what was trained with it."""
    config = write_tiny_run(tmp_path, num_training_clips=1)
    assert _submit(head, "relative", "train", config, "run.folder=runs/mine").returncode == 1
    info = _ask(head, "relative")
    assert info["status"] == "FAILED" and info["driver_exit_code"] == 2
    assert "run.folder=runs/mine is relative" in str(info["message"])


def test_a_job_that_is_stopped_saves_first_and_says_so(head: Head, tmp_path: Path) -> None:
    """`ray job stop` waits as long as the runtime environment says; without that it kills after 3 s."""
    run = tmp_path / "run"
    values = small_values(str(run), make_small_cache(f"{tmp_path}/cache"), checkpoint_every_steps=10**6)
    values["curriculum"][1]["num_steps"] = 10**6
    values["launch"]["num_workers"] = 1
    config = tmp_path / "run.toml"
    config.write_text(to_toml(parse_config(values, where="stop").model_dump(mode="json", exclude_none=True)))
    # `exec`, so that Ray waits for the driver itself and not for a shell's orphan, which some machines never bury.
    begun = head.job(
        "submit", "--no-wait", "--submission-id", "long", "--runtime-env", "cluster/runtime_env.yaml",
        "--working-dir", ".", "--", "exec", "python", "-m", "jobs.train", "--config", str(config),
    )  # fmt: skip
    assert begun.returncode == 0, begun.stdout + begun.stderr
    deadline = time.monotonic() + JOB_TIMEOUT_S
    while len(rows(str(run), "train")) < 4:
        assert time.monotonic() < deadline, _ask(head, "long/logs")["logs"][-4000:]
        time.sleep(0.1)
    stopped = head.job("stop", "long")
    assert "was stopped" in stopped.stdout, stopped.stdout + stopped.stderr
    assert _ask(head, "long")["status"] == "STOPPED"
    result = json.loads((run / "result.json").read_text())
    assert result["exit_code"] == 5
    said = re.search(r"step (\d+) \(SIGTERM, as of `ray job stop`: a save takes .*, (\d+) s left\)", result["reason"])
    assert said is not None, result["reason"]
    assert 280 < int(said[2]) <= 300, "RAY_JOB_STOP_WAIT_TIME_S of cluster/runtime_env.yaml"
    assert (run / "checkpoints" / f"step_{int(said[1]):08d}" / "COMMITTED").exists()


def _ask(head: Head, path: str) -> dict[str, Any]:
    """What the head says of a job; `ray job logs` says the same, after seconds of imports."""
    token = Path(head.env["RAY_AUTH_TOKEN_PATH"]).read_text()
    request = urllib.request.Request(f"{head.address}/api/jobs/{path}", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        said: dict[str, Any] = json.load(answer)
    return said


def test_what_is_shipped_stays_far_below_rays_limit() -> None:
    """Ray refuses a working directory over 100 MiB; the tracked files are what a clone ships."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name and not name.startswith("tests/golden")]
    assert sum(file.stat().st_size for file in files if file.is_file()) < 20 * 2**20
