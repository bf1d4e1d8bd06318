"""What the ranks of a run take of their hosts' memory, as a line under a plan's table."""

from collections.abc import Sequence
from typing import Protocol

from m4v_dist.config.schema import RunConfig

GIB = 2**30
RANKS_A_HOST = 8
"""GPUs of one machine, as in NVIDIA's DGX and HGX of A100 and H100; an assumption, since no setting says it."""


class HostStates(Protocol):
    """`trainer.model_states.HostStates`."""

    @property
    def offloaded(self) -> int: ...

    @property
    def snapshot(self) -> int: ...

    @property
    def build(self) -> int: ...

    @property
    def peak(self) -> int: ...


def host_line(config: RunConfig, states: Sequence[HostStates]) -> str:
    """Host memory of a rank and of a machine, in the curriculum stage that needs most.

    Args:
        config: of the run.
        states: of each stage.
    """
    most = max(states, key=lambda host: host.offloaded + host.snapshot)
    ranks = min(RANKS_A_HOST, config.launch.num_workers)
    built = "the largest part" if config.trainer.zero_stage == 3 else "all weights"
    pinned = ", pinned" if config.launch.use_gpu else ""
    offloaded = ""
    if config.trainer.offload == "optimizer":
        offloaded = f", beside {most.offloaded / GIB:.2f} of offloaded master weights, moments, average and gradients"
    return (
        f"Host memory, GiB a rank: {most.build / GIB:.2f} while the model is built ({built}); then "
        f"{most.snapshot / GIB:.2f} for the snapshot of a checkpoint{pinned}{offloaded}. {ranks} ranks on a host: "
        f"{ranks * most.peak / GIB:.1f}. Python, libraries and the loader come on top. By arithmetic, not measured."
    )
