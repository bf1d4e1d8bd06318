"""A wish that a run save, and perhaps end: the launch side makes it, the trainer obeys; standard library only.

Floor 1, because `launch/` and `trainer/` know nothing of each other and must agree on this word.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class StopRequest:
    """Why to save, by when, and what comes after.

    Args:
        why: in words, as the log and the job's last line give it: "SIGTERM", "the time limit", "preemption of node X".
        deadline: UNIX time in seconds at which processes are killed, by the clock of who asks; None: not known.
        ends: whether the run ends after the save; else it goes on, and Ray restarts the workers when it must.
        saves: whether it saves at all before it ends; a benchmark's weights are worth no disk.
        is_urgent: whether to save at the end of the present step; else as late as the deadline allows.
    """

    why: str
    deadline: float | None = None
    ends: bool = True
    saves: bool = True
    is_urgent: bool = True
