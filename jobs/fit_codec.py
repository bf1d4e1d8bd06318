"""`python -m jobs.fit_codec`: fit the embedded pca codec on real clips and state its PSNR on clips it never saw.

The one verb without `--config`: it makes a file that ships with the package, belongs to no run, and needs nothing of a
run's TOML. `--dry-run`, the exit codes and the last line are every verb's. The work is in `data_pipeline/codec_fit.py`.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.codec_fit import fit_codec, plan_fit
from jobs.cli import check_writable
from m4v_dist.errors import JobError
from m4v_dist.frozen.pca_codec import EMBEDDED_WEIGHTS

CLIP_LIST = str(Path(__file__).parent / "configs" / "demo_clips.json")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line into `clips`, `out`, `channels` and `dry_run`.

    Raises:
        SystemExit: `--help`, or no command line of this verb (exit code 2).
    """
    parser = argparse.ArgumentParser(prog="python -m jobs.fit_codec", description=__doc__.split("\n")[0])
    parser.add_argument("--clips", default=CLIP_LIST, help="JSON list of clips with file and split")
    parser.add_argument("--out", default=EMBEDDED_WEIGHTS, help="safetensors file to write")
    parser.add_argument("--channels", type=int, default=16, help="latent channels")
    parser.add_argument("--dry-run", action="store_true", help="check and print the plan, touch nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run; return the exit code."""
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        plan = plan_fit(arguments.clips, arguments.channels)
        if arguments.dry_run:
            reason = f"would fit {arguments.channels} channels on {plan}, and write {arguments.out}"
        else:
            check_writable(os.path.dirname(arguments.out) or ".", setting="--out")
            reason = fit_codec(plan, arguments.out, arguments.channels)
    except JobError as error:
        sys.stderr.write(f"fit_codec: {type(error).__name__}: {error}\n")
        return error.exit_code
    sys.stdout.write(f"fit_codec: {reason}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
