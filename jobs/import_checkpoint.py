"""`python -m jobs.import_checkpoint --config run.toml`: PyramidFlow's transformer to this model's start weights.

Reads `warm_start.source`, writes every parameter of the config's model to `warm_start.weights`, by default in the run
folder, with `report.json` beside it: what each was loaded or mapped from, what stayed fresh. `jobs.train` with the same
config begins there. The checkpoint must be whole: the rules are in `m4v_dist/model/warm_start.py`.
"""

import logging
import os
import sys

from jobs import cli
from m4v_dist import storage
from m4v_dist.config.schema import RunConfig
from m4v_dist.errors import ConfigError
from m4v_dist.model.build import build_model, build_on_meta
from m4v_dist.model.checkpoint_config import check_released_config
from m4v_dist.model.checkpoint_files import CheckpointReader, find_files
from m4v_dist.model.start_weights import write_start_weights
from m4v_dist.model.warm_start import apply_warm_start, plan_warm_start
from m4v_dist.model.warm_start_report import report_json, report_parameters, report_table, summary
from m4v_dist.weights_file import sha256

logger = logging.getLogger(__name__)

REPORT = "report.json"


def import_checkpoint(config: RunConfig, dry_run: bool) -> str:
    """Plan, report, and write the start weights.

    Raises:
        ConfigError: no source is named, or nothing is there, or its config.json or its sizes are of another model than
            the config's; or the output cannot be written.
        DataError: the checkpoint is damaged, or not that of this model with attention in every unified block.
    """
    source, weights = config.warm_start.source, config.start_weights
    if source is None or weights is None:
        raise ConfigError(
            "warm_start.source is not set, and it names what to import; give PyramidFlow's transformer (its "
            "diffusion_transformer_384p folder, say), by warm_start.source=..."
        )
    if storage.is_remote(weights):
        raise ConfigError(f"{weights} is not local; give warm_start.weights a local or mounted file.")
    files = find_files(source, "warm_start.source")
    check_released_config(source, config.model)
    reader = CheckpointReader(files)
    on_meta = build_on_meta(config.model, config.kernels)
    plan = plan_warm_start(on_meta, reader.layout, source)
    reports = report_parameters(on_meta, plan)
    logger.info("start weights from %s\n%s", ", ".join(reader.files), report_table(reports, plan))
    if dry_run:
        return (
            f"dry run: would write {weights}, {summary(reports)}; names and shapes checked, values not read, nothing "
            "was written"
        )
    folder = os.path.dirname(weights)
    cli.check_writable(folder or ".", setting="warm_start.weights")
    model = build_model(config.model, config.kernels, seed=config.run.seed)
    apply_warm_start(model, plan, reader.read)
    report = {
        "source": source,
        "files": {path: sha256(path) for path in reader.files},
        "weights": weights,
        "seed": config.run.seed,
        "model": config.model.model_dump(mode="json"),
        **report_json(reports, plan),
    }
    storage.write_json(storage.join(folder or ".", REPORT), report)
    write_start_weights(weights, model, config)
    return f"{weights}: {summary(reports)}"


if __name__ == "__main__":
    sys.exit(cli.main("import_checkpoint", import_checkpoint, "Turn PyramidFlow's weights into start weights."))
