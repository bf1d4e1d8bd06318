"""Ranks of a host share reads: one reads, others find it; killed ones hold up nobody and leave no more than allowed."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import host_files
from data_pipeline.host_files import SharedReads, local_copy
from data_pipeline.latent_cache import LatentCache
from data_pipeline.loader import LatentLoader
from m4v_dist import storage
from tests.data_pipeline.made_cache import MadeSource, make_cache
from tests.data_pipeline.test_loader import SOURCES, counted_slots_of, enter_video_stage, make_loader, take
from tests.trainer.ranks import fork_context

SIZE = 1000


def content(name: str) -> bytes:
    return name.encode() * (SIZE // len(name))


def fetch(shared: SharedReads, name: str, log: Path) -> bool:
    """Fill a buffer and check it; a line of `log` for each time that it had to be loaded."""
    buffer = bytearray(SIZE)

    def load(view: memoryview) -> None:
        with open(log, "a") as file:
            file.write(f"{name}\n")
        view[:] = content(name)

    found = shared.fill(name, memoryview(buffer), load)
    assert bytes(buffer) == content(name)
    return found


def fetch_all(folder: str, names: list[str], log: Path, start: Any) -> None:
    shared = SharedReads(1 << 20, folder)
    start.wait()
    for name in names:
        fetch(shared, name, log)


def die_while_loading(folder: str, name: str) -> None:
    def load(view: memoryview) -> None:
        view[:10] = b"x" * 10
        os.kill(os.getpid(), signal.SIGKILL)

    SharedReads(1 << 20, folder).fill(name, memoryview(bytearray(SIZE)), load)


def names_of(count: int) -> list[str]:
    # of one lock, so that they wait for one another as much as they can
    return [f"ab{number:018d}" for number in range(count)]


def test_several_processes_load_each_file_once(tmp_path: Path) -> None:
    context = fork_context()
    log, names, start = tmp_path / "log", names_of(30), context.Barrier(4)
    processes = [
        context.Process(target=fetch_all, args=(str(tmp_path / "shared"), names, log, start)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(log.read_text().split()) == names


def test_a_process_that_is_killed_while_it_loads_holds_up_nobody(tmp_path: Path) -> None:
    folder, (name,) = str(tmp_path / "shared"), names_of(1)
    process = fork_context().Process(target=die_while_loading, args=(folder, name))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    shared = SharedReads(1 << 20, folder, wait_s=30)
    assert not fetch(shared, name, tmp_path / "log") and fetch(shared, name, tmp_path / "log")
    assert shared.num_waits_ended == 0 and shared.num_found == 1
    assert (tmp_path / "log").read_text().split() == [name]


def test_who_has_waited_long_enough_reads_for_itself(tmp_path: Path) -> None:
    folder, (name,) = str(tmp_path / "shared"), names_of(1)
    holding, done = threading.Event(), threading.Event()

    def load(view: memoryview) -> None:
        holding.set()
        done.wait()
        view[:] = content(name)

    slow = threading.Thread(
        target=lambda: SharedReads(1 << 20, folder).fill(name, memoryview(bytearray(SIZE)), load), daemon=True
    )
    slow.start()
    holding.wait()
    shared = SharedReads(1 << 20, folder, wait_s=0.05)
    try:
        assert not fetch(shared, name, tmp_path / "log") and shared.num_waits_ended == 1
    finally:
        done.set()
        slow.join()
    assert fetch(shared, name, tmp_path / "log")


def test_an_error_of_one_is_no_error_of_the_next(tmp_path: Path) -> None:
    shared, (name,) = SharedReads(1 << 20, str(tmp_path)), names_of(1)

    def fail(view: memoryview) -> None:
        raise OSError("the store is down")

    with pytest.raises(OSError, match="the store is down"):
        shared.fill(name, memoryview(bytearray(SIZE)), fail)
    assert not fetch(shared, name, tmp_path / "log") and fetch(shared, name, tmp_path / "log")


def files_in(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("lock-"))


def test_the_oldest_go_when_a_new_one_needs_their_room_also_what_a_killed_one_left(tmp_path: Path) -> None:
    shared = SharedReads(3 * SIZE, str(tmp_path / "shared"))
    (tmp_path / "shared").mkdir()
    left = tmp_path / "shared" / "ab.tmp-of-one-that-died"
    left.write_bytes(bytes(2 * SIZE))
    os.utime(left, ns=(1, 1))
    names = names_of(5)
    for age, name in enumerate(names):
        fetch(shared, name, tmp_path / "log")
        os.utime(tmp_path / "shared" / name, ns=(2 + age, 2 + age))
    assert files_in(tmp_path / "shared") == names[-3:]
    assert not fetch(shared, names[0], tmp_path / "log")
    large = memoryview(bytearray(4 * SIZE))
    assert not shared.fill("ab-large", large, lambda view: None) and shared.num_not_left == 1
    shared.close()
    assert files_in(tmp_path / "shared") == []


def test_a_short_file_is_fetched_again(tmp_path: Path) -> None:
    shared, (name,) = SharedReads(1 << 20, str(tmp_path)), names_of(1)
    fetch(shared, name, tmp_path / "log")
    (tmp_path / name).write_bytes(content(name)[:-1])
    assert not fetch(shared, name, tmp_path / "log") and fetch(shared, name, tmp_path / "log")


def test_a_full_place_costs_reads_and_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(storage.NO_SPACE[0], "No space left on device")

    shared = SharedReads(1 << 20, str(tmp_path / "shared"))
    monkeypatch.setattr(host_files.os, "rename", full)
    for name in names_of(3):
        assert not fetch(shared, name, tmp_path / "log")
    assert shared.num_not_left == 3 and files_in(tmp_path / "shared") == []
    assert [record.getMessage() for record in caplog.records if "No space left" in record.getMessage()] != []


def test_a_copy_of_a_remote_file_is_made_once_and_the_oldest_copies_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    read_bytes = storage.read_bytes

    def count(path: str, offset: int = 0, length: int | None = None) -> bytes:
        reads.append(path)
        return read_bytes(path, offset, length)

    monkeypatch.setattr(storage, "read_bytes", count)
    copies = []
    for number in range(6):
        file = tmp_path / f"file{number}"
        file.write_bytes(bytes([number]) * 100)
        for _ in range(2):
            copies.append(local_copy(str(file), f"sum{number}", 100, str(tmp_path / "copies")))
            os.utime(copies[-1], ns=(number, number))
    assert len(reads) == 6 and len(set(copies)) == 6
    assert [os.path.exists(copy) for copy in copies[::2]] == [False, False, True, True, True, True]
    assert Path(copies[-1]).read_bytes() == bytes([5]) * 100
    with pytest.raises(FileNotFoundError):
        local_copy(str(tmp_path / "gone"), "other", 100, str(tmp_path / "copies"))


# ---- through the loader


def open_on(folder: str, shared: str, rank: int, world_size: int, **changes: Any) -> LatentLoader:
    return enter_video_stage(make_loader(folder, rank, world_size, shared=SharedReads(1 << 22, shared), **changes))


def take_on_rank(folder: str, shared: str, rank: int, start: Any, results: Any, dies_at: int | None) -> None:
    loader = open_on(folder, shared, rank, 4, prefetch_steps=0 if dies_at is None else 2)
    start.wait()
    steps = loader.steps()
    batches = [next(steps) for _ in range(dies_at or 8)]
    if dies_at:
        os.kill(os.getpid(), signal.SIGKILL)
    if dies_at is None:
        # closing takes away what the others may still want
        start.wait()
    loader.close()
    results.put((rank, counted_slots_of(batches), loader.reads))


def run_ranks(folder: str, shared: str, dying_rank: int | None) -> dict[int, tuple[list[Any], dict[str, float]]]:
    context = fork_context()
    start, results = context.Barrier(4), context.Queue()
    dies_at = [None if dying_rank is None else 3 * (rank == dying_rank) for rank in range(4)]
    processes = [
        context.Process(target=take_on_rank, args=(folder, shared, rank, start, results, dies_at[rank]))
        for rank in range(4)
    ]
    for process in processes:
        process.start()
    found = {}
    for _ in range(4 - (dying_rank is not None)):
        rank, slots, reads = results.get(timeout=120)
        found[rank] = (slots, reads)
    for process in processes:
        process.join(60)
    return found


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cache(str(tmp_path_factory.mktemp("cache")), SOURCES)


def test_four_ranks_of_a_host_read_a_group_s_video_once(cache_folder: str, tmp_path: Path) -> None:
    expected = {
        (slot.step, slot.index): slot
        for slot in counted_slots_of(take(enter_video_stage(make_loader(cache_folder)), 8))
    }
    found = run_ranks(cache_folder, str(tmp_path / "shared"), None)
    slots = [slot for slots, _ in found.values() for slot in slots]
    assert {(slot.step, slot.index): slot for slot in slots} == expected and len(slots) == len(expected)
    videos = {(slot.step, slot.record) for slot in slots if slot.source == "vid"}
    images = [slot for slot in slots if slot.source == "img"]
    num_reads = sum(reads["num_reads"] for _, reads in found.values())
    assert len(videos) > 8 and num_reads <= len(videos) + len(images)
    assert num_reads + sum(reads["num_saved"] for _, reads in found.values()) == len(slots)


def test_a_rank_that_is_killed_keeps_no_other_from_its_data(cache_folder: str, tmp_path: Path) -> None:
    found = run_ranks(cache_folder, str(tmp_path / "shared"), 2)
    assert sorted(found) == [0, 1, 3] and all(len(slots) == 16 for slots, _ in found.values())
    # a new attempt on what the killed one left
    again = run_ranks(cache_folder, str(tmp_path / "shared"), None)
    assert [again[rank][0] for rank in (0, 1, 3)] == [found[rank][0] for rank in (0, 1, 3)]


def test_ranks_that_cut_one_sequence_share_every_record(cache_folder: str, tmp_path: Path) -> None:
    twins = [open_on(cache_folder, str(tmp_path), 0, 1, has_twins=True, prefetch_steps=0) for _ in range(2)]
    steps = [twin.steps() for twin in twins]
    for _ in range(5):
        first, second = (next(step) for step in steps)
        assert first.micro_batches[0].slots == second.micro_batches[0].slots
    reads = [twin.reads for twin in twins]
    assert reads[0]["num_reads"] > 5 and reads[1]["num_reads"] == 0
    assert reads[1]["num_saved"] == reads[0]["num_saved"] + reads[0]["num_reads"]


def test_what_one_rank_alone_takes_is_not_left_for_others(tmp_path: Path) -> None:
    folder = make_cache(str(tmp_path / "cache"), [MadeSource("img", "image", 30, 1), *SOURCES[::2]])
    loader = make_loader(folder, 0, 2, shared=SharedReads(1 << 20, str(tmp_path / "shared")))
    loader.enter(0, 0)
    take(loader, 3)
    assert not (tmp_path / "shared").exists() and LatentCache.open(folder).sources
