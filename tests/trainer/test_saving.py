"""The loop when saves fail, checkpoints are damaged, the store is down, or the lease is lost: toy parts, two ranks.

Whatever happens, the steps that stand are those of a run that nothing happened to, bit for bit.
"""

import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from m4v_dist import storage
from m4v_dist.errors import DataError, JobError, PreemptedError
from m4v_dist.lease import Holder, newest_lease
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.stop_request import StopRequest
from m4v_dist.trainer import checkpoint
from m4v_dist.trainer.attempt import Attempt
from m4v_dist.trainer.guards import Clock
from m4v_dist.trainer.metrics import Ledger, Metrics
from m4v_dist.trainer.saving import Saving
from m4v_dist.trainer.trainer import Trainer, TrainResult
from tests.object_store_server import object_store
from tests.trainer.ranks import run_ranks
from tests.trainer.test_trainer import rows
from tests.trainer.toy import ToyLoader, ToyOutput, build_toy, toy_config, toy_objective

pytestmark = pytest.mark.slow

TOTAL = 10
"""Steps; checkpoints at 3, 4 (end of the first curriculum stage), 6, 9 and 10."""
SLOW_STORE_S = 2.0


def _trainer(folder: str, at_step: Callable[[int], None] = lambda _: None, **settings: Any) -> Trainer:
    mesh = Mesh.of_process_group(use_gpu=False)

    def objective(model: Any, batch: Any) -> ToyOutput:
        if model.training:
            at_step(batch.slots[0].step)
        return toy_objective(model, batch)

    config = toy_config(folder, **settings)
    loader = ToyLoader(12, mesh.rank, mesh.world_size, micro=3)
    return Trainer(config, mesh, build_model=build_toy, objective=objective, loader=loader)


def _stop_at(step: int, folder: str, **settings: Any) -> None:
    trainer = _trainer(folder, **settings)
    trainer.stop_requests = lambda: [StopRequest("SIGTERM")] * (trainer.step + 1 >= step)
    with pytest.raises(PreemptedError, match=f"asked to stop at step {step}"):
        trainer.run()


def _on_rank_0(change: Callable[[], object]) -> None:
    if dist.get_rank() == 0:
        change()
    dist.barrier()


def _cut(path: str) -> None:
    data = sorted(Path(path).glob("*/rank_00001.safetensors"))[0]
    data.write_bytes(data.read_bytes()[:-1])


def _flip(path: str) -> None:
    """A bit of a moment that rank 1 alone reads."""
    data = sorted(Path(path).glob("*/rank_00001.safetensors"))[0]
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)


def _damaged_jobs(folder: str) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    _trainer(f"{folder}/straight").run()
    for name, step, damage in (("flipped", 7, _flip), ("earlier_stage", 4, _cut)):
        _stop_at(step, f"{folder}/{name}")
        _on_rank_0(partial(damage, f"{folder}/{name}/checkpoints/step_{step:08d}"))
        answer[name] = _trainer(f"{folder}/{name}").run().step
    _on_rank_0(lambda: shutil.copytree(f"{folder}/straight", f"{folder}/ended"))
    _on_rank_0(lambda: _cut(f"{folder}/ended/checkpoints/step_00000010"))
    answer["ended"] = _trainer(f"{folder}/ended").run().step
    _stop_at(2, f"{folder}/only_one")
    _on_rank_0(lambda: _cut(f"{folder}/only_one/checkpoints/step_00000002"))
    for _ in range(2):
        with pytest.raises(DataError) as error:
            _trainer(f"{folder}/only_one").run()
        answer["only_one"] = str(error.value)
    return answer


def _limit(size_bytes: int) -> None:
    """On rank 1 alone: no file may grow past a size, which the system says as it says that a disk is full."""
    if dist.get_rank() == 1:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))


