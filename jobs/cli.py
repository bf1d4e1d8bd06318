"""The command line of every verb: `--config FILE`, `--dry-run`, dotted overrides `key=value`; nothing else, ever.

Maps errors to the exit codes of design contract 5, prints the reason as the last line and writes `<run>/result.json`.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence

from m4v_dist import storage
from m4v_dist.config.load import load_config
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError, JobError

Verb = Callable[[RunConfig, bool], str]
"""A verb takes the run's config and whether this is a dry run, and returns one line that says what was done."""


def main(name: str, verb: Verb, description: str, argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run `verb`, report; return the exit code.

    Args:
        name: the verb, as in `python -m jobs.<name>`.
        verb: what to run.
        description: one sentence for `--help`.
        argv: arguments; None takes the process's.
    """
    parser = argparse.ArgumentParser(prog=f"python -m jobs.{name}", description=description)
    parser.add_argument("--config", required=True, metavar="FILE", help="TOML of the run")
    parser.add_argument("--dry-run", action="store_true", help="check and print the plan, touch nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    config: RunConfig | None = None
    started = time.time()
    try:
        config = load_config(arguments.config, arguments.overrides)
        if not arguments.dry_run:
            check_writable(config.run.folder)
        reason, exit_code = verb(config, arguments.dry_run), 0
    except JobError as error:
        reason, exit_code = f"{type(error).__name__}: {error}", error.exit_code
    if config is not None and not arguments.dry_run and exit_code != ConfigError.exit_code:
        result = {"verb": name, "exit_code": exit_code, "reason": reason, "seconds": round(time.time() - started, 1)}
        storage.write_json(storage.join(config.run.folder, "result.json"), result)
    # The last line is the contract with the job's message, so it goes out after all logging.
    logging.shutdown()
    print(f"{name}: {reason}", file=sys.stderr if exit_code else sys.stdout, flush=True)
    return exit_code


def check_writable(folder: str) -> None:
    """Write and remove a small file in `folder`, before any worker starts.

    Raises:
        ConfigError: it cannot be written.
    """
    probe = storage.join(folder, ".write-probe")
    try:
        storage.write_bytes(probe, b"")
        storage.remove(probe)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error}); give a folder that this user may write to, by run.folder=..."
        ) from error
