"""The loss of a batch: the mean square error of the velocity, frame by frame, weighted by level.

Shapes: B samples, F latent frames; sigma_BF levels; error_BF the mean square error of each frame.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from pusa.finetune.metrics import BANDS

# (sigma_BF) -> weight_BF. One line each in the table.
Weighting = Callable[[Tensor], Tensor]


def gaussian(sigma_BF: Tensor) -> Tensor:
    """Pusa V1.0's weight, exp(-2 ((t - 500) / 1000)^2) less its least value, 1 in the mean over the shift-5 grid."""
    least, scale = _of_grid()
    return (_bell(sigma_BF) - least) * scale


def gaussian_of_mean(sigma_BF: Tensor) -> Tensor:
    """The same as the published code has it: a clip's mean loss times the mean of its frames' weights."""
    return gaussian(sigma_BF).mean(1, keepdim=True).expand_as(sigma_BF)


WEIGHTINGS: dict[str, Weighting] = {
    "none": torch.ones_like,
    "gaussian": gaussian,
    "gaussian_of_mean": gaussian_of_mean,
}


def frame_errors(velocity: Tensor, target: Tensor) -> Tensor:
    """(B, C, F, h, w) twice -> the mean square error of each latent frame, (B, F)."""
    return (velocity - target).square().mean((1, 3, 4))


def weighted(error_BF: Tensor, sigma_BF: Tensor, weighting: str) -> Tensor:
    """The loss: the mean over frames and samples."""
    return (error_BF * WEIGHTINGS[weighting](sigma_BF)).mean()


def sum_by_band(error_BF: Tensor, sigma_BF: Tensor) -> Tensor:
    """Sums of the errors, and counts, of frames whose level lies in each tenth of [0, 1]: (2, 10)."""
    place = (sigma_BF * BANDS).long().clamp(max=BANDS - 1).flatten()
    both = torch.stack([error_BF.flatten(), torch.ones_like(error_BF).flatten()])
    return both.new_zeros(2, BANDS).index_add_(1, place, both)


def _bell(sigma: Tensor) -> Tensor:
    return (-2 * (sigma - 0.5).square()).exp()


@lru_cache
def _of_grid() -> tuple[float, float]:
    u = torch.arange(1, 1001, dtype=torch.float64) / 1000
    weights = _bell(5 * u / (1 + 4 * u))
    least = weights.min()
    return float(least), float(1000 / (weights - least).sum())
