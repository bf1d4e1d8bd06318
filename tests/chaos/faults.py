"""The faults of the matrix, each as a function that drives a run to its end through it.

Signals, nodes, files and stores are hit from outside; moments inside a save, and a loss, by `worker_faults.py`. Each
function asserts that its fault has really happened, and says when.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from m4v_dist.config.load import parse_config
from m4v_dist.trainer import checkpoint
from tests.chaos.long_run import LEFT_OUT_STEP, NUM_RANKS, long_values
from tests.chaos.nodes import Nodes, driver, wait_for
from tests.chaos.worker_faults import Kind, WorkerFault
from tests.integration.small_run import rows, to_toml
from tests.object_store_server import Outage

DOWN_S = 30.0
SAVED, NEXT_SAVED = 6, 9
"""Checkpoints before and after the fault."""
DISK_MIB = 320
"""Of the disk that fills up: three checkpoints of 82 MiB and little more."""
STALL_S, STALL_ABORT_S = 4.0, 2.0


@dataclass(frozen=True)
class Outcome:
    """How a disturbed run ended.

    Args:
        exit_codes: of its drivers, in the order of their ends.
        fault_time: UNIX time of the fault.
        seen: what shows that the fault was there, in words.
        num_attempts: that it should have taken.
        num_ranks: that it should have ended with.
        reference: what its curve is.
        but: steps whose losses are no part of the comparison.
        checkpoints: where they are.
    """

    exit_codes: tuple[int, ...]
    fault_time: float
    seen: str
    num_attempts: int
    num_ranks: int = NUM_RANKS
    reference: Literal["undisturbed", "left_out"] = "undisturbed"
    but: frozenset[int] = frozenset()
    checkpoints: str | None = None


class Scene:
    """One run of one ZeRO stage on a cluster.

    Args:
        cluster: of two nodes of one CPU.
        base: an empty folder for the run.
        cache: of latents.
        zero_stage: DeepSpeed's.
        store: a bucket and the switch of its outage.
    """

    def __init__(self, cluster: Nodes, base: Path, cache: str, zero_stage: int, store: tuple[str, Outage]) -> None:
        self.cluster, self.base, self.store = cluster, base, store
        self.folder, self.log, self.note = str(base / "run"), base / "driver.log", base / "note.json"
        self.values = long_values(self.folder, cache, zero_stage)

    def driver(self, *module: str) -> AbstractContextManager["subprocess.Popen[bytes]"]:
        """A driver of the run, as `self.values` are now."""
        config = parse_config(self.values, where="chaos")
        path = self.base / "run.toml"
        path.write_text(to_toml(config.model_dump(mode="json", exclude_none=True)))
        return driver(str(path), self.cluster.env, self.log, module=module or ("jobs.train",))

    def faulty_driver(self, kind: Kind, step: int, rank: int) -> AbstractContextManager["subprocess.Popen[bytes]"]:
        """A driver whose workers meet a fault of `worker_faults.py`."""
        fault = WorkerFault(kind, step, rank, str(self.note))
        return self.driver("tests.chaos.train_with_fault", json.dumps(asdict(fault)))

    def wait(self, what: str, is_so: Callable[[], Any], process: "subprocess.Popen[bytes]") -> float:
        """See `wait_for`."""
        return wait_for(what, is_so, process, self.log)

    def wait_for_the_middle(self, process: "subprocess.Popen[bytes]") -> None:
        """Until checkpoint 6 is committed and step 7, the second after it, is done."""
        self.wait("step 7", lambda: any(row["step"] >= SAVED + 1 for row in rows(self.folder, "train")), process)
        self.wait("its commit", lambda: any(row["step"] >= SAVED for row in rows(self.folder, "checkpoint")), process)

    def pid(self, rank: int) -> int:
        """Process of a rank of the first attempt."""
        attempt = json.loads(Path(self.folder, "attempts", "attempt_0001.json").read_text())
        return int(attempt["pids"][str(rank)])

    def end(self, process: "subprocess.Popen[bytes]") -> int:
        """Wait for a driver's exit code."""
        return process.wait(240)

    def noted(self) -> dict[str, Any]:
        """What a worker's fault has left."""
        assert self.note.exists(), "the fault did not happen"
        note: dict[str, Any] = json.loads(self.note.read_text())
        return note


# ---- processes and nodes


def no_fault(scene: Scene) -> Outcome:
    """The control: on Ray and undisturbed it is the run without Ray."""
    with scene.driver() as process:
        scene.wait_for_the_middle(process)
        middle = time.time()
        return Outcome((scene.end(process),), middle, "nothing was done to it", 1)


