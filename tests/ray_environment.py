"""What a Ray cluster of a test's own runs with."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def ray_environment() -> Iterator[tuple[str, dict[str, str]]]:
    """A short folder for Ray's sockets and logs, and variables for the cluster and its clients, with a token.

    Not pytest's tmp_path: a socket's path may have 107 characters.
    """
    with tempfile.TemporaryDirectory(prefix="m4v", dir="/tmp", ignore_cleanup_errors=True) as folder:
        token = Path(folder, "token")
        token.touch(mode=0o600)
        token.write_text("m4v-test-token-0123456789abcdef0123456789")
        # A Ray that this process has already joined must not be taken for the test's.
        env = {name: value for name, value in os.environ.items() if name not in {"RAY_ADDRESS", "RAY_JOB_ID"}}
        env |= {
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }
        yield folder, env
