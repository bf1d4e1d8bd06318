"""What Ray Train's controller knows and tells nobody: that a node goes, that workers restart, that none is up.

A `ControllerCallback` is called in the controller's process on each change of its state. Ray counts the class as its
own (`_internal`); it is taken all the same, and Ray pinned to a minor version, because nothing public says these things
without a price: `ray.train.get_preemption_info()` is a barrier over all workers that the loop would have to call in
step, and of a coming resize the workers hear nothing at all, so that growing would always cost the steps since the last
checkpoint.

Imports Ray at its head, so import it where a run is launched.
"""

import logging
import time
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import PreemptingState, ResizingState, TrainControllerState

from m4v_dist.stop_request import StopRequest

logger = logging.getLogger(__name__)

RESIZE_WAIT_S = 120.0
"""How long a resize waits for a save; past it the steps since the last commit are lost, and counted as such."""
POLL_S = 0.2


class ControllerWatch(ControllerCallback):  # type: ignore[misc]
    """Tells the Verdict what becomes of the workers, and lets a resize wait for their save.

    Args:
        verdict: the run's Verdict actor.
    """

    def __init__(self, verdict: Any) -> None:
        self._verdict = verdict

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Called by Ray after each turn of the controller's loop; must not raise, which would end the run."""
        if type(previous_state) is not type(current_state):
            ray.get(self._verdict.note_state.remote(type(current_state).__name__))
        if isinstance(current_state, PreemptingState):
            info = current_state.preemption_info
            deadline = None if info.deadline_ms is None else info.deadline_ms / 1000
            nodes = ", ".join(node[:12] for node in info.preempted_node_ids)
            ray.get(self._verdict.ask.remote(StopRequest(f"preemption of node {nodes}", deadline, ends=False)))
        if isinstance(current_state, ResizingState):
            decision: Any = current_state.scaling_decision
            self._save_before(decision.num_workers)

    def _save_before(self, num_workers: int) -> None:
        """Have the workers save, and wait until they did: Ray ends them when this returns."""
        why, deadline = f"room for {num_workers} workers", time.monotonic() + RESIZE_WAIT_S
        ray.get(self._verdict.ask.remote(StopRequest(why, None, ends=False)))
        while not ray.get(self._verdict.is_served.remote(why)):
            if time.monotonic() > deadline or not ray.get(self._verdict.is_attempt_whole.remote()):
                logger.warning("no save before the change to %d workers: steps since the last are lost.", num_workers)
                return
            time.sleep(POLL_S)
