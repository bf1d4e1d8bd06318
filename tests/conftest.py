"""Shared fixtures: fixed seed, NaN-filled fresh memory, and golden cases copied from the reference implementations."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m4v_dist import storage, tensor_files

# The tensors here are small: more threads only wait for one another, above all where two cores are shared.
torch.set_num_threads(1)

if not torch.cuda.is_available():
    # Read when triton is first imported: our kernels then run in its interpreter, on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory():
    """A read of memory that nobody wrote shows as NaN instead of passing by luck."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No AWS setting of the machine that runs the tests counts: a store can only be refused."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    storage._s3().clear_instance_cache()
    yield
    storage._s3().clear_instance_cache()


def load_golden(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a golden case; bfloat16 tensors become float32 (tests/golden/README.md)."""
    description = json.loads((GOLDEN / f"{case}.json").read_text())
    tensors = tensor_files.read_tensors(str(GOLDEN / f"{case}.safetensors"))
    cast = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in tensors.items()}
    return description, cast
