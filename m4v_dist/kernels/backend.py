"""Which implementations of a scan there are by name, and whether one can run: nothing falls back in silence."""

import importlib.util
from typing import Literal, get_args

Backend = Literal["reference", "reference_chunked", "triton", "mamba_ssm"]


class BackendUnavailable(ValueError):
    """A scan backend was asked for by name and cannot run here; the message says why and what to set."""


def require_backend(backend: str) -> None:
    """Check that `backend` can run, without running it: call it before the first step, not in the middle of one.

    Raises:
        BackendUnavailable: unknown name, or a backend that this version or machine does not have.
    """
    match backend:
        case "reference" | "reference_chunked":
            return
        case "triton" | "mamba_ssm":
            if importlib.util.find_spec(backend) is None:
                raise BackendUnavailable(
                    f'kernels.backend="{backend}" was asked for, but the package {backend} is not installed. '
                    'Install it, or set kernels.backend="reference_chunked".'
                )
        case _:
            raise BackendUnavailable(
                f"kernels.backend={backend!r} is unknown; choose one of {', '.join(get_args(Backend))}."
            )
