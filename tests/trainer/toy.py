"""A toy model, objective and loader with the seams of the real ones, small enough to run a step in milliseconds."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from m4v_dist.batch import LatentBatch, Slot, TextFeatures, derive_seed, slot_generator
from m4v_dist.config.schema import RunConfig

WIDTH = 7


class ToyModel(nn.Module):
    """Two kinds of blocks and fresh registers; odd widths, so that ranges of ranks fall inside parameters."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.double_blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.single_blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.A_log = nn.Parameter(torch.zeros(WIDTH))
        self.registers = nn.Parameter(torch.zeros(3, WIDTH))
        self.only_late = nn.Parameter(torch.zeros(5, WIDTH))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, values: Tensor, unit: int) -> Tensor:  # s d -> s d
        for block in [*self.double_blocks, *self.single_blocks]:
            values = values + torch.tanh(block(values))
        values = values * torch.exp(self.A_log) + self.registers.sum(0)
        # A branch that only some ranks take: their graphs differ, as with images beside video.
        return values + self.only_late.mean(0) if unit > 1 else values


def build_toy(place: Callable[[str, nn.Module], None]) -> ToyModel:
    """The model as one part."""
    model = ToyModel(5)
    place("", model)
    return model


@dataclass(frozen=True)
class ToyOutput:
    loss: Tensor
    metrics: dict[str, Tensor]
    slot_losses: Tensor


def toy_objective(model: nn.Module, batch: LatentBatch) -> ToyOutput:
    """Denoise a vector: loss and draws are functions of the slots alone."""
    losses = []
    for slot, latents in zip(batch.slots, batch.latents, strict=True):
        noise = torch.randn(latents.shape, generator=slot_generator(slot.seed))
        losses.append((model((latents + noise)[None], slot.unit)[0] - latents).pow(2).mean())
    slot_losses = torch.stack(losses)
    loss = (slot_losses * torch.tensor(batch.weights)).sum() / batch.global_num_slots
    stages = torch.tensor([slot.pyramid_stage for slot in batch.slots])
    metrics = {
        f"loss_pyramid_stage_{k}": torch.stack([slot_losses.detach()[stages == k].sum(), (stages == k).sum()])
        for k in range(3)
    }
    return ToyOutput(loss, metrics, slot_losses.detach())


def toy_slot(step: int, index: int) -> tuple[Slot, Tensor]:
    seed = derive_seed(3, step, index)
    latents = torch.randn(WIDTH, generator=slot_generator(seed + 1))
    source = "images" if index % 2 else "clips"
    return Slot(step, index, source, index, f"key-{index}", 1 + index % 2, index % 3, seed, 10, 40), latents


def toy_batch(step: int, indices: list[int], num_slots: int) -> LatentBatch:
    pairs = [toy_slot(step, index) for index in indices]
    text = TextFeatures(torch.zeros(1, 2), torch.zeros(2))
    return LatentBatch(
        slots=tuple(slot for slot, _ in pairs),
        latents=tuple(latents for _, latents in pairs),
        text=(text,) * len(pairs),
        null_text=text,
        weights=(1.0,) * len(pairs),
        global_num_slots=num_slots,
    )


@dataclass(frozen=True)
class ToyStepBatch:
    step: int
    micro_batches: tuple[LatentBatch, ...]


class ToyLoader:
    """Slots of a step in order, split by rank and micro-batch; its state is the number of records read."""

    def __init__(self, num_slots: int, rank: int, world_size: int, micro: int) -> None:
        self.num_slots, self.rank, self.world_size, self.micro = num_slots, rank, world_size, micro
        self.cursor, self.step = 0, 0

    def enter(self, curriculum_stage_index: int, step: int) -> None:
        self.step = step

    def steps(self) -> Iterator[ToyStepBatch]:
        while True:
            share = self.num_slots // self.world_size
            mine = list(range(self.rank * share, (self.rank + 1) * share))
            step, self.step, self.cursor = self.step, self.step + 1, self.cursor + self.num_slots
            batches = [mine[at : at + self.micro] for at in range(0, share, self.micro)]
            yield ToyStepBatch(step, tuple(toy_batch(step, indices, self.num_slots) for indices in batches))

    def state_dict(self) -> dict[str, int]:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.cursor = state["cursor"]

    def close(self) -> None:
        pass

    @property
    def samples_seen(self) -> dict[str, int]:
        return {name: self.cursor // 2 for name in ("clips", "images") if self.cursor}

    @property
    def tokens_seen(self) -> dict[str, int]:
        """Other than the slots say, so that it shows whose counts are logged."""
        return {name: 50 * count for name, count in self.samples_seen.items()}

    @property
    def num_bad_records(self) -> int:
        """As if each rank had met one more than its rank."""
        return 1 + self.rank

    @property
    def reads(self) -> dict[str, float]:
        return {"read_bytes": 1000.0 * self.step, "wait_s": 0.5}

    def held_out(self) -> tuple[LatentBatch, ...]:
        share = self.num_slots // self.world_size
        return (toy_batch(10**6, list(range(self.rank * share, (self.rank + 1) * share)), self.num_slots),)


def toy_config(folder: str, **trainer: Any) -> RunConfig:
    """A config of two curriculum stages for the toy parts; the second unfreezes the double blocks."""
    bucket = {"height_px": 64, "width_px": 64}
    stage = {"num_latents": 1, "buckets": [bucket], "weights": {"clips": 1.0, "images": 1.0}, "micro_batch_slots": 3}
    settings = {"global_batch_slots": 12, "sync_group": 1, "held_out_slots": 12, "checkpoint_every_steps": 3, **trainer}
    return RunConfig.model_validate(
        {
            "run": {"name": "toy", "folder": folder},
            "sources": [
                {"name": name, "shards": "none", "media": "image", "licence": "none"} for name in ("clips", "images")
            ],
            "precompute": {"cache": folder, "buckets": [bucket]},
            "model": {},
            "curriculum": [
                {
                    **stage,
                    "name": "first",
                    "num_steps": 4,
                    "learning_rate": 0.05,
                    "fresh_learning_rate_scale": 4.0,
                    "freeze": ["double_blocks"],
                },
                {**stage, "name": "second", "num_steps": 6, "learning_rate": 0.02, "warmup_steps": 2},
            ],
            "trainer": settings,
            "launch": {"num_workers": 2},
            "logging": {"wandb": "disabled"},
        }
    )
