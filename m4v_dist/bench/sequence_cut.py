"""How evenly a run's micro-batches are cut over sequence ranks: the line of a dry run; arithmetic alone."""

from collections.abc import Sequence

from m4v_dist.blocks.layout import ColumnShape, cut_imbalance
from m4v_dist.config.schema import RunConfig


def sequence_line(config: RunConfig, batches: Sequence[Sequence[ColumnShape]]) -> str:
    """What the sequence ranks of a data rank share.

    Args:
        config: of the run, with more than one sequence rank.
        batches: the columns of planned micro-batches, at least one.
    """
    size = config.launch.sequence_parallel
    shares = [cut_imbalance(shapes, size) for shapes in batches]
    num_short = sum(sum(len(shape.frames) for shape in shapes) < size for shapes in batches)
    return (
        f"each micro-batch is cut over {size} sequence ranks ({config.launch.num_data_ranks} data ranks): the fullest "
        f"holds {sum(shares) / len(shares):.2f} times its mean share of tokens, at worst {max(shares):.2f}; "
        f"{num_short} of {len(shares)} have fewer frames than ranks, which leaves ranks with attention heads alone"
    )
