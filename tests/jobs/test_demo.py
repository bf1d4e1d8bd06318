"""The demo stops where a step fails, removes nothing but its own, checks its config first, and proves its claims."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from jobs import demo
from m4v_dist import storage
from m4v_dist.config.load import load_config
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError
from m4v_dist.launch.fault_injection import Kill, KillMoment

CONFIG = str(Path(__file__).parents[2] / "jobs" / "configs" / "demo.toml")


def _demo(tmp_path: Path, *arguments: str) -> demo.Demo:
    config = load_config(CONFIG, [f"run.folder={tmp_path}/run", f"precompute.cache={tmp_path}/cache"])
    return demo.Demo(config, arguments)


class _Killer:
    """Says at the first look that it killed, and kills nobody."""

    def __init__(self, run_folder: str, moment: KillMoment) -> None:
        self.kill: Kill | None = None

    def look(self) -> Kill | None:
        self.kill = Kill(1, rank=1, pid=4242, step=7, checkpoint_step=6, num_steps_after_checkpoint=1)
        return self.kill


class _NoKiller(_Killer):
    """Never finds its moment."""

    def look(self) -> None:
        return None


class _Steps:
    """Stands in for the commands: notes them, and leaves in the run folder what the demo reads of their work.

    Args:
        folder: run folder.
        exit_codes: of verbs that fail.
        writes_twice: the second precompute writes its shard again.
        redone_loss: of the one step that both attempts did, the second time; 0.5 is what the first had.
    """

    def __init__(
        self,
        folder: Path,
        *,
        exit_codes: dict[str, int] | None = None,
        writes_twice: bool = False,
        redone_loss: float = 0.5,
    ) -> None:
        self.commands: list[Sequence[str]] = []
        self._folder = folder
        self._exit_codes = exit_codes or {}
        self._writes_twice = writes_twice
        self._redone_loss = redone_loss

    @property
    def verbs(self) -> list[str]:
        return [command[1].removeprefix("jobs.") for command in self.commands]

    def __call__(self, arguments: Sequence[str], look: Callable[[], None]) -> int:
        if not self.commands:
            packed = sorted(path.name for path in (self._folder / "shards").iterdir())
            assert packed == ["clips-000.tar", "stills-000.tar", "unseen-000.tar"], "packing comes first"
        self.commands.append(arguments)
        verb = self.verbs[-1]
        shard = self._folder / "cache" / "shards" / "a.tar"
        if verb == "precompute_latents" and (self._writes_twice or not shard.exists()):
            storage.write_bytes(str(shard), b"x" * len(self.commands))
        elif verb == "train":
            look()
            (self._folder / "metrics.jsonl").write_text(self._metrics())
        elif verb == "sample":
            storage.write_json(f"{self._folder}/samples/samples.json", [{"file": "00.mp4", "prompt": "a fox"}])
        return self._exit_codes.get(verb, 0)

    def _metrics(self) -> str:
        """Steps 0 to 33; step 7 is lost with attempt 1 and done again."""
        rows = [_train_row(1 if step < 8 else 2, step, 0.5) for step in range(34)]
        rows.insert(8, _train_row(2, 7, self._redone_loss))
        rows += [
            {"attempt": 2, "step": step, "kind": "held_out", "validation/held_out_loss": 0.5 + step} for step in (0, 34)
        ]
        return "".join(json.dumps(row) + "\n" for row in rows)


def _train_row(attempt: int, step: int, loss: float) -> dict[str, object]:
    return {"attempt": attempt, "step": step, "kind": "train", "train/loss": loss, "train/grad_norm": 1.0}


SHORT = ["curriculum.0.num_steps=10", "curriculum.1.num_steps=24", "trainer.checkpoint_every_steps=7"]
"""The README's demo of two minutes."""