def worker_killed(scene: Scene) -> Outcome:
    """SIGKILL of rank 1 between two checkpoints."""
    with scene.driver() as process:
        scene.wait_for_the_middle(process)
        fault_time = time.time()
        os.kill(scene.pid(1), signal.SIGKILL)
        return Outcome((scene.end(process),), fault_time, "one restart", 2)


def node_lost(scene: Scene) -> Outcome:
    """A node's processes all end without a word; the run goes on with the rank that is left."""
    scene.values["launch"] |= {"min_workers": 1, "resize_check_s": 3600.0}
    with scene.driver() as process:
        scene.wait_for_the_middle(process)
        fault_time = time.time()
        scene.cluster.lose(scene.cluster.ids[-1])
        codes = (scene.end(process),)
    (restart,) = rows(scene.folder, "restart")
    assert (restart["world_size_before"], restart["world_size"]) == (NUM_RANKS, 1)
    return Outcome(codes, fault_time, "2 ranks, then 1", 2, num_ranks=1)


def driver_terminated(scene: Scene) -> Outcome:
    """SIGTERM to the driver, and the same command again once it has ended."""
    with scene.driver() as process:
        scene.wait_for_the_middle(process)
        fault_time = time.time()
        process.send_signal(signal.SIGTERM)
        first = scene.end(process)
    saved = rows(scene.folder, "checkpoint")[-1]["step"]
    with scene.driver() as process:
        return Outcome((first, scene.end(process)), fault_time, f"saved at step {saved}", 2)


def rank_hangs(scene: Scene) -> Outcome:
    """SIGSTOP of rank 1 in the second step after a save: its own clock stands too, so rank 0's must end the attempt."""
    scene.values["trainer"] |= {
        "stall_timeout_s": STALL_S, "stall_start_timeout_s": 120.0, "stall_abort_s": STALL_ABORT_S
    }  # fmt: skip
    with scene.driver() as process:
        scene.wait_for_the_middle(process)
        fault_time, pid = time.time(), scene.pid(1)
        os.kill(pid, signal.SIGSTOP)
        codes = (scene.end(process),)
    report = json.loads(Path(scene.folder, "attempts", "attempt_0001_failure.json").read_text())
    assert report["kind"] == "stall", report["cause"]
    assert not Path("/proc", str(pid)).exists(), "the process that hangs was left behind"
    return Outcome(codes, fault_time, f"ended by the stall clock after {STALL_S + STALL_ABORT_S:g} s", 2)


def second_driver(scene: Scene) -> Outcome:
    """The same command again while the run is trained."""
    with scene.driver() as process:
        attempt = Path(scene.folder, "attempts", "attempt_0001.json")
        scene.wait("the first attempt", attempt.exists, process)
        fault_time = time.time()
        with scene.driver() as second:
            refused = scene.end(second)
        assert process.poll() is None, "the first driver had ended before the second asked"
        assert "is in use by attempt 1" in scene.log.read_text(errors="replace")
        return Outcome((refused, scene.end(process)), fault_time, "refused: RunInUseError", 1)


# ---- moments of a save


def killed_in_write(scene: Scene) -> Outcome:
    """SIGKILL of rank 1 when half of its file is written."""
    with scene.faulty_driver("in_write", NEXT_SAVED, 1) as process:
        codes = (scene.end(process),)
    note = scene.noted()
    (half,) = (size for name, size in note["files"].items() if name.startswith(f"{checkpoint.rank_file(1)}.tmp-"))
    assert 0.4 < half / note["size_bytes"] < 0.6, "the file was not cut in its middle"
    return Outcome(codes, note["time"], f"{half:,} of {note['size_bytes']:,} bytes written", 2)


def killed_in_commit(scene: Scene) -> Outcome:
    """SIGKILL of rank 0 when all files and the index are written, and the marker is not."""
    with scene.faulty_driver("in_commit", NEXT_SAVED, 0) as process:
        codes = (scene.end(process),)
    note = scene.noted()
    assert list(note["files"]) == ["attempt_0001"], "there was a marker already"
    assert {"index.json", "state.json", checkpoint.rank_file(1)} <= note["files"]["attempt_0001"].keys()
    return Outcome(codes, note["time"], "index.json written, no COMMITTED", 2)


def killed_in_prune(scene: Scene) -> Outcome:
    """SIGKILL of rank 0 when the oldest checkpoint has lost its marker and a file."""
    with scene.faulty_driver("in_prune", NEXT_SAVED, 0) as process:
        codes = (scene.end(process),)
    note = scene.noted()
    assert checkpoint.rank_file(1) in note["files"] and checkpoint.rank_file(0) not in note["files"]
    left = [path.name for path in Path(scene.folder, "checkpoints").glob("step_*")]
    assert note["name"] not in left and len(left) == 2, f"left behind: {left}"
    return Outcome(codes, note["time"], f"{note['name']} half removed, gone at the end", 2)


