"""The arithmetic of the pyramid flow: sigmas and timesteps of each stage, resizing, and the noise of a stage jump.

No network, no randomness of its own. Training and sampling both read it, so the two cannot drift apart.

With the stages of the paper (K = 3, each a third of the way, gamma = 1/3, 1000 timesteps):

| pyramid stage | grid | start sigma | end sigma | timesteps |
|---|---|---|---|---|
| 0 | 1/4 | 1 | 0.667 | 1000 .. 744 |
| 1 | 1/2 | 0.80024 | 0.334 | 744 .. 386 |
| 2 | full | 0.50075 | 0 | 386 .. 1 |

Why a start sigma is not the end sigma of the stage before: stage s - 1 ends at o x + (1 - o) n, with o the signal
fraction. Nearest upsampling repeats each value in a 2 x 2 block, so its noise has covariance (1 - o)^2 J within a
block (J all ones): correlated, where training starts from independent noise. Multiplying by alpha and adding beta
times noise of covariance (1 + gamma) I - gamma J gives alpha^2 (1 - o)^2 J + beta^2 ((1 + gamma) I - gamma J). That is
sigma^2 I when beta = alpha (1 - o) / sqrt(gamma), and then sigma = alpha (1 - o) sqrt(1 + 1/gamma). The signal has
become alpha o, so sigma must equal 1 - alpha o, hence alpha = 1 / (sqrt(1 + 1/gamma) (1 - o) + o) and the corrected
start sigma 1 - alpha o.

Source: PyramidFlow (arXiv 2410.05954) section 3.2; diffusion_schedulers/scheduling_flow_matching.py of its repository
at 3040d71.

Legend: `c` channels, `t` latents in time, `h` `w` grid; K pyramid stages; sigma is the noise fraction (1 is pure
noise); ratio is the position in a stage (1 at its start, 0 at its end).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from m4v_dist.errors import ConfigError


class PyramidSchedule:
    """Start and end of each pyramid stage, and the tables of timesteps and ratios between them.

    Args:
        num_stages: K, the number of resolutions; stage 0 is the coarsest.
        stage_range: K + 1 rising fractions from 0 to 1, the share of the unshifted flow that each stage walks; None
            splits it in equal parts.
        gamma: off-diagonal correlation -gamma of the block noise, in (0, 1/3].
        num_train_timesteps: entries of each stage's training table, and the largest timestep.
        shift: timestep shift of the whole table: sigma <- shift sigma / (1 + (shift - 1) sigma); 1 leaves it.

    Attributes:
        start_sigmas, end_sigmas: per stage, the noise fraction where its flow starts (corrected) and ends.
        original_start_sigmas: per stage, the noise fraction before the correction: the end of the stage before.
        timestep_ratios: per stage, (from, to) in [0, 1]: its part of the timestep axis, wide as start - end is.

    Raises:
        ConfigError: a number out of range; the message names it and what may stand there.
    """

    def __init__(
        self,
        num_stages: int = 3,
        stage_range: tuple[float, ...] | None = None,
        gamma: float = 1 / 3,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
    ) -> None:
        equal = tuple(stage / max(num_stages, 1) for stage in range(num_stages + 1))
        bounds = equal if stage_range is None else tuple(stage_range)
        _check_schedule(num_stages, bounds, gamma, num_train_timesteps, shift)
        self.num_stages = num_stages
        self.stage_range = bounds
        self.gamma = gamma
        self.num_train_timesteps = num_train_timesteps
        self.shift = shift

        indices = [min(int(bound * num_train_timesteps), num_train_timesteps) for bound in bounds]
        self.original_start_sigmas = tuple(self._sigma(index) for index in indices[:-1])
        self.end_sigmas = tuple(self._sigma(index) for index in indices[1:])
        corrected = [
            1.0 - self._alpha(stage) * (1.0 - self.original_start_sigmas[stage]) for stage in range(num_stages)
        ]
        # The first stage has no stage before it, so nothing to correct.
        self.start_sigmas = (self.original_start_sigmas[0], *corrected[1:])

        widths = [start - end for start, end in zip(self.start_sigmas, self.end_sigmas, strict=True)]
        edges = [sum(widths[:stage]) / sum(widths) for stage in range(num_stages)] + [1.0]
        self.timestep_ratios = tuple(zip(edges[:-1], edges[1:], strict=True))
        self._timesteps = tuple(self._timestep_table(*ratios) for ratios in self.timestep_ratios)
        self._ratios = _open_linspace(1.0, 0.0, num_train_timesteps)

    def _sigma(self, index: int) -> float:
        """Noise fraction at an index of the unshifted table; the index past its end is 0."""
        plain = (self.num_train_timesteps - index) / self.num_train_timesteps
        return self.shift * plain / (1.0 + (self.shift - 1.0) * plain)

    def _alpha(self, pyramid_stage: int) -> float:
        signal = 1.0 - self.original_start_sigmas[pyramid_stage]
        return 1.0 / (math.sqrt(1.0 + 1.0 / self.gamma) * (1.0 - signal) + signal)

    def _timestep_table(self, first_ratio: float, last_ratio: float) -> Tensor:
        size = self.num_train_timesteps
        first = self._sigma(int(first_ratio * size)) * size
        last = self._sigma(min(int(last_ratio * size), size - 1)) * size
        return _open_linspace(first, last, size)

    def train_timesteps(self, pyramid_stage: int) -> Tensor:
        """Timesteps of a stage's training table: [num_train_timesteps], float64, falling."""
        return self._timesteps[self._check_stage(pyramid_stage)]

    def train_ratios(self, pyramid_stage: int) -> Tensor:
        """Ratios r of a stage's training table: [num_train_timesteps], float64, 1 .. 1/num_train_timesteps.

        The noisy latent is r start + (1 - r) end.
        """
        self._check_stage(pyramid_stage)
        return self._ratios

    def inference_table(self, pyramid_stage: int, num_steps: int) -> tuple[Tensor, Tensor]:
        """Timesteps and ratios of `num_steps` Euler steps through a stage.

        Returns:
            timesteps: [num_steps] float64, what the model is told at each step.
            ratios: [num_steps + 1] float64, 1 first and 0 last; step i goes from ratios[i] to ratios[i + 1].

        Raises:
            ConfigError: fewer than one step.
        """
        if num_steps < 1:
            raise ConfigError(f"pyramid schedule: {num_steps} steps in pyramid stage {pyramid_stage}; use at least 1.")
        table = self.train_timesteps(pyramid_stage)
        timesteps = torch.linspace(float(table[0]), float(table[-1]), num_steps, dtype=torch.float64)
        ratios = torch.linspace(float(self._ratios[0]), float(self._ratios[-1]), num_steps, dtype=torch.float64)
        return timesteps, torch.cat([ratios, ratios.new_zeros(1)])

    def stage_jump(self, pyramid_stage: int) -> tuple[float, float]:
        """(alpha, beta) of entering `pyramid_stage`: alpha times the upsampled latent plus beta times block noise.

        Raises:
            ConfigError: stage 0, which starts from noise and is entered by no jump, or a stage that is not there.
        """
        if self._check_stage(pyramid_stage) == 0:
            raise ConfigError("pyramid schedule: stage 0 starts from pure noise; stage_jump is for stages 1 and up.")
        alpha = self._alpha(pyramid_stage)
        return alpha, alpha * self.original_start_sigmas[pyramid_stage] / math.sqrt(self.gamma)

    def _check_stage(self, pyramid_stage: int) -> int:
        if not 0 <= pyramid_stage < self.num_stages:
            raise ConfigError(
                f"pyramid schedule: pyramid stage {pyramid_stage} was asked for; there are 0..{self.num_stages - 1}."
            )
        return pyramid_stage


