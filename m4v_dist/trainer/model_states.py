"""What one rank holds of a model beside activations, by arithmetic: the ZeRO stages as DeepSpeed 0.19 has them.

All in float32. Where gradients are reduced once a step (`ZeroEngine.accumulate`) they are whole on every rank at every
stage. Held against a real engine of two ranks in `tests/trainer/test_model_states.py`.

On the host: what `trainer.offload` puts there, the buffer of a checkpoint's snapshot, and what the model's build takes
before the engine has its weights. Not counted: Python, libraries, the loader's batches.
"""

from dataclasses import dataclass

FLOAT32 = 4
REDUCE_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default; the buffer is made whole, however small the model."""
GATHERED_ELEMENTS = 1_000_000_000
"""ZeRO-3 lets go of gathered parameters past so many (stage3_max_live_parameters). Those that it never lets go, of less
than 100,000 elements (adapters of a small rank, too), count among them."""


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of a model.

    Args:
        all: of the whole model.
        trained: of them, those that are not frozen: only these have gradients, moments and master weights.
        averaged: of all, those that have an average: what some curriculum stage trains.
        largest: of the largest parameter that trains; read with offload.
        largest_part: of the largest part (a block, an embedder) that is built at once.
    """

    all: int
    trained: int
    averaged: int
    largest: int = 0
    largest_part: int = 0


@dataclass(frozen=True)
class HostStates:
    """Bytes on the host for one rank.

    Args:
        offloaded: master weights, both moments, their average, gradients as AdamW reads them, and one more of that
            size (ZeRO 1 and 2: weights on their way back, 3: gradients as they come); ZeRO 2 that reduces per
            micro-batch also sums gradients there.
        snapshot: of a checkpoint: weights, average, moments of this rank; kept from save to save.
        build: while the model is built: at ZeRO 1 and 2 all weights, at 3 the largest part.
    """

    offloaded: int
    snapshot: int
    build: int

    @property
    def peak(self) -> int:
        """The build is over when the rest begins."""
        return max(self.build, self.offloaded + self.snapshot)


@dataclass(frozen=True)
class ModelStates:
    """Bytes on one rank's device, and beside them on its host.

    Args:
        weights: parameters, whole or, at ZeRO-3, this rank's share, and its part of hpZ's second copy.
        gathered: at ZeRO-3, parameters that are whole for a while during forward and backward, at the most.
        gradients: of what trains: whole, or what is left of them where each micro-batch reduces.
        optimizer: master weights, both moments, and reduced gradients where they have a buffer of their own.
        average: of the weights (EMA).
        reduction: of the reduce at a step's end, when no activation is left; ZeRO-3 holds its buffer always.
        is_reduction_held: whether that buffer is there during the backward too.
        host: what lies there.
    """

    weights: int
    gathered: int
    gradients: int
    optimizer: int
    average: int
    reduction: int
    is_reduction_held: bool
    host: HostStates

    @property
    def held(self) -> int:
        """What is there at the end of a step's last backward."""
        fixed = self.weights + self.gradients + self.optimizer + self.average
        return fixed + (self.reduction if self.is_reduction_held else 0)

    def peak(self, activation_bytes: int) -> int:
        """The larger of the backward, with its activations, and the step after it, with its reduction."""
        reduction = 0 if self.is_reduction_held else self.reduction
        return self.held + max(self.gathered + activation_bytes, reduction)


def model_states(
    counts: ParameterCounts,
    *,
    zero_stage: int,
    world_size: int,
    is_optimizer_offloaded: bool = False,
    is_reduced_per_micro_batch: bool = False,
    hpz_partition_size: int = 1,
) -> ModelStates:
    """Estimate the bytes that one rank holds.

    Args:
        counts: parameters of the model.
        zero_stage: 1, 2 or 3.
        world_size: data-parallel ranks.
        is_optimizer_offloaded: master weights, moments and their average lie in the host's memory.
        is_reduced_per_micro_batch: gradients are summed in each micro-batch, not once a step; ZeRO 1 then still holds
            them whole up to the last one.
        hpz_partition_size: at ZeRO 3, ranks that hold a second copy of the weights among them; 1: none.
    """
    trained_share, share = FLOAT32 * counts.trained / world_size, FLOAT32 * counts.all / world_size
    bucket, on_device = FLOAT32 * REDUCE_BUCKET_ELEMENTS, 0 if is_optimizer_offloaded else 1
    averaged_share = FLOAT32 * counts.averaged / world_size
    second_copy = FLOAT32 * counts.all / hpz_partition_size if hpz_partition_size > 1 else 0
    gradients = FLOAT32 * counts.trained
    optimizer = 3 * trained_share * on_device
    # With offload a gradient passes one buffer of its size on either side.
    passing = FLOAT32 * counts.largest * (1 - on_device)
    offloaded = 6 * trained_share
    reduction: float = bucket
    if zero_stage == 3:
        # A flat buffer of this rank's reduced gradients is made with the engine.
        optimizer += trained_share * on_device
        gradients = 0 if is_reduced_per_micro_batch else gradients
        passing = 0
    else:
        optimizer += passing
        if is_reduced_per_micro_batch and zero_stage == 2:
            # Only the sum of the micro-batches before this one, of this rank's share.
            gradients = round(trained_share * on_device)
            offloaded += trained_share
        if not is_reduced_per_micro_batch:
            # Reduced gradients of this rank, and the flat copy of them that the optimizer reads.
            reduction += 2 * trained_share * on_device
    return ModelStates(
        weights=round(share + second_copy if zero_stage == 3 else FLOAT32 * counts.all),
        gathered=FLOAT32 * min(counts.all, GATHERED_ELEMENTS) if zero_stage == 3 else 0,
        gradients=gradients,
        optimizer=round(optimizer),
        average=round(averaged_share - trained_share * (1 - on_device)),
        reduction=round(reduction),
        is_reduction_held=zero_stage == 3 or is_reduced_per_micro_batch,
        host=HostStates(
            offloaded=round(offloaded + passing) if is_optimizer_offloaded else 0,
            snapshot=round(share + averaged_share + 2 * trained_share),
            build=FLOAT32 * (counts.largest_part if zero_stage == 3 else counts.all),
        ),
    )