@pytest.fixture(scope="module")
def clip_list(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A training clip and a held-out one, so that packing takes a moment."""
    listed = json.loads(Path(demo.CLIP_LIST).read_text())
    names = {"carphone_pristine", "api_wan2_7_t2v-1"}
    listed["clips"] = [clip for clip in listed["clips"] if clip["stem"] in names]
    path = tmp_path_factory.mktemp("clips") / "two.json"
    path.write_text(json.dumps(listed))
    return str(path)


def _main(
    run: Path,
    clip_list: str,
    steps: _Steps,
    *overrides: str,
    make_killer: Callable[[str, KillMoment], demo.Killer] = _Killer,
) -> int:
    """`jobs.demo` itself, short, with steps that stand in for the commands."""
    make_demo = partial(demo.Demo, run_python=steps, make_killer=make_killer, clip_list=clip_list)
    return demo.main([*_paths(run), *SHORT, "launch.use_gpu=false", *overrides], make_demo)


def test_the_steps_come_in_order_and_what_they_were_is_kept(
    tmp_path: Path, clip_list: str, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = _Steps(tmp_path / "run")
    assert _main(tmp_path / "run", clip_list, steps) == 0
    assert steps.verbs == ["precompute_latents", "precompute_latents", "train", "check_codec", "sample", "report"]
    assert all(command[2:] == steps.commands[0][2:] for command in steps.commands)
    kept = storage.read_json(f"{tmp_path}/run/commands.json")
    assert [entry["exit_code"] for entry in kept] == [0] * 5, "the report shows those before it"
    assert storage.read_json(f"{tmp_path}/run/kill.json")["pid"] == 4242
    assert storage.read_json(f"{tmp_path}/run/fault_check.json")["num_redone"] == 1
    shown = capfd.readouterr().out
    assert f"video   {tmp_path}/run/samples/00.mp4   a fox" in shown
    assert shown.splitlines()[-1].startswith("demo: done in 0:")


def test_the_kill_is_said_together_with_what_ray_will_print(
    tmp_path: Path, clip_list: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _main(tmp_path / "run", clip_list, _Steps(tmp_path / "run")) == 0
    shown = capfd.readouterr().out
    assert "Killing rank 1 (pid 4242) with SIGKILL after step 7" in shown
    assert "Ray will now report the lost worker at length; that is expected." in shown
    assert "the checkpoint of step 6" in shown


def test_a_step_that_fails_is_the_last_one(tmp_path: Path, clip_list: str) -> None:
    steps = _Steps(tmp_path / "run", exit_codes={"train": 6})
    assert _main(tmp_path / "run", clip_list, steps) == 6
    assert steps.verbs[-1] == "train"


def test_a_second_precompute_that_writes_is_exit_1(
    tmp_path: Path, clip_list: str, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = _Steps(tmp_path / "run", writes_twice=True)
    assert _main(tmp_path / "run", clip_list, steps) == 1
    assert steps.verbs == ["precompute_latents", "precompute_latents"]
    last = capfd.readouterr().err.splitlines()[-1]
    assert "ClaimFailedError: the second precompute changed" in last and "cache/shards/a.tar" in last


def test_redone_steps_that_differ_are_exit_1(tmp_path: Path, clip_list: str, capfd: pytest.CaptureFixture[str]) -> None:
    steps = _Steps(tmp_path / "run", redone_loss=0.25)
    assert _main(tmp_path / "run", clip_list, steps) == 1
    assert steps.verbs[-1] == "train"
    assert "step 7: 0.5 in attempt 1, 0.25 in attempt 2" in capfd.readouterr().err.splitlines()[-1]
    assert storage.read_json(f"{tmp_path}/run/result.json")["exit_code"] == 1


def test_a_training_that_nothing_interrupted_is_exit_1(
    tmp_path: Path, clip_list: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _main(tmp_path / "run", clip_list, _Steps(tmp_path / "run"), make_killer=_NoKiller) == 1
    assert "before a worker could be killed in stage 'video'" in capfd.readouterr().err.splitlines()[-1]


def test_a_short_run_says_that_its_held_out_loss_proves_nothing(
    tmp_path: Path, clip_list: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _main(tmp_path / "run", clip_list, _Steps(tmp_path / "run")) == 0
    assert "A run of 34 steps proves nothing by it: a fall of 5% is asked for from 600 steps" in capfd.readouterr().out


def test_the_shipped_demo_is_asked_for_a_fall() -> None:
    assert load_config(CONFIG, []).total_steps == demo.shipped_num_steps() == 600


def test_a_step_that_fails_ends_the_demo_with_its_exit_code(tmp_path: Path) -> None:
    """report has nothing to report on: exit 3."""
    step = _demo(tmp_path, "--config", CONFIG, f"run.folder={tmp_path}/run", f"precompute.cache={tmp_path}/cache")
    with pytest.raises(demo.StepFailedError, match=r"exit code 3 from: .*python\S* -m jobs.report --config") as raised:
        step._step("report")
    assert raised.value.exit_code == 3


def test_the_command_is_shown_so_that_it_can_be_copied(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").touch()
    step = _demo(tmp_path, "--config", CONFIG, f"run.folder={tmp_path}", "sampling.prompts=['two words']", "--dry-run")
    step._step("report")
    shown = capfd.readouterr().out
    words = "'sampling.prompts=['\"'\"'two words'\"'\"']'"
    assert f"-m jobs.report --config {CONFIG} run.folder={tmp_path} {words} --dry-run" in shown
    assert f"would write {tmp_path}/report.html" in shown


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
    tmp_path: Path, clip_list: str, capfd: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "wedding.mp4").write_bytes(b"irreplaceable")
    for dry_run in ([], ["--dry-run"]):
        # Should the check be gone, the folder is removed, but no demo of minutes runs.
        assert _main(videos, clip_list, _Steps(videos), *dry_run) == 2
        assert "wedding.mp4) and was not made by the demo" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="not made by the demo"):
        demo.Demo(_config(videos), [])._clear()
    assert [path.name for path in videos.iterdir()] == ["wedding.mp4"]


def test_the_reason_of_a_refused_verb_does_not_bar_the_demo(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    demo.require_own_folder(str(tmp_path))


def test_empty_folders_do_not_bar_the_demo_and_a_link_or_a_file_in_them_does(tmp_path: Path) -> None:
    (tmp_path / "run" / "cache" / "index").mkdir(parents=True)
    demo.require_own_folder(f"{tmp_path}/run")
    (tmp_path / "run" / "cache" / "mine").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match=r"is not empty \(cache\)"):
        demo.require_own_folder(f"{tmp_path}/run")
    (tmp_path / "run" / "cache" / "mine").unlink()
    (tmp_path / "run" / "cache" / "index" / "a.parquet").write_text("")
    with pytest.raises(ConfigError, match=r"is not empty \(cache\)"):
        demo.require_own_folder(f"{tmp_path}/run")


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
    tmp_path: Path, clip_list: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    steps = _Steps(tmp_path / "run", exit_codes={"precompute_latents": 3})
    make_demo = partial(demo.Demo, run_python=steps, clip_list=clip_list)
    assert demo.main([*_paths(tmp_path / "run"), "trainer.precision=float32"], make_demo) == 3
    line = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("$"))
    assert f"--config {CONFIG} launch.use_gpu=true launch.num_workers=1 trainer.precision=bfloat16 run.folder=" in line
    assert line.endswith("trainer.precision=float32")


def test_the_steps_run_on_the_demo_s_own_config_unless_another_is_given(
    tmp_path: Path, clip_list: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    overrides = _paths(tmp_path / "run")[2:]
    (tmp_path / "jobs").symlink_to(Path(CONFIG).parents[1])
    monkeypatch.chdir(tmp_path)
    for given, used in (([], demo.CONFIG), ([f"--config={CONFIG}"], CONFIG)):
        steps = _Steps(tmp_path / "run", exit_codes={"precompute_latents": 3})
        assert demo.main([*overrides, *given], partial(demo.Demo, run_python=steps, clip_list=clip_list)) == 3
        assert steps.commands == [["-m", "jobs.precompute_latents", "--config", used, *overrides]]


def test_the_demo_s_help_says_that_its_config_may_be_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        demo.main(["--help"])
    shown = " ".join(capfd.readouterr().out.split())
    assert raised.value.code == 0
    assert "[--config FILE]" in shown and f"(default: {demo.CONFIG})" in shown


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