def _full_disk_jobs(folder: str) -> dict[str, Any]:
    answer: dict[str, Any] = {}

    def full_for_a_while(step: int) -> None:
        # The save at 6 fails; by 9 there is room again.
        _limit(64 if 4 <= step < 8 else resource.RLIM_INFINITY)

    answer["for_a_while"] = _trainer(f"{folder}/for_a_while", full_for_a_while).run().step
    try:
        _trainer(f"{folder}/for_ever", lambda step: _limit(64 if step >= 4 else resource.RLIM_INFINITY)).run()
    except JobError as error:
        answer["for_ever"] = (type(error).__name__, error.exit_code, str(error))
    _limit(resource.RLIM_INFINITY)

    def overtake(step: int) -> None:
        leases = f"{folder}/overtaken/checkpoints"
        lease = newest_lease(leases)
        if step == 4 and dist.get_rank() == 0 and lease is not None and lease.number == 1:
            other = {**lease.to_json(), "number": 2, "nonce": "other", "holder": vars(Holder("b", "gpu-9", "", 77))}
            storage.write_json(f"{leases}/leases/lease_0002.json", other)

    try:
        _trainer(f"{folder}/overtaken", overtake).run()
    except JobError as error:
        answer["overtaken"] = (type(error).__name__, error.exit_code, str(error))
    return answer


def _cut_off_job(folder: str) -> dict[str, Any]:
    """Saves take a day, it seems, and the kill comes in a minute; then again without it."""
    answer: dict[str, Any] = {}
    trainer = _trainer(folder)

    def stop_requests() -> list[StopRequest]:
        trainer.stopping.saved(86400.0)
        return [StopRequest("SIGTERM", time.time() + 60)] * (trainer.step + 1 >= 8)

    trainer.stop_requests = stop_requests
    with pytest.raises(PreemptedError) as error:
        trainer.run()
    answer["said"] = str(error.value)
    answer["again"] = _trainer(folder).run().step
    going = _trainer(f"{folder}/asked_to_save")
    going.stop_requests = lambda: [StopRequest("room", ends=False)] * (going.step + 1 >= 5)
    answer["going"] = going.run().step
    answer["measured"] = going.stopping._is_measured
    return answer


def _store_job(folder: str, environment: dict[str, str], checkpoints: str) -> TrainResult:
    os.environ.update(environment)
    _stop_at(7, folder, checkpoint_folder=checkpoints)
    return _trainer(folder, checkpoint_folder=checkpoints).run()


def _losses(folder: str) -> dict[int, tuple[float, float]]:
    """Of the steps that stand: the last attempt at each."""
    return {row["step"]: (row["train/loss"], row["train/grad_norm"]) for row in rows(folder, "train")}


def _ledger(folder: str) -> dict[str, Any]:
    ledger: dict[str, Any] = json.loads(Path(folder, "ledger.json").read_text())
    return ledger


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    folder = str(tmp_path_factory.mktemp("damaged"))
    return folder, run_ranks(_damaged_jobs, 2, folder)


@pytest.mark.parametrize(
    ("name", "checkpoint_name", "resumed_from", "lost_steps"),
    [
        ("flipped", "step_00000007", "step_00000006", 1),
        ("earlier_stage", "step_00000004", "step_00000003", 1),
        ("ended", "step_00000010", "step_00000009", 1),
    ],
    ids=["a bit that one rank finds", "the one before is of an earlier curriculum stage", "the last of a finished run"],
)
def test_a_damaged_newest_checkpoint_is_passed_over_and_the_run_ends_as_if_nothing_had_been(
    damaged: tuple[str, list[dict[str, Any]]], name: str, checkpoint_name: str, resumed_from: str, lost_steps: int
) -> None:
    base, answers = damaged
    folder = f"{base}/{name}"
    assert [answer[name] for answer in answers] == [TOTAL, TOTAL]
    (row,) = rows(folder, "damaged_checkpoint")
    assert row["checkpoint"] == checkpoint_name and row["resumed_from"].endswith(resumed_from)
    assert row["lost_steps"] == lost_steps and row["lost_s"] > 0 and "rank_00001.safetensors" in row["reason"]
    assert _ledger(folder)["damaged_checkpoints"] == 1 and _ledger(folder)["lost_s"] >= row["lost_s"]
    assert _losses(folder) == _losses(f"{base}/straight") and len(_losses(folder)) == TOTAL
    last, straight = (checkpoint.load_weights(f"{at}/checkpoints/step_00000010") for at in (folder, f"{base}/straight"))
    assert all(torch.equal(last[key], straight[key]) for key in straight)


