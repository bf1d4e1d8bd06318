"""Who may write in a folder, a run's checkpoints or a cache: one driver at a time, and of its attempts the newest.

`<folder>/leases/lease_0003.json` is attempt 3's claim. A number can be claimed once (`storage.create_bytes`), and
the highest one counts: so two drivers that begin together do not both get it, and an attempt that has been overtaken
sees it by looking for a higher number. That is asked before each commit and before anything is removed behind it
(fencing); a commit in the moment between question and answer does no harm, because attempts write in folders of their
own, and none replaces the marker of a later one.

The holder is a driver: its attempts follow one another at once. Its `LeaseKeeper` renews a heartbeat. Another driver is
refused until the lease was given back, or its process is gone (as seen on the same machine), or the heartbeat has
stopped for `timeout_s`; since clocks of two machines differ, a heartbeat that looks old is watched for a while first.
"""

import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from m4v_dist import storage
from m4v_dist.errors import RunInUseError
from m4v_dist.retries import within

logger = logging.getLogger(__name__)

HEARTBEATS_A_TIMEOUT = 4
GIVE_BACK_S = 3.0
"""How long a driver that ends waits for the store to take the lease back; without it others wait for its heartbeat."""
_FILE = re.compile(r"^lease_(\d+)\.json$")


@dataclass(frozen=True)
class Holder:
    """A driver.

    Args:
        id: its own, drawn.
        host: for people.
        machine: equal for processes that see one another's ids; empty where that cannot be known.
        pid: of the process that renews the lease.
    """

    id: str
    host: str
    machine: str
    pid: int

    @classmethod
    def of_this_process(cls) -> "Holder":
        """A new holder."""
        return cls(secrets.token_hex(8), socket.gethostname(), _machine(), os.getpid())

    def is_gone(self) -> bool:
        """Whether it ended without a word, as far as can be seen from here: False where it cannot."""
        if not self.machine or self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