def newest_truncated(scene: Scene) -> Outcome:
    """Rank 1's file of the newest checkpoint is cut to half, and rank 1 is killed."""
    with scene.driver() as process:
        scene.wait_for_the_middle(process)
        newest = str(checkpoint.newest_committed(f"{scene.folder}/checkpoints"))
        fault_time = time.time()
        path = Path(checkpoint.read_marker(newest).path(checkpoint.rank_file(1)))
        os.truncate(path, path.stat().st_size // 2)
        os.kill(scene.pid(1), signal.SIGKILL)
        codes = (scene.end(process),)
    (damaged,) = rows(scene.folder, "damaged_checkpoint")
    before = Path(damaged["resumed_from"]).name
    assert damaged["checkpoint"] == Path(newest).name > before
    return Outcome(codes, fault_time, f"{damaged['checkpoint']} passed over for {before}", 2)


# ---- disks and stores


def store_down(scene: Scene) -> Outcome:
    """The store answers 503 for 30 s from the moment at which rank 0 sends its file."""
    bucket, outage = scene.store
    checkpoints = f"{bucket}/{scene.base.name}"
    scene.values["trainer"]["checkpoint_folder"] = checkpoints
    place = f"{scene.base.name}/{checkpoint.folder_name(NEXT_SAVED)}/attempt_0001/{checkpoint.rank_file(0)}"
    outage.begin_at(place, DOWN_S, min_refused=1)
    with scene.driver() as process:
        codes = (scene.end(process),)
    assert outage.began is not None and outage.num_refused > 0, "nobody asked the store while it was down"
    saved = next(row for row in rows(scene.folder, "checkpoint") if row["step"] == NEXT_SAVED)
    assert saved["checkpoint/storage_retries"] > 0
    assert saved["time"] - outage.began > DOWN_S
    seen = f"{outage.num_refused} requests refused, the save tried again until it stood"
    return Outcome(codes, outage.began, seen, 1, checkpoints=checkpoints)


def disk_full(scene: Scene) -> Outcome:
    """The disk of the checkpoints fills up between two saves, and is freed once one has failed."""
    with small_disk(scene.base / "disk") as disk:
        scene.values["trainer"]["checkpoint_folder"] = str(disk / "checkpoints")
        with scene.driver() as process:
            scene.wait_for_the_middle(process)
            filler = disk / "filler"
            fill(filler)
            fault_time = time.time()
            scene.wait("a save that fails", lambda: rows(scene.folder, "failed_save"), process)
            filler.unlink()
            codes = (scene.end(process),)
        failed = rows(scene.folder, "failed_save")
        assert all("No space left on device" in row["failures"][0] for row in failed), failed
        # Compared after the disk is gone.
        kept = shutil.copytree(disk / "checkpoints", scene.base / "kept")
    names = ", ".join(row["checkpoint"] for row in failed)
    return Outcome(codes, fault_time, f"the save of {names} failed, the next stood", 1, checkpoints=str(kept))


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of its own, in memory; root may mount one."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        # Lazily: a rank of a run that failed may still have a file open there.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def can_mount() -> bool:
    """Whether this process may mount a disk."""
    return os.geteuid() == 0


def fill(path: Path) -> None:
    """Write until nothing fits any more."""
    with path.open("wb", buffering=0) as file:
        for size in (2**20, 2**12):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


# ---- numbers


def nan_loss(scene: Scene) -> Outcome:
    """The loss of rank 1 is NaN in one step."""
    with scene.faulty_driver("nan", LEFT_OUT_STEP, 1) as process:
        codes = (scene.end(process),)
    (skipped,) = rows(scene.folder, "skipped")
    assert skipped["step"] == LEFT_OUT_STEP
    assert rows(scene.folder, "train")[-1]["train/skipped_steps"] == 1
    return Outcome(
        codes, scene.noted()["time"], f"step {LEFT_OUT_STEP} skipped on all ranks and counted", 1,
        reference="left_out", but=frozenset({LEFT_OUT_STEP}),
    )  # fmt: skip


FAULTS: dict[str, Callable[[Scene], Outcome]] = {
    "none": no_fault,
    "SIGKILL of a worker": worker_killed,
    "node lost": node_lost,
    "SIGTERM, submitted again": driver_terminated,
    "killed in a checkpoint's write": killed_in_write,
    "killed in its commit": killed_in_commit,
    "killed in prune": killed_in_prune,
    "newest checkpoint truncated": newest_truncated,
    "S3 down for 30 s": store_down,
    "disk full": disk_full,
    "NaN in a loss": nan_loss,
    "rank hangs": rank_hangs,
    "second driver": second_driver,
}
NEEDS_ROOT: Sequence[str] = ("disk full",)
