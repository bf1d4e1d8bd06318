"""The start of an attempt where rank 0, which alone touches run folder and store, meets an error: two ranks."""

from pathlib import Path

import pytest

from m4v_dist.lease import Holder
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer.attempt import begin_attempt
from tests.trainer.ranks import run_ranks
from tests.trainer.toy import toy_config


def _begin_job(folders: list[str]) -> list[tuple[str, bool, str]]:
    mesh = Mesh.of_process_group(use_gpu=False)
    found = []
    for folder in folders:
        # OSError and ValueError are what a rank meets; a partner's broken connection is a RuntimeError.
        with pytest.raises((OSError, ValueError)) as error:
            begin_attempt(toy_config(folder), mesh, Holder.of_this_process())
        found.append((type(error.value).__name__, isinstance(error.value, OSError), str(error.value)))
    return found


@pytest.mark.slow
def test_an_error_that_rank_0_meets_alone_is_raised_by_all_ranks_with_its_reason(tmp_path: Path) -> None:
    # Before the lease is claimed, behind it, and no error of the disk at all.
    for name, file, text in (
        ("claims", "checkpoints/leases", "a file in the place of the folder"),
        ("facts", "attempts", "the same"),
        ("ledger", "ledger.json", "{torn"),
    ):
        (tmp_path / name / file).parent.mkdir(parents=True)
        (tmp_path / name / file).write_text(text)
    folders = [f"{tmp_path}/{name}" for name in ("claims", "facts", "ledger")]
    main, other = run_ranks(_begin_job, 2, folders, timeout_s=60)
    words = ("/claims/checkpoints/leases", "/facts/attempts", "/ledger/ledger.json: not valid JSON")
    for (kind, _, said), (_, is_restarted, told), expected in zip(main, other, words, strict=True):
        assert expected in said
        assert told == f"rank 0 could not begin the attempt: {kind}: {said}" and is_restarted
