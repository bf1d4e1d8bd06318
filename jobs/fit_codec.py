"""`python -m jobs.fit_codec`: fit the embedded pca codec on real clips and state its PSNR on clips it never saw.

The one verb without `--config`: it makes a file that ships with the package, belongs to no run, and needs nothing of a
run's TOML. What it does is `data_pipeline/codec_fit.py`.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.codec_fit import fit_codec
from m4v_dist.errors import JobError
from m4v_dist.frozen.pca_codec import EMBEDDED_WEIGHTS

CLIP_LIST = str(Path(__file__).parent / "configs" / "demo_clips.json")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.fit_codec", description=__doc__.split("\n")[0])
    parser.add_argument("--clips", default=CLIP_LIST, help="JSON list of clips with file and split")
    parser.add_argument("--out", default=EMBEDDED_WEIGHTS, help="safetensors file to write")
    parser.add_argument("--channels", type=int, default=16, help="latent channels")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        sys.stdout.write(f"fit_codec: {fit_codec(arguments.clips, arguments.out, arguments.channels)}\n")
    except JobError as error:
        sys.stderr.write(f"fit_codec: {type(error).__name__}: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
