"""What one rank holds of a model beside activations, by arithmetic: the ZeRO stages as DeepSpeed 0.19 has them.

All in float32. Gradients are whole on every rank at every stage, because they are reduced once a step
(`ZeroEngine.accumulate`). Held against a real engine of two ranks in `tests/trainer/test_model_states.py`.
"""

from dataclasses import dataclass

FLOAT32 = 4
REDUCE_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default; the buffer is made whole, however small the model."""
GATHERED_ELEMENTS = 1_000_000_000
"""ZeRO-3 lets go of gathered parameters past so many (stage3_max_live_parameters)."""


@dataclass(frozen=True)
class ModelStates:
    """Bytes on one rank's device.

    Args:
        weights: parameters, whole or, at ZeRO-3, this rank's share.
        gathered: at ZeRO-3, parameters that are whole for a while during forward and backward, at the most.
        gradients: whole, of what trains.
        optimizer: master weights, both moments, and reduced gradients where they have a buffer of their own.
        average: of the weights (EMA).
        reduction: of the reduce at a step's end, when no activation is left; ZeRO-3 holds its buffer always.
        is_reduction_held: whether that buffer is there during the backward too.
    """

    weights: int
    gathered: int
    gradients: int
    optimizer: int
    average: int
    reduction: int
    is_reduction_held: bool

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
    num_parameters: int,
    num_trained: int,
    *,
    zero_stage: int,
    world_size: int,
    is_optimizer_offloaded: bool = False,
) -> ModelStates:
    """Estimate the bytes that one rank holds.

    Args:
        num_parameters: of the whole model.
        num_trained: of them, those that are not frozen: only these have gradients, moments and master weights.
        zero_stage: 1, 2 or 3.
        world_size: data-parallel ranks.
        is_optimizer_offloaded: master weights, moments and average lie in the host's memory.
    """
    trained_share, share = num_trained / world_size, num_parameters / world_size
    bucket = FLOAT32 * REDUCE_BUCKET_ELEMENTS
    on_device = 0 if is_optimizer_offloaded else 1
    optimizer = 3 * FLOAT32 * trained_share * on_device
    if zero_stage == 3:
        weights = FLOAT32 * share
        # A flat buffer of this rank's reduced gradients is made with the engine.
        optimizer += FLOAT32 * trained_share
        reduction: float = bucket
    else:
        weights = FLOAT32 * num_parameters
        # Reduced gradients of this rank, and the flat copy of them that the optimizer reads.
        reduction = bucket + 2 * FLOAT32 * trained_share
    return ModelStates(
        weights=round(weights),
        gathered=FLOAT32 * min(num_parameters, GATHERED_ELEMENTS) if zero_stage == 3 else 0,
        gradients=FLOAT32 * num_trained,
        optimizer=round(optimizer),
        average=round(FLOAT32 * share * on_device),
        reduction=round(reduction),
        is_reduction_held=zero_stage == 3,
    )
