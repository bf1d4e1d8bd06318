"""A model that knows the data: it answers with the true velocity, found from the noisy clip alone.

With clean latents known, a noisy clip at ratio r gives away its noise, and with it start - end. Training and sampling
are held to the same oracle, so they agree on what a velocity is.
"""

from collections.abc import Sequence

from torch import Tensor

from m4v_dist.batch import Column, ModelInput
from m4v_dist.objective.history import to_level
from m4v_dist.objective.pyramid_schedule import PyramidSchedule, downsample, upsample


class Oracle:
    """Knows one clean unit for each column.

    Args:
        schedule: sigmas and tables.
        clean: per column, c t h w, normalised and full size.
    """

    def __init__(self, schedule: PyramidSchedule, clean: Sequence[Tensor]) -> None:
        self.schedule = schedule
        self.clean = clean

    def __call__(self, model_input: ModelInput) -> list[Tensor]:
        return [self.velocity(column, clean) for column, clean in zip(model_input.columns, self.clean, strict=True)]

    def velocity(self, column: Column, clean: Tensor) -> Tensor:
        """True velocity of a column whose noisy clip hides `clean`."""
        stage, schedule = column.levels[-1], self.schedule
        table = schedule.train_timesteps(stage)
        step = float(table[0] - table[1])
        last = float(table[-1]) - step  # the timestep at ratio 0, left out of the table
        ratio = (float(column.timestep) - last) / (float(table[0]) - last)
        start_sigma, end_sigma = schedule.start_sigmas[stage], schedule.end_sigmas[stage]
        fine = to_level(clean, stage, schedule.num_stages)
        coarse = upsample(downsample(fine)) if stage else fine
        start_signal, end_signal = (1 - start_sigma) * coarse, (1 - end_sigma) * fine
        signal = ratio * start_signal + (1 - ratio) * end_signal
        noise = (column.clips[-1] - signal) / (ratio * start_sigma + (1 - ratio) * end_sigma)
        return start_sigma * noise + start_signal - (end_sigma * noise + end_signal)