def _open_linspace(first: float, last: float, size: int) -> Tensor:
    """`size` even steps from `first` towards `last`, `last` itself left out; float64."""
    return torch.linspace(first, last, size + 1, dtype=torch.float64)[:-1]


def _check_schedule(
    num_stages: int, bounds: tuple[float, ...], gamma: float, num_train_timesteps: int, shift: float
) -> None:
    if num_stages < 1 or len(bounds) != num_stages + 1:
        raise ConfigError(
            f"pyramid schedule: {num_stages} stages with stage_range={bounds}; use at least one stage, and one bound "
            "more than stages."
        )
    rising = all(low < high for low, high in zip(bounds[:-1], bounds[1:], strict=True))
    if bounds[0] != 0 or bounds[-1] != 1 or not rising:
        raise ConfigError(f"pyramid schedule: stage_range={bounds} must rise from 0 to 1, each bound above the last.")
    if not 0 < gamma <= 1 / 3:
        raise ConfigError(
            f"pyramid schedule: gamma={gamma} is outside (0, 1/3]; four values with pairwise correlation -gamma exist "
            "only up to 1/3 (the paper's value)."
        )
    if num_train_timesteps < num_stages or shift <= 0:
        raise ConfigError(
            f"pyramid schedule: num_train_timesteps={num_train_timesteps}, shift={shift}; use at least one timestep "
            "per stage and a positive shift."
        )


