"""Compute the loss of a batch: the mean square error of the velocity, frame by frame, weighted by level.

Shapes: B samples, F latent frames; sigma_BF levels; error_BF the mean square error of each frame.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from pusa.diffusion.noise_schedules.shifted import shift_levels
from pusa.finetune.metrics import BANDS

# sigma_BF -> weight_BF. A new weighting is a function, a line in WEIGHTINGS, and a name in `FinetuneManifest`.
Weighting = Callable[[Tensor], Tensor]


def gaussian(sigma_BF: Tensor) -> Tensor:
    """Return Pusa V1.0's weights: exp(-2 ((t - 500) / 1000)^2) less its minimum, scaled to mean 1 on the shift-5 grid.

    t is 1000 sigma; the grid has 1000 timesteps.
    """
    minimum, scale = _grid_statistics()
    return (_bell(sigma_BF) - minimum) * scale


def gaussian_of_mean(sigma_BF: Tensor) -> Tensor:
    """Return the weights as the published code applies them: every frame of a clip gets the clip's mean weight."""
    return gaussian(sigma_BF).mean(1, keepdim=True).expand_as(sigma_BF)


WEIGHTINGS: dict[str, Weighting] = {
    "none": torch.ones_like,
    "gaussian": gaussian,
    "gaussian_of_mean": gaussian_of_mean,
}


def frame_errors(velocity: Tensor, target: Tensor) -> Tensor:
    """Return the mean square error of each latent frame (B, F) of two (B, C, F, h, w)."""
    return (velocity - target).square().mean((1, 3, 4))


def weighted(error_BF: Tensor, sigma_BF: Tensor, weighting: str) -> Tensor:
    """Return the loss: the mean of the weighted errors over frames and samples."""
    return (error_BF * WEIGHTINGS[weighting](sigma_BF)).mean()


def sum_by_band(error_BF: Tensor, sigma_BF: Tensor) -> Tensor:
    """Return the sums of the errors and the counts of the frames in each tenth of [0, 1] by level: (2, 10)."""
    band = (sigma_BF * BANDS).long().clamp(max=BANDS - 1).flatten()
    errors_and_ones = torch.stack([error_BF.flatten(), torch.ones_like(error_BF).flatten()])
    return errors_and_ones.new_zeros(2, BANDS).index_add_(1, band, errors_and_ones)


def _bell(sigma: Tensor) -> Tensor:
    return (-2 * (sigma - 0.5).square()).exp()


@lru_cache
def _grid_statistics() -> tuple[float, float]:
    """Return the minimum of the bell over the shift-5 grid, and the factor that gives the rest of it mean 1."""
    u = torch.arange(1, 1001, dtype=torch.float64) / 1000
    weights = _bell(shift_levels(u))
    minimum = weights.min()
    return float(minimum), float(1000 / (weights - minimum).sum())
