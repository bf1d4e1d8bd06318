"""`python -m jobs.demo` (`make demo`): the main job end to end on real clips, each step as a command to copy.

Packs shards, precomputes twice (the second time does nothing), trains while one worker is killed, proves that the
redone steps are equal and that the held-out loss fell, samples, and writes the report. Stops at the first step that
fails, with its exit code. Where there are GPUs, training and sampling use up to two of them.
"""

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from data_pipeline.demo_clips import pack_demo, read_clip_list
from jobs import cli
from m4v_dist import storage
from m4v_dist.config.load import load_config
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, JobError
from m4v_dist.launch.fault_injection import Kill, KillMoment, WorkerKiller
from m4v_dist.report.claims import ClaimFailedError, prove_held_out_loss_fell
from m4v_dist.report.fault import prove_redone_steps_equal
from m4v_dist.report.run_folder import read_metrics

DESCRIPTION = "The main job end to end on real clips."
CONFIG = "jobs/configs/demo.toml"
CONFIGS = Path(__file__).parent / "configs"
CLIP_LIST = str(CONFIGS / "demo_clips.json")
CLIPS_PER_SHARD = 4
MIN_REDONE_STEPS = 5
"""Steps after a checkpoint before the kill: what is lost, done again, and compared."""
MARKER = "made_by_jobs_demo"
"""File of a run folder that says: the demo made all of this, and may remove it."""
MAX_GPUS = 2
POLL_S = 0.05
"""Pause between two looks at a step that runs: shorter than a training step, so that the kill falls where it should."""

QUIET = {"PYTHONWARNINGS": "ignore::FutureWarning:torch.distributed.c10d_logger"}
"""For the steps' processes: torch says once a process that DeepSpeed calls a function by its old name."""

RunPython = Callable[[Sequence[str], Callable[[], None]], int]
"""Runs Python with these arguments, calls the function again and again meanwhile, and returns the exit code."""


class Killer(Protocol):
    """Kills one worker when its moment has come, as `WorkerKiller` does; `kill` is None until then."""

    kill: Kill | None

    def look(self) -> Kill | None:
        """Look whether the moment has come; return the kill when it happens."""


class StepFailedError(JobError):
    """A step of the demo ended with another exit code than 0, which becomes the demo's own."""

    def __init__(self, command: str, exit_code: int) -> None:
        super().__init__(f"exit code {exit_code} from: {command}")
        self.exit_code = exit_code


def run_python_here(arguments: Sequence[str], look: Callable[[], None]) -> int:
    """Run this interpreter with `arguments` on this machine: a `RunPython`."""
    with subprocess.Popen([sys.executable, *arguments], env=QUIET | os.environ) as process:
        while process.poll() is None:
            look()
            time.sleep(POLL_S)
    return process.returncode


