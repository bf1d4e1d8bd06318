"""`python -m jobs.demo` (`make demo`): the main job end to end on real clips, each step as a command to copy.

Packs shards, precomputes twice (the second time does nothing), trains while one worker is killed, proves that the
redone steps are equal, samples, and writes the report. Stops at the first step that fails, with its exit code.
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
from typing import Any

from tqdm import tqdm

from data_pipeline.demo_clips import pack_demo, read_clip_list
from jobs import cli
from m4v_dist import storage
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, DataError, JobError
from m4v_dist.launch.fault_injection import KillMoment, WorkerKiller
from m4v_dist.report.fault import prove_redone_steps_equal
from m4v_dist.report.run_folder import read_metrics

CONFIG = "jobs/configs/demo.toml"
CLIP_LIST = str(Path(__file__).parent / "configs" / "demo_clips.json")
CLIPS_PER_SHARD = 11
MIN_REDONE_STEPS = 5
"""Steps after a checkpoint before the kill: what is lost, done again, and compared."""
POLL_S = 0.05
"""Pause between two looks at a step that runs: shorter than a training step, so that the kill falls where it should."""


class StepFailedError(JobError):
    """A step of the demo ended with another exit code than 0, which becomes the demo's own."""

    def __init__(self, command: str, exit_code: int) -> None:
        super().__init__(f"exit code {exit_code} from: {command}")
        self.exit_code = exit_code


class Demo:
    """The steps of one demo; `arguments` (the config and its overrides) go to every step."""

    def __init__(self, config: RunConfig, arguments: Sequence[str]) -> None:
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
            say(f"Removing {self._folder} of an earlier demo, so that all of it is done again.")
            shutil.rmtree(self._folder)

    def _pack(self) -> None:
        shards = storage.join(self._folder, "shards")
        say(f"\nPacking real clips from installed packages, and one broken file, into {shards}")
        clips = read_clip_list(CLIP_LIST)
        records = pack_demo(clips, shards, num_clips_per_shard=CLIPS_PER_SHARD, num_threads=os.cpu_count() or 1)
        for _ in tqdm(records, total=len(clips), desc="pack", unit="clip"):
            pass

    def _precompute_again(self) -> None:
        """Run the precompute a second time and check that it left the cache as it was."""
        before = snapshot(self._config.precompute.cache)
        say("\nOnce more: what is done is not done again.")
        self._step("precompute_latents")
        changed = sorted(
            name for name, stamp in snapshot(self._config.precompute.cache).items() if before.get(name) != stamp
        )
        if changed:
            raise DataError(f"the second precompute wrote {', '.join(changed[:5])} again; it should do nothing.")

    def _train_with_a_kill(self) -> None:
        stage = self._config.curriculum[-1]
        moment = KillMoment(
            curriculum_stage=stage.name,
            min_stage_steps=stage.num_steps // 2,
            min_steps_after_checkpoint=MIN_REDONE_STEPS,
            max_steps_after_checkpoint=self._config.trainer.checkpoint_every_steps - 2,
        )
        killer = WorkerKiller(self._folder, moment)

        def look() -> None:
            kill = killer.look()
            if kill is not None:
                say(f"\n*** Killing rank {kill.rank} (pid {kill.pid}) with SIGKILL after step {kill.step}. ***\n")
                storage.write_json(storage.join(self._folder, "kill.json"), dataclasses.asdict(kill))

        self._step("train", look)
        if killer.kill is None:
            raise DataError(f"training ended before a worker could be killed in stage {stage.name!r}; raise num_steps.")
        check = prove_redone_steps_equal(read_metrics(self._folder), self._config.total_steps)
        storage.write_json(storage.join(self._folder, "fault_check.json"), check)
        say(f"\nThe {check['num_redone']} steps that were redone after the kill are equal bit for bit:")
        for step in check["redone"]:
            say(f"  step {step['step']:>5}  loss {step['first_loss']!r} = {step['second_loss']!r}")

    def _step(self, verb: str, look: Callable[[], None] | None = None) -> None:
        """Run one verb as a command of its own, showing it; `look` is called while it runs."""
        arguments = ["-m", f"jobs.{verb}", *self._arguments]
        command = shlex.join([_shown_python(), *arguments])
        say(f"\n$ {command}")
        started = time.monotonic()
        with subprocess.Popen([sys.executable, *arguments]) as process:
            while process.poll() is None:
                if look is not None:
                    look()
                time.sleep(POLL_S)
        entry = {"command": command, "exit_code": process.returncode, "seconds": time.monotonic() - started}
        self._commands.append(entry)
        if process.returncode != 0:
            raise StepFailedError(command, process.returncode)


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


def main(arguments: Sequence[str]) -> int:
    """Run the demo; without `--config` on its own config."""
    given = list(arguments)
    if not any(argument.split("=")[0] == "--config" for argument in given):
        given = ["--config", CONFIG, *given]
    passed_on = [argument for argument in given if argument != "--dry-run"]

    def demo(config: RunConfig, dry_run: bool) -> str:
        if storage.is_remote(config.run.folder):
            raise ConfigError(f"run.folder={config.run.folder}: the demo kills a local worker; give a local folder.")
        if dry_run:
            return f"would remove {config.run.folder} and do all steps there"
        return Demo(config, passed_on).run()

    return cli.main("demo", demo, "The main job end to end on real clips.", given)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
