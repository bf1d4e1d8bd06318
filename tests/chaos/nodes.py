"""A Ray cluster of several "nodes" on this machine, and a training driver on it, to lose and add nodes under."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.integration.small_run import rows
from tests.ray_environment import ray_environment
from tests.trainer.ranks import ROOT

WAIT_S = 240
"""For any one thing to happen; the machine may be loaded."""


@dataclass
class Nodes:
    """A head without CPUs, and nodes of one CPU each, by Ray's ids."""

    process: "subprocess.Popen[str]"
    env: dict[str, str]
    ids: list[str] = field(default_factory=list)

    def add(self) -> str:
        node = self._tell("add")
        self.ids.append(node)
        return node

    def lose(self, node: str) -> None:
        """As a machine is lost: no process says good-bye."""
        self.ids.remove(node)
        self._tell(f"lose {node}")

    def complete(self, num_nodes: int) -> None:
        """Add what earlier runs have lost."""
        while len(self.ids) < num_nodes:
            self.add()

    def announce_loss(self, node: str, seconds: int) -> None:
        """As a cloud tells that it will take a spot machine."""
        command = [
            str(Path(sys.executable).parent / "ray"), "drain-node", "--address", self.env["RAY_ADDRESS"],
            "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
            "--deadline-remaining-seconds", str(seconds),
        ]  # fmt: skip
        subprocess.run(command, env=self.env, check=True, capture_output=True, timeout=60)

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def _tell(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.read()


@contextmanager
def nodes(num_nodes: int, environment: Mapping[str, str] | None = None) -> Iterator[tuple[Nodes, list[str]]]:
    """A cluster of a head and `num_nodes` nodes.

    Args:
        num_nodes: of one CPU each.
        environment: more variables of its processes, and so of the workers.
    """
    with ray_environment() as (folder, env):
        env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
        command = [sys.executable, "-m", "tests.chaos.cluster_process"]
        with Path(folder, "cluster.log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        try:
            cluster = Nodes(process, env)
            env["RAY_ADDRESS"] = cluster.read()
            assert env["RAY_ADDRESS"], Path(folder, "cluster.log").read_text()[-4000:]
            yield cluster, [cluster.add() for _ in range(num_nodes)]
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)


@contextmanager
def driver(
    config: str, env: Mapping[str, str], log: Path, *overrides: str, module: Sequence[str] = ("jobs.train",)
) -> Iterator["subprocess.Popen[bytes]"]:
    """`python -m jobs.train` as a process of its own, ended if the block leaves it running.

    Args:
        config: path of the run's TOML.
        env: of the process.
        log: its output is appended there.
        overrides: of the config.
        module: the module that is run instead, and its own arguments before `--config`.
    """
    command = [sys.executable, "-m", *module, "--config", config, *overrides]
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=dict(env), stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()


def wait_for(what: str, is_so: Callable[[], Any], process: "subprocess.Popen[bytes]", log: Path) -> float:
    """Wait until `is_so()`; return the UNIX time. Fails with the end of the log."""
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert process.poll() is None, f"the driver ended before: {what}\n{log.read_text(errors='replace')[-6000:]}"
        assert time.monotonic() < deadline, f"never: {what}\n{log.read_text(errors='replace')[-6000:]}"
        time.sleep(0.05)
    return time.time()


def steps_of(folder: str, attempt: int) -> list[dict[str, Any]]:
    """Train rows of one attempt."""
    return [row for row in rows(folder, "train") if row["attempt"] == attempt]