def test_a_run_whose_only_checkpoint_is_damaged_ends_each_time_and_never_begins_anew(
    damaged: tuple[str, list[dict[str, Any]]],
) -> None:
    base, answers = damaged
    assert all("There is no checkpoint before it to go on from" in answer["only_one"] for answer in answers)
    assert [row["step"] for row in rows(f"{base}/only_one", "train")] == [0, 1]
    assert checkpoint.list_committed(f"{base}/only_one/checkpoints") == ["step_00000002"]


def test_what_a_damaged_checkpoint_costs_counts_steps_that_have_no_row(tmp_path: Path) -> None:
    """With logging.every_steps=2, of steps 3 to 7 only 4 and 6 have one."""
    config, mesh = toy_config(str(tmp_path)), Mesh(1, 2, torch.device("cpu"))
    metrics = Metrics(str(tmp_path), 1, config.logging, config)
    for step in (2, 4, 6):
        metrics.write("train", step, {"timing/step_s": step / 2})
    ledger = Ledger(step_s=100.0)
    path = f"{config.checkpoint_folder}/step_00000008"
    saving = Saving(config, mesh, Attempt(1, path, None, ledger, metrics, None, None), Clock())
    saving.saved = f"{config.checkpoint_folder}/step_00000003"
    saving._count_lost(path, 3, "made up")
    (row,) = rows(str(tmp_path), "damaged_checkpoint")
    assert (row["lost_steps"], row["lost_s"]) == (5, 12.5)
    assert (ledger.step_s, ledger.lost_s) == (87.5, 12.5)


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    folder = str(tmp_path_factory.mktemp("full"))
    return folder, run_ranks(_full_disk_jobs, 2, folder)


def test_a_save_that_fails_on_one_rank_is_counted_and_the_next_one_stands(
    damaged: tuple[str, Any], full_disk: tuple[str, list[dict[str, Any]]]
) -> None:
    folder = f"{full_disk[0]}/for_a_while"
    assert [answer["for_a_while"] for answer in full_disk[1]] == [TOTAL, TOTAL]
    (row,) = rows(folder, "failed_save")
    assert (row["checkpoint"], row["failed_in_a_row"]) == ("step_00000006", 1)
    assert row["failures"][0].startswith("rank 1: ") and "bytes are needed" in row["failures"][0]
    assert _ledger(folder)["failed_saves"] == 1
    assert storage.list_folder(f"{folder}/checkpoints") == ["leases", *(f"step_{n:08d}" for n in (4, 9, 10))]
    assert [row["step"] for row in rows(folder, "checkpoint")] == [3, 4, 9, 10]
    assert _losses(folder) == _losses(f"{damaged[0]}/straight")


def test_too_many_failed_saves_end_the_run_on_all_ranks_with_what_stands(
    full_disk: tuple[str, list[dict[str, Any]]],
) -> None:
    for answer in full_disk[1]:
        name, exit_code, message = answer["for_ever"]
        assert (name, exit_code) == ("SaveFailedError", 8)
        assert "trainer.max_failed_saves=3" in message and "step_00000004 is the last checkpoint" in message
    failed = rows(f"{full_disk[0]}/for_ever", "failed_save")
    assert [(row["checkpoint"][-2:], row["failed_in_a_row"]) for row in failed] == [("06", 1), ("09", 2), ("10", 3)]
    # Those of an attempt that breaks off too; what it did since its last commit is no work that stands.
    ledger, done = _ledger(f"{full_disk[0]}/for_ever"), rows(f"{full_disk[0]}/for_ever", "train")
    assert ledger["failed_saves"] == 3
    assert ledger["step_s"] <= sum(row["timing/step_s"] for row in done if row["step"] < 4)


