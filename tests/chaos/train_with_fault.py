"""`jobs.train` with a fault armed in its workers.

python -m tests.chaos.train_with_fault '{"kind": "nan", "step": 7, "rank": 1, "note": "/.../note.json"}' --config ...
"""

import json
import sys

import jobs.train
from jobs import cli
from tests.chaos.worker_faults import WorkerFault


def main(fault: str, *arguments: str) -> int:
    """As the end of jobs/train.py, but for what its workers run."""
    jobs.train.train_on_rank = WorkerFault(**json.loads(fault)).train
    return cli.main("train", jobs.train.train, "Train with a fault.", arguments, preflight=jobs.train.require_free_run)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
