"""A window of steps under torch's profiler: a trace for chrome://tracing or Perfetto, and the GPU's memory history.

`<run>/profile/rank_00000_steps_100_to_102.json`, and on a GPU `..._memory.pickle` for pytorch.org/memory_viz. Looking
changes no result; the steps of the window are slower, so their times are not those of a run.
"""

import logging
from contextlib import AbstractContextManager, nullcontext

import torch

from m4v_dist import storage
from m4v_dist.config.training_settings import ProfileSettings
from m4v_dist.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

_MAX_MEMORY_EVENTS = 200_000


class ProfileWindow:
    """One rank's window; without settings, or on another rank, it does nothing.

    Args:
        settings: which steps, which ranks; None: none.
        run_folder: local or mounted.
        mesh: rank facts.
    """

    def __init__(self, settings: ProfileSettings | None, run_folder: str, mesh: Mesh) -> None:
        self._settings = settings if settings is not None and mesh.rank in settings.ranks else None
        self._folder = storage.join(run_folder, "profile")
        self._mesh = mesh
        self._first = 0
        self._profiler: torch.profiler.profile | None = None

    def begin_step(self, step: int) -> None:
        """Open the window if this step is in it; after a restart, also in its middle."""
        settings = self._settings
        if settings is None or self._profiler is not None:
            return
        if not settings.start_step <= step < settings.start_step + settings.num_steps:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._mesh.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MAX_MEMORY_EVENTS)
        self._first = step
        self._profiler = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profiler.start()

    def span(self, name: str) -> AbstractContextManager[object]:
        """A named part of a step, as it stands in the trace."""
        return nullcontext() if self._profiler is None else torch.profiler.record_function(name)

    def end_step(self, step: int) -> None:
        """Write the files after the window's last step."""
        if self._settings is not None and step + 1 >= self._settings.start_step + self._settings.num_steps:
            self.close(step)

    def close(self, step: int) -> None:
        """Write what there is of an open window.

        Args:
            step: the last step in it.
        """
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        storage.make_folder(self._folder)
        stem = storage.join(self._folder, f"rank_{self._mesh.rank:05d}_steps_{self._first}_to_{step}")
        profiler.export_chrome_trace(f"{stem}.json")
        if self._mesh.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(f"{stem}_memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        logger.info("profile of steps %d to %d: %s.json", self._first, step, stem)
