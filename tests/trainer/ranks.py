"""Run a function in several gloo ranks of this machine, without Ray; return what each rank returned."""

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent

_CHILD = """
import os, pickle, sys
import torch, torch.distributed as dist
torch.set_num_threads(1)
with open(sys.argv[1], "rb") as file:
    function, arguments = pickle.load(file)
dist.init_process_group("gloo")
answer = function(*arguments)
dist.destroy_process_group()
with open(sys.argv[1] + "." + os.environ["RANK"], "wb") as file:
    pickle.dump(answer, file)
"""


def free_port() -> int:
    """A TCP port of the loopback that nobody holds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(task: str, world_size: int, **environment: str) -> list[subprocess.Popen[str]]:
    """Start the ranks of a pickled task and return their processes."""
    base = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
    base |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), **environment}
    return [
        subprocess.Popen(
            [sys.executable, "-c", _CHILD, task],
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        for rank in range(world_size)
    ]


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    environment: dict[str, str] | None = None,
    watch: Callable[[list[subprocess.Popen[str]]], None] | None = None,
    timeout_s: float = 180,
) -> list[Any]:
    """Run `function(*arguments)` on every rank and return the answers; None for a rank that gave none.

    Args:
        function: importable, so defined in a test module.
        watch: called with the processes while they run; may kill one. Without it, a rank that fails is an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = f"{folder}/task"
        Path(task).write_bytes(pickle.dumps((function, arguments)))
        processes = start_ranks(task, world_size, **(environment or {}))
        try:
            if watch is not None:
                watch(processes)
            deadline = time.monotonic() + timeout_s
            outputs = [process.communicate(timeout=deadline - time.monotonic())[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        if watch is None:
            codes = [process.returncode for process in processes]
            assert codes == [0] * world_size, f"exit codes {codes}\n" + "\n".join(text[-4000:] for text in outputs)
        answers = [Path(f"{task}.{rank}") for rank in range(world_size)]
        return [pickle.loads(path.read_bytes()) if path.exists() else None for path in answers]