class Demo:
    """The steps of one demo.

    Args:
        config: of the run.
        arguments: the config's file and the overrides, as every step is called with.
        run_python: runs one step.
        make_killer: of run folder and moment.
        clip_list: JSON file of the clips to pack.
    """

    def __init__(
        self,
        config: RunConfig,
        arguments: Sequence[str],
        *,
        run_python: RunPython = run_python_here,
        make_killer: Callable[[str, KillMoment], Killer] = WorkerKiller,
        clip_list: str = CLIP_LIST,
    ) -> None:
        self._run_python = run_python
        self._make_killer = make_killer
        self._clip_list = clip_list
        self._config = config
        self._arguments = list(arguments)
        self._folder = config.run.folder
        self._commands: list[dict[str, Any]] = []

    def run(self) -> str:
        """Do all steps; return where the video and the report are."""
        started = time.monotonic()
        self._clear()
        self._pack()
        self._step("precompute_latents")
        self._precompute_again()
        self._train_with_a_kill()
        self._step("check_codec")
        self._step("sample")
        # Before the report, which shows them.
        storage.write_json(storage.join(self._folder, "commands.json"), self._commands)
        self._step("report")
        minutes, seconds = divmod(round(time.monotonic() - started), 60)
        videos = storage.read_json(storage.join(self._folder, "samples", "samples.json"))
        say("")
        for video in videos:
            say(f"video   {storage.join(self._folder, 'samples', video['file'])}   {video['prompt']}")
        say(f"report  {storage.join(self._folder, 'report.html')}")
        return f"done in {minutes}:{seconds:02d} min"

    def _clear(self) -> None:
        if storage.list_folder(self._folder):
            # Looked at again, right before: the preflight was a moment ago.
            require_own_folder(self._folder)
            say(f"Removing {self._folder} of an earlier demo, so that all of it is done again.")
            shutil.rmtree(self._folder)
        storage.write_bytes(
            storage.join(self._folder, MARKER), b"jobs.demo removes this folder when it starts again.\n"
        )

    def _pack(self) -> None:
        shards = storage.join(self._folder, "shards")
        say(
            f"\nPacking real clips from installed packages, and one broken file, into {shards}"
            "\n(in this process, by data_pipeline/demo_clips.py; the steps below are commands to copy)"
        )
        clips = [clip for clip in read_clip_list(self._clip_list) if clip.is_in_demo]
        records = pack_demo(clips, shards, num_clips_per_shard=CLIPS_PER_SHARD, num_threads=os.cpu_count() or 1)
        for _ in tqdm(records, total=len(clips), desc="pack", unit="clip"):
            pass

    def _precompute_again(self) -> None:
        """Run the precompute a second time and check that it left the cache as it was."""
        before = snapshot(self._config.precompute.cache)
        say("\nOnce more: what is done is not done again.")
        self._step("precompute_latents")
        # A file that is new, gone or other is in one of the two alone.
        changed = sorted({name for name, _ in before.items() ^ snapshot(self._config.precompute.cache).items()})
        if changed:
            raise ClaimFailedError(f"the second precompute changed {', '.join(changed[:5])}; it should do nothing.")

    def _train_with_a_kill(self) -> None:
        stage = self._config.curriculum[-1]
        moment = KillMoment(
            curriculum_stage=stage.name,
            min_stage_steps=stage.num_steps // 2,
            min_steps_after_checkpoint=MIN_REDONE_STEPS,
            max_steps_after_checkpoint=self._config.trainer.checkpoint_every_steps - 2,
        )
        killer = self._make_killer(self._folder, moment)

        def look() -> None:
            kill = killer.look()
            if kill is not None:
                say(
                    f"\n*** Killing rank {kill.rank} (pid {kill.pid}) with SIGKILL after step {kill.step}. ***"
                    "\nRay will now report the lost worker at length; that is expected. Training then goes on from the "
                    f"checkpoint of step {kill.checkpoint_step}.\n"
                )
                storage.write_json(storage.join(self._folder, "kill.json"), dataclasses.asdict(kill))

        self._step("train", look)
        if killer.kill is None:
            raise ClaimFailedError(
                f"training ended before a worker could be killed in stage {stage.name!r}; raise its num_steps."
            )
        metrics = read_metrics(self._folder)
        check = prove_redone_steps_equal(metrics, self._config.total_steps)
        storage.write_json(storage.join(self._folder, "fault_check.json"), check)
        say(f"\nThe {check['num_redone']} steps that were redone after the kill are equal bit for bit:")
        for step in check["redone"]:
            say(f"  step {step['step']:>5}  loss {step['first_loss']!r} = {step['second_loss']!r}")
        fell = prove_held_out_loss_fell(metrics, num_steps=self._config.total_steps, min_steps=shipped_num_steps())
        say(f"\n{fell}")

    def _step(self, verb: str, look: Callable[[], None] = lambda: None) -> None:
        """Run one verb as a command of its own, showing it; `look` is called while it runs."""
        arguments = ["-m", f"jobs.{verb}", *self._arguments]
        command = shlex.join([_shown_python(), *arguments])
        say(f"\n$ {command}")
        started = time.monotonic()
        exit_code = self._run_python(arguments, look)
        entry = {"command": command, "exit_code": exit_code, "seconds": time.monotonic() - started}
        self._commands.append(entry)
        if exit_code != 0:
            raise StepFailedError(command, exit_code)