def test_an_attempt_that_was_overtaken_ends_on_all_ranks_and_commits_nothing_more(
    full_disk: tuple[str, list[dict[str, Any]]],
) -> None:
    for answer in full_disk[1]:
        name, exit_code, message = answer["overtaken"]
        assert (name, exit_code) == ("RunInUseError", 2)
        assert "attempt 1 has lost its lease to attempt 2 of process 77 on gpu-9" in message
    assert checkpoint.list_committed(f"{full_disk[0]}/overtaken/checkpoints") == ["step_00000003", "step_00000004"]


def test_a_save_that_would_be_cut_off_is_not_begun_and_the_steps_since_the_last_one_count_as_lost(
    damaged: tuple[str, Any], tmp_path: Path
) -> None:
    folder = str(tmp_path / "run")
    answers = run_ranks(_cut_off_job, 2, folder)
    for answer in answers:
        assert "asked to stop at step 8 (SIGTERM: a save takes 86400 s" in answer["said"]
        assert f"not saved; {folder}/checkpoints/step_00000006 stands" in answer["said"]
        assert answer["again"] == answer["going"] == TOTAL
    assert [row["step"] for row in rows(folder, "checkpoint")] == [3, 4, 6, 9, 10]
    (restart,) = rows(folder, "restart")
    assert restart["lost_steps"] == 2 and _ledger(folder)["lost_s"] >= restart["lost_s"] > 0
    assert _losses(folder) == _losses(f"{damaged[0]}/straight")
    # One that goes on saves once for the asking, and waits for the commit: its row comes before the next step's.
    done = Path(folder, "asked_to_save", "metrics.jsonl").read_text().splitlines()
    order = [(row["kind"], row["step"]) for row in map(json.loads, done) if row["kind"] in ("train", "checkpoint")]
    assert order[order.index(("checkpoint", 5)) - 1 :][:3] == [("train", 4), ("checkpoint", 5), ("train", 5)]
    assert [answer["measured"] for answer in answers] == [True, False], "rank 0 sees the commits, and decides"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    with object_store(monkeypatch) as bucket_and_outage:
        yield bucket_and_outage


def test_a_store_that_is_down_for_seconds_stops_no_step_and_checkpoints_on_it_resume(
    damaged: tuple[str, Any], store: tuple[str, Any], tmp_path: Path
) -> None:
    bucket, outage = store
    # Eight: one of two ranks meets four, and below our own retries each request is made twice.
    outage.begin_at("step_00000006", SLOW_STORE_S, min_refused=8)
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    checkpoints, folder = f"{bucket}/run/checkpoints", str(tmp_path / "run")
    results = run_ranks(_store_job, 2, folder, environment, checkpoints)
    assert [result.checkpoint for result in results] == [f"{checkpoints}/step_00000010"] * 2
    assert outage.num_refused > 0
    commits = {row["step"]: row for row in rows(folder, "checkpoint")}
    assert sorted(commits) == [3, 4, 6, 7, 9, 10]
    assert commits[6]["checkpoint/storage_retries"] > 0
    assert commits[6]["timing/checkpoint_write_s"] > 0.5 * SLOW_STORE_S
    written = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    done = [(row["kind"], row["step"]) for row in written]
    assert done.index(("train", 6)) < done.index(("checkpoint", 6)), "the loop waited for the store"
    assert _losses(folder) == _losses(f"{damaged[0]}/straight")
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert checkpoint.list_committed(checkpoints) == [f"step_{step:08d}" for step in (7, 9, 10)]
    weights = checkpoint.load_weights(f"{checkpoints}/step_00000010")
    straight = checkpoint.load_weights(f"{damaged[0]}/straight/checkpoints/step_00000010")
    assert all(torch.equal(weights[key], straight[key]) for key in straight)
