"""The command line of every verb: `--config FILE`, `--dry-run`, dotted overrides `key=value`; nothing else, ever.

Maps errors to exit codes (m4v_dist/errors.py), prints the reason as the last line and writes `<run>/result.json`.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence

from m4v_dist import storage
from m4v_dist.config.load import load_config
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, DataError, JobError

Verb = Callable[[RunConfig, bool], str]
"""A verb takes the run's config and whether this is a dry run, and returns one line that says what was done."""
Preflight = Callable[[RunConfig], None]
"""Checks a config before anything is written, the run folder's `result.json` included."""

UNEXPECTED_EXIT_CODE = 1
"""What Python gives for an error that nobody caught; the traceback is shown too."""


def main(
    name: str,
    verb: Verb,
    description: str,
    argv: Sequence[str] | None = None,
    preflight: Preflight | None = None,
    writes: bool = True,
) -> int:
    """Parse the command line, run `verb`, report; return the exit code.

    Args:
        name: the verb, as in `python -m jobs.<name>`.
        verb: what to run.
        description: one sentence for `--help`.
        argv: arguments; None takes the process's.
        preflight: what must hold before the run folder is touched.
        writes: False for a verb that writes nothing: the run folder is not asked for, and gets no `result.json`.

    Raises:
        BaseException: what is no JobError passes through, once `result.json` says so.
    """
    arguments = parse_arguments(name, description, argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    result = _ResultFile(name)
    try:
        config = load_config(arguments.config, arguments.overrides)
        check_kept(config, os.getcwd())
        if preflight is not None:
            preflight(config)
        if writes and not arguments.dry_run:
            check_writable(config.run.folder)
            result.open(config.run.folder)
        reason, exit_code = verb(config, arguments.dry_run), 0
    except JobError as error:
        reason, exit_code = f"{type(error).__name__}: {error}", error.exit_code
    except BaseException as error:
        result.write(UNEXPECTED_EXIT_CODE, f"{type(error).__name__}: {error}")
        raise
    result.write(exit_code, reason)
    # The last line is the contract with the job's message, so it goes out after all logging.
    logging.shutdown()
    print(f"{name}: {reason}", file=sys.stderr if exit_code else sys.stdout, flush=True)
    return exit_code


def parse_arguments(
    name: str, description: str, argv: Sequence[str] | None = None, default_config: str | None = None
) -> argparse.Namespace:
    """Parse a verb's command line into `config` (a path), `dry_run` and `overrides`.

    Args:
        name, description, argv: as for `main`.
        default_config: taken where `--config` is left out; None requires it.

    Raises:
        SystemExit: `--help`, or what is no command line of a verb (exit code 2).
    """
    parser = argparse.ArgumentParser(prog=f"python -m jobs.{name}", description=description)
    parser.add_argument(
        "--config",
        required=default_config is None,
        default=default_config,
        metavar="FILE",
        help="TOML of the run" + (f" (default: {default_config})" if default_config else ""),
    )
    parser.add_argument("--dry-run", action="store_true", help="check and print the plan, touch nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    # Intermixed, so that `a.b=1 --config FILE c.d=2` is taken too.
    return parser.parse_intermixed_args(argv)


def parse_subject(name: str, subjects: Sequence[str], description: str, argv: Sequence[str]) -> tuple[str, list[str]]:
    """Split the command line of a verb with subjects into the subject, which comes first, and what every verb takes.

    Raises:
        SystemExit: `--help`, or no such subject (exit code 2).
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m jobs.{name}",
        description=description,
        epilog="After the subject: --config FILE [--dry-run] [section.key=value ...]",
    )
    parser.add_argument("subject", choices=subjects, help="comes first")
    late = next((word for word in argv[1:] if word in subjects), None)
    if late is not None and argv[0] not in subjects:
        parser.error(
            f"the subject comes first, before {argv[0]}: python -m jobs.{name} {late} --config FILE (subjects: "
            f"{', '.join(subjects)})"
        )
    # Only the first word is the subject: an option before it is the user's slip, and the message names the subjects.
    return parser.parse_args(argv[:1]).subject, list(argv[1:])


class _ResultFile:
    """`<run>/result.json`: how the last job on a run folder ended; nothing is written before `open`."""

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._path: str | None = None
        self._started = time.time()

    def open(self, run_folder: str) -> None:
        """Take a folder that can be written, and remove what an earlier job said: this one may be killed."""
        self._path = storage.join(run_folder, "result.json")
        storage.remove(self._path)

    def write(self, exit_code: int, reason: str) -> None:
        if self._path is not None:
            seconds = round(time.time() - self._started, 1)
            result = {"verb": self._verb, "exit_code": exit_code, "reason": reason, "seconds": seconds}
            storage.write_json(self._path, result)


_JOB_WORKING_DIR = "/runtime_resources/working_dir_files/"
"""Part of the path of the working directory that Ray unpacks for a submitted job, and removes after it."""


def check_kept(config: RunConfig, working_folder: str) -> None:
    """Refuse to write beside the unpacked code of a submitted job, where Ray removes it and other nodes do not see it.

    Args:
        config: of the run.
        working_folder: where this process stands.

    Raises:
        ConfigError: in a submitted job, run folder, cache, start weights or an export are a relative path.
    """
    if _JOB_WORKING_DIR not in working_folder + "/":
        return
    paths = {
        "run.folder": config.run.folder,
        "precompute.cache": config.precompute.cache,
        "warm_start.weights": config.warm_start.weights,
        "trainer.checkpoint_folder": config.trainer.checkpoint_folder,
        "export.path": config.export.path,
    }
    for setting, path in paths.items():
        if path is not None and not storage.is_remote(path) and not os.path.isabs(path):
            raise ConfigError(
                f"{setting}={path} is relative, and a submitted job stands in a copy of the code that Ray removes when "
                f"it ends ({working_folder}); give an absolute path that every node sees, by {setting}=/..."
            )


def require_run_folder(config: RunConfig) -> None:
    """Refuse to look into a run folder that is not there, before `result.json` makes one; a verb's `preflight`.

    Raises:
        DataError: there is nothing at `run.folder`.
    """
    folder = config.run.folder
    if not storage.list_folder(folder):
        raise DataError(
            f"run.folder={folder}: no such run (nothing is there); name a run's folder, or train one first."
        )


def check_writable(folder: str, setting: str = "run.folder") -> None:
    """Write and remove a small file in `folder`, before any worker starts; `setting` is what names it in the config.

    Raises:
        ConfigError: it cannot be written.
    """
    probe = storage.join(folder, ".write-probe")
    try:
        storage.write_bytes(probe, b"")
        storage.remove(probe)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error}); give a folder that this user may write to, by {setting}=..."
        ) from error
