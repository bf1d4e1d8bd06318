"""The window leaves a trace of its steps on the ranks that were named, and changes no number."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from m4v_dist.config.training_settings import ProfileSettings
from m4v_dist.parallel.mesh import Mesh
from m4v_dist.trainer.profiling import ProfileWindow
from tests.trainer.ranks import run_ranks
from tests.trainer.test_trainer import TOTAL, _trainer, rows

WINDOW = {"start_step": 5, "num_steps": 2, "ranks": [1]}


def _profiled_job(folder: str) -> int:
    _trainer(f"{folder}/plain").run()
    return _trainer(f"{folder}/profiled", profile=WINDOW).run().step


def test_a_trace_of_the_window_s_steps_appears_and_results_are_the_same_bits(tmp_path: Path) -> None:
    assert run_ranks(_profiled_job, 2, str(tmp_path)) == [TOTAL, TOTAL]
    (path,) = (tmp_path / "profiled" / "profile").iterdir()
    assert path.name == "rank_00001_steps_5_to_6.json"
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
    count = {name: sum(event["name"] == name for event in events) for name in ("forward", "backward", "optimizer")}
    # two steps of two micro-batches
    assert count == {"forward": 4, "backward": 4, "optimizer": 2}
    spans = [event for event in events if event["name"] == "forward"]
    linears = [event for event in events if event["name"] == "aten::linear"]
    inside = [e for e in linears if any(s["ts"] <= e["ts"] <= s["ts"] + s["dur"] for s in spans)]
    # four blocks, three slots a micro-batch
    assert len(inside) == 4 * 4 * 3
    plain, profiled = (rows(str(tmp_path / name), "train") for name in ("plain", "profiled"))
    assert [row["train/loss"] for row in plain] == [row["train/loss"] for row in profiled]
    assert [row["train/grad_norm"] for row in plain] == [row["train/grad_norm"] for row in profiled]
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_window_that_is_cut_off_writes_what_it_has_and_a_restart_takes_the_rest(tmp_path: Path) -> None:
    mesh = Mesh(rank=0, world_size=1, device=torch.device("cpu"))
    settings = ProfileSettings(start_step=3, num_steps=4)
    window = ProfileWindow(settings, str(tmp_path), mesh)
    for step in (2, 3, 4):
        window.begin_step(step)
        window.end_step(step)
    window.close(4)
    again = ProfileWindow(settings, str(tmp_path), mesh)
    for step in (5, 6, 7):
        again.begin_step(step)
        again.end_step(step)
    names = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert names == ["rank_00000_steps_3_to_4.json", "rank_00000_steps_5_to_6.json"]


def test_a_window_without_an_end_or_ranks_is_refused() -> None:
    for wrong in ({"num_steps": 0}, {"num_steps": 101}, {"ranks": []}, {"start_step": -1}):
        with pytest.raises(ValidationError):
            ProfileSettings.model_validate({"start_step": 3, **wrong})
