"""`python -m jobs.benchmark SUBJECT --config FILE`: figures about the model of a run; the subject comes first.

flops: FLOPs by part, of a forward, a training row, an optimizer step and a generated clip, the paper's figures beside
ours, and parameters by part. Pure arithmetic: it runs no model and writes nothing.
"""

import argparse
import sys
from collections.abc import Sequence

from jobs import cli
from m4v_dist.bench.flops_tables import flops_report
from m4v_dist.config.schema import RunConfig

SUBJECTS = ("flops",)


def flops(config: RunConfig, dry_run: bool) -> str:
    """Print the tables."""
    if dry_run:
        return "would print the FLOPs and parameter tables of this config; writes nothing"
    sys.stdout.write(flops_report(config) + "\n\n")
    return "figures by arithmetic, none measured"


def parse_subject(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Split the command line into the subject and what every verb takes.

    Raises:
        SystemExit: `--help`, or no such subject (exit code 2).
    """
    parser = argparse.ArgumentParser(
        prog="python -m jobs.benchmark",
        description="Figures about the model of a run.",
        epilog="After the subject: --config FILE [--dry-run] [section.key=value ...]",
    )
    parser.add_argument("subject", choices=SUBJECTS, help="comes first")
    # Only the first word is the subject: an option before it is the user's slip, and the message names the subjects.
    return parser.parse_args(argv[:1]).subject, list(argv[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run; return the exit code."""
    subject, rest = parse_subject(sys.argv[1:] if argv is None else argv)
    match subject:
        case "flops":
            return cli.main("benchmark flops", flops, "Print FLOPs and parameters.", rest, writes=False)
    raise AssertionError(subject)


if __name__ == "__main__":
    sys.exit(main())