def downsample(latents: Tensor) -> Tensor:
    """Halve the grid of each frame, bilinear: the mean of each 2 x 2 block.

    Args:
        latents: c t h w, float32; t may be 0.

    Returns:
        c t h/2 w/2.

    Raises:
        ValueError: an odd grid, whose halves would not fit the patches of the coarser stages.
    """
    height, width = _even_grid(latents)
    if latents.shape[1] == 0:
        return latents.new_zeros(*latents.shape[:2], height // 2, width // 2)
    return F.interpolate(latents, size=(height // 2, width // 2), mode="bilinear")  # c t h w


def downsample_noise(noise: Tensor) -> Tensor:
    """Halve the grid of white noise and keep it white: the mean of four has half the deviation, so times 2. c t h w."""
    return 2.0 * downsample(noise)


def upsample(latents: Tensor) -> Tensor:
    """Double the grid of each frame by repeating each value in a 2 x 2 block: c t h w to c t 2h 2w."""
    return F.interpolate(latents, scale_factor=2, mode="nearest")  # c t h w


def block_noise(white: Tensor, gamma: float = 1 / 3) -> Tensor:
    """Turn white noise into block noise: variance 1, correlation -gamma within each 2 x 2 block, 0 between blocks.

    Splits a block's four values n into mean m and rest n - m. These are independent with covariance J/4 and I - J/4,
    so sqrt(1 + gamma) (n - m) + sqrt(1 - 3 gamma) m has covariance (1 + gamma) I - gamma J. At gamma = 1/3 the second
    term is gone: sqrt(4/3) (n - m), and each block sums to zero.

    Args:
        white: c t h w, independent N(0, 1); its draws decide the result.
        gamma: in (0, 1/3].
    """
    means = upsample(downsample(white))
    return math.sqrt(1.0 + gamma) * (white - means) + math.sqrt(max(0.0, 1.0 - 3.0 * gamma)) * means


def _even_grid(latents: Tensor) -> tuple[int, int]:
    height, width = latents.shape[-2:]
    if latents.ndim != 4 or height % 2 or width % 2:
        raise ValueError(
            f"pyramid: cannot halve the grid of latents {tuple(latents.shape)}; expected c t h w with even h and w. "
            "Choose a bucket whose sides in pixels are multiples of 8 * 2^(pyramid stages - 1) * patch size (64 for 3 "
            "stages)."
        )
    return height, width