def snapshot(folder: str) -> dict[str, tuple[int, int]]:
    """Size and time of change of the shards and index files of a cache."""
    files = [path for part in ("shards", "index") for path in Path(folder, part).rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def say(text: str) -> None:
    """Show a line of the demo, in order with what the steps print."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _shown_python() -> str:
    """This interpreter as a person would type it here."""
    relative = os.path.relpath(sys.executable)
    return sys.executable if relative.startswith("..") else relative


def shipped_num_steps() -> int:
    """Steps of the config that ships with the demo: a run of fewer learns too little to prove that it learns."""
    return load_config(str(CONFIGS / "demo.toml"), []).total_steps


def require_own_folder(folder: str) -> None:
    """Refuse to remove what the demo did not make.

    Raises:
        ConfigError: the folder holds something and no marker of the demo, or is a link or a file.
    """
    if os.path.islink(folder.rstrip("/")) or (os.path.exists(folder) and not os.path.isdir(folder)):
        raise ConfigError(f"run.folder={folder} is a link or a file; the demo removes its folder, so give a plain one.")
    # A verb that was refused leaves its reason, or empty folders: no work of anybody's is lost with that.
    there = [
        name for name in storage.list_folder(folder) if name != "result.json" and not _holds_nothing(Path(folder, name))
    ]
    if there and MARKER not in there:
        raise ConfigError(
            f"run.folder={folder} is not empty ({', '.join(there[:3])}) and was not made by the demo (no {MARKER} in "
            "it). The demo removes its folder before it starts: remove it yourself, or give another."
        )


def _holds_nothing(path: Path) -> bool:
    """Whether a path is a folder with nothing in it but such folders; a link is something."""
    return all(entry.is_dir() and not entry.is_symlink() for entry in (path, *path.rglob("*")))


def check_config(config: RunConfig) -> None:
    """Check all that the demo needs of its config, before anything is removed, packed or trained.

    Raises:
        ConfigError: with the override to give.
    """
    folder = config.run.folder
    if storage.is_remote(folder):
        raise ConfigError(f"run.folder={folder}: the demo kills a local worker; give a local folder.")
    require_own_folder(folder)
    _check_paths(config)
    every, stage = config.trainer.checkpoint_every_steps, config.curriculum[-1]
    if every < MIN_REDONE_STEPS + 2:
        raise ConfigError(
            f"trainer.checkpoint_every_steps={every}: the demo kills a worker at least {MIN_REDONE_STEPS} steps after "
            f"a checkpoint and 2 before the next; give {MIN_REDONE_STEPS + 2} or more."
        )
    needed = 2 * (every + MIN_REDONE_STEPS)
    if stage.num_steps < needed:
        raise ConfigError(
            f"curriculum {stage.name!r}: num_steps={stage.num_steps}, but the kill falls in its second half, after a "
            f"checkpoint; give {needed} or more, or a smaller trainer.checkpoint_every_steps."
        )
    if config.logging.every_steps != 1:
        raise ConfigError(f"logging.every_steps={config.logging.every_steps}: the demo compares each step; give 1.")
    if config.launch.max_failures == 0:
        raise ConfigError("launch.max_failures=0: the demo kills a worker, which must come back; give 1 or more.")
    if config.trainer.held_out_slots == 0 or not config.held_out_sources:
        raise ConfigError(
            "the demo shows that the held-out loss falls; it needs trainer.held_out_slots > 0 and a source with "
            'split = "held_out".'
        )


def _check_paths(config: RunConfig) -> None:
    """Shards are packed into the run folder, and the cache is made anew: both must be read from there."""
    folder = os.path.abspath(config.run.folder)

    def is_inside(path: str) -> bool:
        return not storage.is_remote(path) and os.path.abspath(path).startswith(folder + os.sep)

    given = [("precompute.cache", config.precompute.cache)]
    given += [(f"sources.{index}.shards", source.shards) for index, source in enumerate(config.sources)]
    outside = [(key, path) for key, path in given if not is_inside(path)]
    if outside:
        places = {key: "" if key == "precompute.cache" else "/shards" for key, _ in outside}
        way_out = " ".join(f"'{key}={config.run.folder}{places[key]}/{_name(path)}'" for key, path in outside)
        found = ", ".join(f"{key}={path}" for key, path in outside)
        raise ConfigError(
            f"run.folder={config.run.folder}, but {found}: the demo packs its shards into run.folder and makes the "
            f"cache there; add {way_out}."
        )


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def count_gpus() -> int:
    """GPUs that torch sees here; the demo's only question about them."""
    import torch

    return torch.cuda.device_count()


def gpu_overrides(num_gpus: int, given: Sequence[str]) -> list[str]:
    """The overrides that put the demo on GPUs; none without a GPU, or where the user has decided.

    Args:
        num_gpus: GPUs of this machine.
        given: the user's overrides.
    """
    if num_gpus == 0 or any(argument.startswith("launch.use_gpu=") for argument in given):
        return []
    return ["launch.use_gpu=true", f"launch.num_workers={min(MAX_GPUS, num_gpus)}", "trainer.precision=bfloat16"]


def step_arguments(config: str, overrides: Sequence[str], num_gpus: int) -> list[str]:
    """What every step is called with: the config, what the machine asks for, and the user's own words last, to win."""
    return ["--config", config, *gpu_overrides(num_gpus, overrides), *overrides]


def main(argv: Sequence[str] | None = None, make_demo: Callable[[RunConfig, Sequence[str]], Demo] = Demo) -> int:
    """Run the demo that `make_demo` makes of config and step arguments; without `--config` on its own config."""
    arguments = cli.parse_arguments("demo", DESCRIPTION, argv, default_config=CONFIG)
    passed_on = step_arguments(arguments.config, arguments.overrides, count_gpus())

    def demo(config: RunConfig, dry_run: bool) -> str:
        if dry_run:
            return f"would remove {config.run.folder} and do all steps there"
        return make_demo(config, passed_on).run()

    given = [*passed_on, "--dry-run"] if arguments.dry_run else passed_on
    return cli.main("demo", demo, DESCRIPTION, given, preflight=check_config)


if __name__ == "__main__":
    sys.exit(main())
