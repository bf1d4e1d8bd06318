"""The loader's benchmark runs: every contestant that is here hands out all records, whole; an index is resumed on."""

import pytest

from m4v_dist.bench.index_times import index_page, index_times
from m4v_dist.bench.loader_contestants import CONTESTANTS, Task, check_is_whole
from m4v_dist.bench.loader_subject import LoaderCase, write_cache, write_raw_files
from m4v_dist.bench.loader_times import LoaderTimes, loader_page, loader_times

SMALL = LoaderCase("small", 24, (4, 2, 8, 8), (5, 32), records_per_shard=8)


@pytest.mark.parametrize("name", ["ours", "webdataset", "torch DataLoader, raw files"])
def test_a_contestant_hands_out_every_record_once(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = str(tmp_path_factory.mktemp("subject"))
    write_cache(SMALL, f"{folder}/cache"), write_raw_files(SMALL, f"{folder}/raw")
    batches = list(CONTESTANTS[name](Task(SMALL, folder, "", "", 0, 8)))
    firsts = {float(latents.view(-1)[:64].float().sum()) for batch in batches for latents, _, _ in batch}
    assert [len(batch) for batch in batches] == [8, 8, 8] and len(firsts) == 24
    assert sum(check_is_whole(batch, SMALL) for batch in batches) == 24 * (4 * 2 * 8 * 8 * 2 + 5 * 32 * 2 + 768 * 4)


def test_the_page_sets_ours_beside_the_best_of_the_others() -> None:
    times = [
        LoaderTimes("disk", "small", name, 0, 0.1, rate, 1.0) for name, rate in (("ours", 6.0), ("a", 3.0), ("b", 4.0))
    ]
    assert "| 1.50" in loader_page(times).replace("|                1.50", "| 1.50")


def test_an_index_is_resumed_on_without_its_records() -> None:
    (times,) = index_times((5000,))
    assert times.num_records == 5000 and times.index_bytes > 5000 * 50
    assert times.resume_s > 0 and "5,000" in index_page([times])


@pytest.mark.slow
def test_the_loaders_are_timed_from_a_disk_and_from_a_store() -> None:
    times = loader_times([SMALL], num_rounds=1, workers=(0,), batch_size=8)
    ours = [row for row in times if row.name == "ours"]
    assert [row.place for row in ours] == ["local disk", "S3 (moto)"]
    assert all(row.records_per_s > 0 and row.first_batch_s > 0 for row in times)