def _machine() -> str:
    """The boot and the process namespace: containers of one host do not see one another's processes."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not boot.exists() or not namespace.exists():
        return ""
    return f"{boot.read_text().strip()}:{os.readlink(namespace)}"


@dataclass(frozen=True)
class Lease:
    """One claim.

    Args:
        number: of the attempt.
        nonce: drawn for this claim.
        holder: who claimed it.
        since: when, in seconds since the epoch.
        heartbeat: last sign of life.
        is_released: given back.
    """

    number: int
    nonce: str
    holder: Holder
    since: float
    heartbeat: float
    is_released: bool = False

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Lease":
        """Read back what `to_json` wrote."""
        return cls(**{**values, "holder": Holder(**values["holder"])})

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"attempt {self.number} of process {self.holder.pid} on {self.holder.host}, since {since}"


def newest_lease(folder: str) -> Lease | None:
    """The lease that counts, or None; `folder` is the checkpoint folder."""
    while True:
        numbers = _numbers(folder)
        if not numbers:
            return None
        try:
            return Lease.from_json(storage.read_json(_path(folder, max(numbers))))
        except FileNotFoundError:
            # A newer claim has removed it since: look again.
            continue


def require_free(folder: str, holder: Holder, timeout_s: float, *, watches: bool = False) -> None:
    """Go on, or not, where another driver may be at work.

    Args:
        folder: where the leases lie: of a run its checkpoint folder.
        holder: who wants to go on.
        timeout_s: trainer.lease_timeout_s, or precompute.lease_timeout_s.
        watches: a heartbeat that looks old is watched for a good quarter of that; else it is taken for old.

    Raises:
        RunInUseError: with who holds it, since when, and how to take over.
    """
    lease = newest_lease(folder)
    if lease is None or lease.is_released or lease.holder.id == holder.id or lease.holder.is_gone():
        return
    age_s = time.time() - lease.heartbeat
    if age_s > timeout_s and not watches:
        return
    if age_s > timeout_s:
        watch_s = 1.5 * timeout_s / HEARTBEATS_A_TIMEOUT
        logger.warning("%s: held by %s, silent for %.0f s; watching it for %.0f s.", folder, lease, age_s, watch_s)
        time.sleep(watch_s)
        if newest_lease(folder) == lease:
            logger.warning("%s: taking over from %s.", folder, lease)
            return
        age_s = 0.0
    raise RunInUseError(
        f"{folder} is in use by {lease}; its last heartbeat was {max(0.0, age_s):.0f} s ago. Two jobs must not write "
        "there: stop that one, or, if it is dead, wait until its heartbeat is older than "
        f"lease_timeout_s={timeout_s:g}, and submit again; for other work give this job another folder."
    )


def claim(folder: str, holder: Holder, *, above: int, timeout_s: float) -> Lease:
    """Claim the next number.

    Args:
        folder: checkpoint folder.
        holder: who claims.
        above: the number is higher than this too.
        timeout_s: see `require_free`.

    Raises:
        RunInUseError: another driver holds the run, or was faster.
    """
    require_free(folder, holder, timeout_s, watches=True)
    before = newest_lease(folder)
    number = 1 + max(above, 0 if before is None else before.number)
    now = time.time()
    lease = Lease(number, secrets.token_hex(8), holder, now, now)
    path = _path(folder, number)
    is_created = storage.create_bytes(path, storage.json_bytes(lease.to_json()))
    # Read back whatever the answer: see `create_bytes`.
    there = Lease.from_json(storage.read_json(path))
    if there.nonce != lease.nonce:
        raise RunInUseError(f"{folder} is in use by {there}, which claimed it at the same time; stop one of the two.")
    if not is_created:
        logger.info("%s: claimed, and told so only on asking again.", path)
    for older in _numbers(folder):
        if older < number:
            storage.remove(_path(folder, older))
    return lease


def require_held(folder: str, lease: Lease) -> None:
    """Go on, or not, with a commit.

    Raises:
        RunInUseError: another attempt has taken over.
    """
    newest = newest_lease(folder)
    if newest is None or newest.nonce != lease.nonce:
        raise RunInUseError(
            f"{folder}: attempt {lease.number} has lost its lease to {newest or 'nobody (the file is gone)'}, so it "
            "must not commit: it was taken for dead, or its lease was removed by hand. The newer one goes on."
        )


class LeaseKeeper:
    """Renews the heartbeat of a holder's newest lease while its block runs, and gives the lease back.

    Whichever attempt that is: the driver keeps it while its workers restart.

    Args:
        folder: checkpoint folder.
        holder: whose lease.
        timeout_s: after which others may take over; renewed four times as often.
    """

    def __init__(self, folder: str, holder: Holder, timeout_s: float) -> None:
        self._folder, self._holder, self._pause_s = folder, holder, timeout_s / HEARTBEATS_A_TIMEOUT
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._renew_always, name="lease", daemon=True)

    def __enter__(self) -> "LeaseKeeper":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        try:
            within(self._give_back, limit_s=GIVE_BACK_S, what="the lease")
        except TimeoutError as late:
            logger.warning("%s: the lease was not given back: %s", self._folder, late)

    def _give_back(self) -> None:
        # A heartbeat under way would take the place of the release.
        self._thread.join()
        self._renew(is_released=True)

    def _renew_always(self) -> None:
        while not self._is_over.wait(self._pause_s):
            self._renew(is_released=False)

    def _renew(self, *, is_released: bool) -> None:
        try:
            lease = newest_lease(self._folder)
            if lease is not None and lease.holder.id == self._holder.id:
                renewed = replace(lease, heartbeat=time.time(), is_released=is_released)
                storage.write_json(_path(self._folder, lease.number), renewed.to_json())
        # ValueError: a claim that is not whole yet, on a mount without hard links.
        except (OSError, ValueError) as error:
            # Work goes on: whether the lease is still held is asked at each commit.
            logger.warning("%s: the lease could not be renewed: %s", self._folder, error)


@contextmanager
def hold(folder: str, timeout_s: float) -> Iterator[Lease]:
    """Claim a folder as this process, keep it while the block runs, and give it back.

    The newest claim's file stays: a job that was overtaken long ago still sees a higher number than its own.

    Args:
        folder: local or s3://.
        timeout_s: see `require_free`.

    Raises:
        RunInUseError: another job is at work there.
    """
    holder = Holder.of_this_process()
    lease = claim(folder, holder, above=0, timeout_s=timeout_s)
    with LeaseKeeper(folder, holder, timeout_s):
        yield lease


def _leases(folder: str) -> str:
    return storage.join(folder, "leases")


def _numbers(folder: str) -> list[int]:
    return [int(found[1]) for name in storage.list_folder(_leases(folder)) if (found := _FILE.match(name))]


def _path(folder: str, number: int) -> str:
    return storage.join(_leases(folder), f"lease_{number:04d}.json")
