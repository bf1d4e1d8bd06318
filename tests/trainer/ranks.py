"""Run a function in several gloo ranks of this machine, without Ray; return what each rank returned.

Ranks are forked from one server that has imported torch, deepspeed and our own modules already: importing them anew in
each process costs more than most tests. `run_fresh_ranks` takes new interpreters.
"""

import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.process
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
_PRELOAD = ["deepspeed", "jobs.train", "transformers", "tests.trainer.toy", "pytest"]
_BASE = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"}

Ranks = Sequence[multiprocessing.process.BaseProcess]


def free_port() -> int:
    """A TCP port of the loopback that nobody holds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_main(task: str, environment: Mapping[str, str]) -> None:
    """One rank: output to `<task>.<rank>.log`, answer to `<task>.<rank>`."""
    os.environ.update(environment)
    rank = environment["RANK"]
    log = os.open(f"{task}.{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    function, arguments = pickle.loads(Path(task).read_bytes())
    dist.init_process_group("nccl" if environment["DS_ACCELERATOR"] == "cuda" else "gloo")
    answer = function(*arguments)
    dist.destroy_process_group()
    Path(f"{task}.{rank}").write_bytes(pickle.dumps(answer))


def fork_context() -> multiprocessing.context.ForkServerContext:
    """Processes of it are forked from the server, which is up; there is one for all tests of a pytest process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    before = dict(os.environ)
    # Read when the libraries are imported, which the server does once.
    os.environ.update(_BASE)
    multiprocessing.forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)
    return context


def _fork_ranks(task: str, environments: list[dict[str, str]]) -> Ranks:
    context = fork_context()
    ranks = [context.Process(target=rank_main, args=(task, environment)) for environment in environments]
    for rank in ranks:
        rank.start()
    return ranks


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    watch: Callable[[Ranks], None] | None = None,
    timeout_s: float = 240,
) -> list[Any]:
    """Run `function(*arguments)` on every rank and return the answers; None for a rank that gave none.

    Args:
        function: importable, so defined in a test module.
        watch: called with the processes while they run; may kill one. Without it, a rank that fails is an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = f"{folder}/task"
        Path(task).write_bytes(pickle.dumps((function, arguments)))
        ranks = _fork_ranks(task, _environments(world_size))
        deadline = time.monotonic() + timeout_s
        try:
            if watch is not None:
                watch(ranks)
            for rank in ranks:
                rank.join(max(0.1, deadline - time.monotonic()))
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        if watch is None:
            codes = [rank.exitcode for rank in ranks]
            logs = [Path(f"{task}.{rank}.log").read_text(errors="replace")[-4000:] for rank in range(world_size)]
            assert codes == [0] * world_size, f"exit codes {codes}\n" + "\n".join(logs)
        answers = [Path(f"{task}.{rank}") for rank in range(world_size)]
        return [pickle.loads(path.read_bytes()) if path.exists() else None for path in answers]


def run_fresh_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    environment: Mapping[str, str],
    timeout_s: float = 180,
) -> list[Any]:
    """The same in new interpreters, with exactly this environment besides the ranks' own variables.

    With DS_ACCELERATOR=cuda in it the ranks use NCCL.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = f"{folder}/task"
        Path(task).write_bytes(pickle.dumps((function, arguments)))
        code = "import os, sys; from tests.trainer.ranks import rank_main; rank_main(sys.argv[1], dict(os.environ))"
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", code, task],
                env={
                    **own,
                    **environment,
                    "PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")]),
                },
            )
            for own in _environments(world_size)
        ]
        try:
            codes = [process.wait(timeout_s) for process in processes]
        finally:
            for process in processes:
                process.kill()
        logs = [Path(f"{task}.{rank}.log").read_text(errors="replace")[-4000:] for rank in range(world_size)]
        assert codes == [0] * world_size, f"exit codes {codes}\n" + "\n".join(logs)
        return [pickle.loads(Path(f"{task}.{rank}").read_bytes()) for rank in range(world_size)]


def _environments(world_size: int) -> list[dict[str, str]]:
    shared = {**_BASE, "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
