"""Hands the videos that validation wrote to W&B, each once: a file `logged.json` beside them says so."""

import time

from m4v_dist import storage
from m4v_dist.trainer.metrics import Metrics


def publish_videos(run_folder: str, metrics: Metrics) -> int:
    """Log the finished videos of `<run>/validation/step_*/` that are not logged yet; return how many checkpoints' were.

    Args:
        run_folder: local or mounted.
        metrics: of rank 0, or of the driver when training is over.
    """
    folder = storage.join(run_folder, "validation")
    num_new = 0
    for name in storage.list_folder(folder):
        listed, logged = (storage.join(folder, name, file) for file in ("samples.json", "logged.json"))
        if not storage.exists(listed) or storage.exists(logged):
            continue
        videos = {entry["prompt"]: storage.join(folder, name, entry["file"]) for entry in storage.read_json(listed)}
        metrics.log_videos(int(name.rsplit("_", 1)[-1]), videos)
        storage.write_json(logged, {"attempt": metrics.attempt, "time": time.time()})
        num_new += 1
    return num_new
