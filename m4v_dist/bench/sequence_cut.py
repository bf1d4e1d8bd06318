"""How evenly a run's micro-batches are cut over sequence ranks: the line of a dry run; arithmetic alone."""

from collections.abc import Sequence

from m4v_dist.batch import LatentBatch
from m4v_dist.bench.flops_tables import column_of
from m4v_dist.blocks.layout import ColumnShape, cut_imbalance
from m4v_dist.config.schema import RunConfig


def batch_columns(config: RunConfig, batch: LatentBatch) -> tuple[ColumnShape, ...]:
    """Columns that the model makes of a micro-batch; a dropped text counts as the record's."""
    columns = []
    for slot, latents, text in zip(batch.slots, batch.latents, batch.text, strict=True):
        shape_of = column_of(
            (latents.shape[2], latents.shape[3]),
            text.tokens.shape[0],
            patch_size=config.model.patch_size,
            num_pyramid_stages=config.objective.num_pyramid_stages,
            has_temporal_mask=config.model.has_temporal_mask,
        )
        columns.append(shape_of(slot.unit, slot.pyramid_stage))
    return tuple(columns)


def sequence_line(config: RunConfig, batches: Sequence[LatentBatch]) -> str:
    """What the sequence ranks of a data rank share.

    Args:
        config: of the run, with more than one sequence rank.
        batches: planned micro-batches, at least one.
    """
    size = config.launch.sequence_parallel
    columns = [batch_columns(config, batch) for batch in batches]
    shares = [cut_imbalance(shapes, size) for shapes in columns]
    num_short = sum(sum(len(shape.frames) for shape in shapes) < size for shapes in columns)
    return (
        f"each micro-batch is cut over {size} sequence ranks ({config.launch.num_data_ranks} data ranks): the fullest "
        f"holds {sum(shares) / len(shares):.2f} times its mean share of tokens, at worst {max(shares):.2f}; "
        f"{num_short} of {len(shares)} have fewer frames than ranks, which leaves ranks with attention heads alone"
    )
