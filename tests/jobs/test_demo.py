"""The demo stops where a step fails, removes nothing but its own, checks its config first, and proves its claims."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import demo
from m4v_dist import storage
from m4v_dist.config.load import load_config
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, DataError
from m4v_dist.launch.fault_injection import Kill, KillMoment
from m4v_dist.report.run_folder import parse_metrics

CONFIG = str(Path(__file__).parents[2] / "jobs" / "configs" / "demo.toml")


def _demo(tmp_path: Path, *arguments: str) -> demo.Demo:
    config = load_config(CONFIG, [f"run.folder={tmp_path}/run", f"precompute.cache={tmp_path}/cache"])
    return demo.Demo(config, arguments)


def test_a_step_that_fails_ends_the_demo_with_its_exit_code(tmp_path: Path) -> None:
    """report has nothing to report on: exit 3."""
    step = _demo(tmp_path, "--config", CONFIG, f"run.folder={tmp_path}/run", f"precompute.cache={tmp_path}/cache")
    with pytest.raises(demo.StepFailedError, match=r"exit code 3 from: .*python\S* -m jobs.report --config") as raised:
        step._step("report")
    assert raised.value.exit_code == 3


def test_the_command_is_shown_so_that_it_can_be_copied(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    step = _demo(tmp_path, "--config", CONFIG, "sampling.prompts=['two words']", "--dry-run")
    step._step("report")
    shown = capfd.readouterr().out
    assert f"-m jobs.report --config {CONFIG} 'sampling.prompts=['\"'\"'two words'\"'\"']' --dry-run" in shown
    assert "would write runs/demo/report.html" in shown


def test_a_second_precompute_that_writes_is_noticed(tmp_path: Path) -> None:
    shard = tmp_path / "cache" / "shards" / "a.tar"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"one")
    before = demo.snapshot(str(tmp_path / "cache"))
    assert demo.snapshot(str(tmp_path / "cache")) == before
    time.sleep(0.02)
    storage.write_bytes(str(shard), b"two")
    assert demo.snapshot(str(tmp_path / "cache")) != before


def test_an_earlier_demo_is_removed_and_an_empty_folder_is_not_spoken_of(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    _demo(tmp_path)._clear()
    assert "Removing" not in capfd.readouterr().out
    (run / "metrics.jsonl").write_text("{}")
    _demo(tmp_path)._clear()
    assert "Removing" in capfd.readouterr().out
    assert [path.name for path in run.iterdir()] == [demo.MARKER]


def _paths(folder: Path) -> list[str]:
    names = ("clips-{000..002}.tar", "stills-000.tar", "unseen-000.tar")
    shards = [f"sources.{index}.shards={folder}/shards/{name}" for index, name in enumerate(names)]
    return ["--config", CONFIG, f"run.folder={folder}", f"precompute.cache={folder}/cache", *shards]


def test_a_folder_that_the_demo_did_not_make_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # Should the check be gone, the folder is removed, but no demo of minutes runs.
    monkeypatch.setattr(demo.Demo, "run", lambda self: self._clear() or "cleared")
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "wedding.mp4").write_bytes(b"irreplaceable")
    for dry_run in ([], ["--dry-run"]):
        assert demo.main([*_paths(videos), *dry_run]) == 2
        assert "wedding.mp4) and was not made by the demo" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="not made by the demo"):
        demo.Demo(_config(videos), [])._clear()
    assert [path.name for path in videos.iterdir()] == ["wedding.mp4"]


def test_the_reason_of_a_refused_verb_does_not_bar_the_demo(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    demo.require_own_folder(str(tmp_path))


def test_a_linked_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="a link"):
        demo.require_own_folder(f"{tmp_path}/link/")


def _config(folder: Path, *overrides: str) -> RunConfig:
    return load_config(CONFIG, [*_paths(folder)[2:], *overrides])


def test_another_run_folder_needs_cache_and_shards_in_it_and_the_message_can_be_pasted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="packs its shards into run.folder") as raised:
        demo.check_config(load_config(CONFIG, [f"run.folder={tmp_path}/run"]))
    pasted = [word for word in str(raised.value).split("add ")[1].rstrip(".").replace("'", "").split()]
    assert len(pasted) == 4
    demo.check_config(load_config(CONFIG, [f"run.folder={tmp_path}/run", *pasted]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.checkpoint_every_steps=6", "give 7 or more"),
        ("trainer.checkpoint_every_steps=20 curriculum.1.num_steps=40", "num_steps=40.*give 50 or more"),
        ("logging.every_steps=2", "give 1"),
        ("launch.max_failures=0", "must come back"),
        ("trainer.held_out_slots=0", "held-out loss falls"),
    ],
)
def test_what_the_demo_cannot_show_is_refused_before_it_starts(tmp_path: Path, override: str, message: str) -> None:
    demo.check_config(_config(tmp_path / "run"))
    with pytest.raises(ConfigError, match=message):
        demo.check_config(_config(tmp_path / "run", *override.split()))


def test_gpus_put_their_overrides_into_every_command_and_the_user_s_words_win() -> None:
    config = ["--config", "x.toml"]
    assert demo.step_arguments("x.toml", [], 0) == config
    gpu = ["launch.use_gpu=true", "launch.num_workers=2", "trainer.precision=bfloat16"]
    assert demo.step_arguments("x.toml", ["run.seed=1"], 8) == [*config, *gpu, "run.seed=1"]
    assert "launch.num_workers=1" in demo.step_arguments("x.toml", [], 1)
    assert demo.step_arguments("x.toml", ["launch.use_gpu=false"], 8) == [*config, "launch.use_gpu=false"]


@pytest.mark.parametrize("num_gpus", [0, 1, 2, 8])
def test_the_demo_s_slots_divide_over_any_number_of_gpus(num_gpus: int) -> None:
    config = load_config(CONFIG, demo.gpu_overrides(num_gpus, []))
    assert config.launch.use_gpu == (num_gpus > 0) and config.launch.num_workers in (1, 2)


def test_the_printed_command_carries_the_gpu_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "count_gpus", lambda: 1)
    monkeypatch.setattr(demo.Demo, "run", lambda self: self._step("report") or "done")
    assert demo.main([*_paths(tmp_path / "run"), "trainer.precision=float32"]) == 3
    line = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("$"))
    assert f"--config {CONFIG} launch.use_gpu=true launch.num_workers=1 trainer.precision=bfloat16 run.folder=" in line
    assert line.endswith("trainer.precision=float32")


def test_the_steps_run_on_the_demo_s_own_config_unless_another_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "count_gpus", lambda: 0)
    monkeypatch.setattr(demo.Demo, "run", lambda self: " ".join(self._arguments))
    overrides = _paths(tmp_path / "run")[2:]
    (tmp_path / "jobs").symlink_to(Path(CONFIG).parents[1])
    monkeypatch.chdir(tmp_path)
    for given, used in (([], demo.CONFIG), ([f"--config={CONFIG}"], CONFIG)):
        assert demo.main([*overrides, *given]) == 0
        assert capfd.readouterr().out.splitlines()[-1] == f"demo: --config {used} {' '.join(overrides)}"


def test_the_demo_s_help_says_that_its_config_may_be_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        demo.main(["--help"])
    shown = " ".join(capfd.readouterr().out.split())
    assert raised.value.code == 0
    assert "[--config FILE]" in shown and f"(default: {demo.CONFIG})" in shown


class _Killer:
    """Kills at the first look, and nobody."""

    def __init__(self, run_folder: str, moment: KillMoment) -> None:
        self.kill: Kill | None = None

    def look(self) -> Kill | None:
        self.kill = Kill(1, rank=1, pid=4242, step=67, checkpoint_step=60, num_steps_after_checkpoint=7)
        return self.kill


def test_the_kill_is_said_together_with_what_ray_will_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "WorkerKiller", _Killer)
    monkeypatch.setattr(demo.Demo, "_step", lambda self, verb, look: look())
    with pytest.raises(DataError, match="metrics.jsonl"):
        _demo(tmp_path)._train_with_a_kill()
    shown = capfd.readouterr().out
    assert "Killing rank 1 (pid 4242) with SIGKILL after step 67" in shown
    assert "Ray will now report the lost worker at length; that is expected." in shown
    assert "the checkpoint of step 60" in shown


def _held_out(*losses: float) -> str:
    rows = [
        {"attempt": 1, "step": 40 * index, "kind": "held_out", "validation/held_out_loss": loss}
        for index, loss in enumerate(losses)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_the_first_and_last_held_out_loss_are_shown() -> None:
    shown = demo.prove_held_out_loss_fell(parse_metrics(_held_out(0.5, 0.6, 0.25)))
    assert "0.5000 after 0 steps, 0.2500 after 80" in shown


@pytest.mark.parametrize("losses", [(0.5, 0.4, 0.5), (0.5, 0.3, 0.6), (0.5, float("nan")), (0.5,), ()])
def test_a_held_out_loss_that_did_not_fall_fails(losses: tuple[float, ...]) -> None:
    with pytest.raises(demo.ClaimFailedError):
        demo.prove_held_out_loss_fell(parse_metrics(_held_out(*losses)))


def test_one_warning_of_torch_is_quiet_and_others_are_not() -> None:
    code = (
        "import warnings\n"
        "for module in ('torch.distributed.c10d_logger', 'jobs.train'):\n"
        "    warnings.warn_explicit('from ' + module, FutureWarning, 'f.py', 1, module=module)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=demo.QUIET, capture_output=True, text=True, check=True)
    assert "from jobs.train" in done.stderr and "c10d_logger" not in done.stderr


def test_a_dry_run_touches_nothing(tmp_path: Path) -> None:
    assert demo.main([*_paths(tmp_path / "run"), "--dry-run"]) == 0
    assert not (tmp_path / "run").exists()


def test_a_remote_run_folder_is_exit_2(tmp_path: Path) -> None:
    assert demo.main(["--config", CONFIG, "run.folder=s3://bucket/run", "--dry-run"]) == 2


def test_the_demo_s_own_config_can_be_run_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs").symlink_to(Path(CONFIG).parents[1])
    monkeypatch.chdir(tmp_path)
    assert demo.main(["--dry-run"]) == 0
