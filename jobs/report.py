"""`python -m jobs.report`: a run folder to one self-contained HTML page at `<run>/report.html`."""

import sys
import time

from jobs import cli
from m4v_dist import storage
from m4v_dist.config.schema import RunConfig
from m4v_dist.model.build import build_on_meta
from m4v_dist.report.page import render_page
from m4v_dist.report.run_folder import read_run


def report(config: RunConfig, dry_run: bool) -> str:
    """Write the page.

    Raises:
        DataError: the run has no metrics, or a video that it names is missing.
    """
    path = storage.join(config.run.folder, "report.html")
    if dry_run:
        return f"would write {path} from {config.run.folder} and {config.precompute.cache}"
    record = read_run(config.run.folder, config.precompute.cache)
    # On the meta device: the number alone, no memory.
    parameters = sum(p.numel() for p in build_on_meta(config.model, config.kernels).parameters())
    page = render_page(record, name=config.run.name, date=time.strftime("%d %B %Y"), num_parameters=parameters)
    storage.write_bytes(path, page.encode())
    return f"wrote {path} ({len(page) / 1e6:.1f} MB)"


if __name__ == "__main__":
    sys.exit(
        cli.main(
            "report", report, "Show a run folder as one self-contained HTML page.", preflight=cli.require_run_folder
        )
    )
