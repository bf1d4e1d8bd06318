"""FLOPs of the micro-batches of a run, for the trainer, which knows no model: what MFU and HFU are made of."""

from functools import lru_cache

from m4v_dist.batch import LatentBatch
from m4v_dist.bench.flops_tables import column_of
from m4v_dist.config.schema import RunConfig
from m4v_dist.model.flops import training_flops
from m4v_dist.trainer.seams import BatchFlops


def flops_of_batches(config: RunConfig) -> BatchFlops:
    """Forward and backward of a micro-batch by `model/flops.py`, from its slots, grids and texts.

    A slot whose text the objective drops counts its own text's tokens, not the empty prompt's.
    """
    model, num_pyramid_stages = config.model, config.objective.num_pyramid_stages
    plain = model.model_copy(update={"recompute": "none"})

    @lru_cache(maxsize=4096)
    def of_column(
        grid: tuple[int, int], num_text: int, unit: int, stage: int, freeze: tuple[str, ...]
    ) -> tuple[int, int]:
        columns = column_of(
            grid,
            num_text,
            patch_size=model.patch_size,
            num_pyramid_stages=num_pyramid_stages,
            has_temporal_mask=model.has_temporal_mask,
        )
        column = columns(unit, stage)
        return training_flops(plain, column, freeze).total(), training_flops(model, column, freeze).total()

    def of_batch(batch: LatentBatch, freeze: tuple[str, ...]) -> tuple[float, float]:
        needed = computed = 0
        for slot, latents, text, weight in zip(batch.slots, batch.latents, batch.text, batch.weights, strict=True):
            grid = (latents.shape[-2], latents.shape[-1])
            alone, with_recompute = of_column(grid, text.tokens.shape[0], slot.unit, slot.pyramid_stage, freeze)
            # A filler slot is computed and needed by nobody.
            needed += alone if weight else 0
            computed += with_recompute
        return needed, computed

    return of_batch
