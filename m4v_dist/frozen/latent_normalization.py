"""Per-channel mean and scale of latents: the one home of the latent statistics.

The cache stores latents un-normalised; whoever hands latents to the model normalises them here, and whoever decodes
undoes it. The first frame of a clip (and an image) has its own statistics, as in the M4V backbone's source
(PyramidFlow's image and video shift and scale at 3040d71), because a causal codec codes it alone.

Legend: `c` channels, `t` latents in time, `h` `w` latent grid.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentNormalization:
    """Statistics of the first latent and of the later ones.

    Args:
        first_mean: c floats, mean of the first latent.
        first_std: c floats > 0, what the first latent is divided by.
        later_mean: c floats, of latents 1 and on.
        later_std: c floats > 0.
    """

    first_mean: tuple[float, ...]
    first_std: tuple[float, ...]
    later_mean: tuple[float, ...]
    later_std: tuple[float, ...]

    def __post_init__(self) -> None:
        lengths = {len(values) for values in asdict(self).values()}
        if len(lengths) != 1 or min(*self.first_std, *self.later_std) <= 0:
            raise ValueError(
                f"LatentNormalization: needs four lists of equal length with scales > 0, got lengths {sorted(lengths)} "
                f"and smallest scale {min(*self.first_std, *self.later_std)}; fit the statistics again."
            )

    def normalize(self, latents: Tensor) -> Tensor:
        """Map raw latents `... c t h w`, any float dtype, to float32 of about unit size; frame 0 is a clip's first."""
        mean, std = self._constants(latents)
        return (latents.float() - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """Undo `normalize`; float32."""
        mean, std = self._constants(latents)
        return latents.float() * std + mean

    def _constants(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        if latents.ndim < 4 or latents.shape[-4] != len(self.first_mean):
            raise ValueError(
                f"latents must be ... c t h w with c={len(self.first_mean)}, got {tuple(latents.shape)}; "
                "use the statistics of the codec that made them."
            )
        num_latents = latents.shape[-3]
        return (
            _over_time(self.first_mean, self.later_mean, num_latents, latents.device),
            _over_time(self.first_std, self.later_std, num_latents, latents.device),
        )

    def to_json(self) -> dict[str, list[float]]:
        """Plain lists, for a manifest."""
        return {name: list(values) for name, values in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "LatentNormalization":
        """Read what `to_json` wrote."""
        return cls(**{name: tuple(float(value) for value in values[name]) for name in cls.__dataclass_fields__})


def _over_time(first: Sequence[float], later: Sequence[float], num_latents: int, device: torch.device) -> Tensor:
    columns = [first, *[later] * (num_latents - 1)][:num_latents]
    return torch.tensor(columns, dtype=torch.float32, device=device).T[..., None, None]  # c t 1 1
