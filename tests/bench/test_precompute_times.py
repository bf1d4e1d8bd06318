"""The benchmark of the precompute does the same clips on both sides; Ray's part is done in this process."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from m4v_dist.bench import precompute_times as bench
from m4v_dist.errors import ConfigError
from m4v_dist.frozen.video_file import encode_mp4
from tests.data_pipeline.copied_shards import CopiedShards
from tests.data_pipeline.made_cache import moving_blocks


def _run_here(actor: type, arguments: Sequence[Any], tasks: Sequence[str], _: object) -> Iterator[dict[str, Any]]:
    worker = actor(*arguments)
    for task in tasks:
        yield {name: values[0] for name, values in worker({"task": [task]}).items()}
    worker.close()


def test_both_sides_do_the_same_clips_and_the_page_has_their_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "run_on_ray", _run_here)
    monkeypatch.setattr(bench, "CLIPS_PER_SHARD", 3)
    media = [(encode_mp4(moving_blocks(seed, 18), 12.0), "mp4") for seed in range(2)]
    plan = CopiedShards(tmp_path, 1).plan(str(tmp_path / "unused"))
    (row,) = bench.precompute_times(media, plan, nullcontext, num_clips=7, worker_counts=(1,))
    assert (row.num_workers, row.num_clips) == (1, 7)
    assert row.bare_s > 0 and row.precompute_s > 0 and row.seconds_in["encode_s"] > 0
    page = bench.precompute_page([row])
    assert f"{row.precompute_s / row.bare_s:.3f}" in page and "wait " in page
    assert not (tmp_path / "unused").exists()


def test_more_workers_than_cores_are_refused(tmp_path: Path) -> None:
    plan = CopiedShards(tmp_path, 1).plan(str(tmp_path / "unused"))
    with pytest.raises(ConfigError, match="999 workers want 999 cores"):
        bench.precompute_times([(b"", "mp4")], plan, nullcontext, num_clips=1, worker_counts=(999,))
