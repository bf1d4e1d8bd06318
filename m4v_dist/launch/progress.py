"""A progress bar of training in the driver's terminal, from what the run writes to metrics.jsonl."""

import threading
from types import TracebackType
from typing import Any

from tqdm import tqdm

from m4v_dist.launch.metrics_tail import MetricsTail

POLL_S = 0.5


class TrainingProgress:
    """Shows steps done, loss and curriculum stage while its block runs; a restart moves the bar back.

    Args:
        run_folder: local run folder.
        total_steps: steps of the curriculum.
        start_step: steps that are done already.
    """

    def __init__(self, run_folder: str, total_steps: int, start_step: int) -> None:
        self._tail = MetricsTail(run_folder, from_end=True)
        self._total_steps, self._start_step = total_steps, start_step
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def __enter__(self) -> "TrainingProgress":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _follow(self) -> None:
        with tqdm(total=self._total_steps, initial=self._start_step, desc="train", unit="step") as bar:
            while not self._is_over.wait(POLL_S):
                self._show(bar)
            self._show(bar)

    def _show(self, bar: Any) -> None:
        for row in self._tail.new_rows():
            match row["kind"]:
                case "train":
                    bar.set_postfix(stage=row["curriculum_stage"], loss=f"{row['train/loss']:.4f}", refresh=False)
                    bar.update(row["step"] + 1 - bar.n)
                case "held_out":
                    bar.write(f"held-out loss after {row['step']} steps: {row['validation/held_out_loss']:.4f}")
                case "failed_save":
                    bar.write(f"{row['checkpoint']} could not be saved: {row['failures'][0]}")
                case "damaged_checkpoint":
                    bar.write(f"{row['checkpoint']} is damaged; going on from step {row['step']}: {row['reason']}")
                case "restart":
                    bar.write(f"attempt {row['attempt']} goes on at step {row['step']}")
                    bar.n = row["step"]
                    bar.refresh()
