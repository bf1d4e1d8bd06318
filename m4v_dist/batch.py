"""What travels between loader, objective, sampler and model: `LatentBatch` and `ModelInput`.

A *slot* is one training sample of the global batch: one record of the cache, cut to its first `unit` latents, at one
pyramid stage. Every number of a slot is a function of (seed, step, slot) and the plan, never of a rank or world size.
Slots differ in shape, so a batch is a tuple of tensors, packed later into one sequence.

Legend: `c` latent channels, `t` latents in time, `h` `w` latent grid, `n` text tokens, `d` text width.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """Hash `parts` to a 63-bit seed: the counter-based generator of the plan.

    Equal on every machine, process and version (blake2b of the parts' text), so a slot's draws can be recomputed
    anywhere from (seed, step, slot) alone.
    """
    digest = hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def slot_generator(seed: int) -> torch.Generator:
    """Return a CPU generator for a slot's draws: CPU, so that the numbers do not depend on the device."""
    return torch.Generator(device="cpu").manual_seed(seed)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return float32 on `device`, made there: what is page-locked goes over as stored, and nobody waits for it."""
    # to a CPU it would be handed out before it is there
    is_asynchronous = torch.device(device).type != "cpu"
    return tensor.to(device, non_blocking=is_asynchronous).to(torch.float32)


@dataclass(frozen=True)
class TextFeatures:
    """Text of one prompt without padding.

    Args:
        tokens: n d, float; token embeddings of the text encoder, padding left out.
        pooled: p, float; the pooled vector.
    """

    tokens: Tensor
    pooled: Tensor

    def to(self, device: torch.device | str) -> "TextFeatures":
        """Return the features as float32 on `device`; see `to_device`."""
        return TextFeatures(to_device(self.tokens, device), to_device(self.pooled, device))


@dataclass(frozen=True)
class Slot:
    """The plan of one slot: pure numbers, no tensor.

    Args:
        step: global training step, 0-based.
        index: slot in the global batch, 0 <= index < S.
        source: name of the source that the record comes from.
        record: position of the record in the cache's index of that source.
        key: the record's key.
        unit: 1-based number of the latent that is noised; the `unit - 1` latents before it are history.
        pyramid_stage: 0 (coarsest) .. K-1 (full size).
        seed: 63-bit seed of all draws of this slot (timestep, noise, history noise, text drop, caption).
        num_tokens: estimated tokens of the packed segment, used to balance micro-batches.
        num_full_tokens: the same for the record without a pyramid, used to count tokens seen.
        caption: which of the record's captions it trains on, drawn by their weights.
    """

    step: int
    index: int
    source: str
    record: int
    key: str
    unit: int
    pyramid_stage: int
    seed: int
    num_tokens: int
    num_full_tokens: int
    caption: int = 0


@dataclass(frozen=True)
class LatentBatch:
    """One micro-batch of one rank.

    Args:
        slots: the slots, in slot order.
        latents: one per slot, c t h w with t = slot.unit, un-normalised as stored in the cache.
        text: one per slot.
        null_text: the empty prompt, used where the objective drops the text.
        weights: one per slot; 0 for a filler slot that only keeps ranks in step.
        global_num_slots: S, the number of slots of the global batch that the loss is divided by.
    """

    slots: tuple[Slot, ...]
    latents: tuple[Tensor, ...]
    text: tuple[TextFeatures, ...]
    null_text: TextFeatures
    weights: tuple[float, ...]
    global_num_slots: int


@dataclass(frozen=True)
class Column:
    """One segment that the model sees: history clips, then the noisy latent, with their text and time.

    Args:
        clips: old to new, each c t h w (its own grid); the last is noisy, the others are history.
        levels: one per clip, the pyramid stage of its grid (0 coarsest); picks the clip's register.
        text: the prompt.
        timestep: scalar float32 tensor in [0, 1000]; 1000 is pure noise.
    """

    clips: tuple[Tensor, ...]
    levels: tuple[int, ...]
    text: TextFeatures
    timestep: Tensor


@dataclass(frozen=True)
class ModelInput:
    """What the objective or a sampler gives to the model; the answer is one velocity per column.

    The model returns a list with, for each column, a tensor of the shape of its last clip (c t h w).
    """

    columns: tuple[Column, ...]

    def __post_init__(self) -> None:
        if not self.columns:
            raise ValueError("ModelInput: no columns; give at least one (history clips, noisy latent).")
        for number, column in enumerate(self.columns):
            _check_column(number, column)


def _check_column(number: int, column: Column) -> None:
    if len(column.clips) != len(column.levels) or not column.clips:
        raise ValueError(
            f"ModelInput: column {number} has {len(column.clips)} clips and {len(column.levels)} levels; "
            "give one level for each clip, and at least the noisy one."
        )
    shapes: Sequence[tuple[int, ...]] = [tuple(clip.shape) for clip in column.clips]
    if any(len(shape) != 4 for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"ModelInput: column {number} needs clips c t h w of equal c, but has {shapes}.")
