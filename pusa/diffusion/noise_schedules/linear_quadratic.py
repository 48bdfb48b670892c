"""Slow and linear steps down to 1 - threshold, then quadratic to 0; and the density of levels of Pusa V0.5.

Shapes: F latent frames, N steps.
"""

import torch
from torch import Generator, Tensor

THRESHOLD = 0.025
GRID = 1000  # points of the training density


def sigmas(steps: int, threshold: float = THRESHOLD) -> Tensor:
    """Return N + 1 levels from 1 to 0, both ends included.

    The first N // 2 steps are linear down to 1 - threshold. The rest follow the parabola that continues that line with
    the same slope and ends at 0 (`linear_quadratic_schedule` in genmo's published code).
    """
    linear = steps // 2
    if linear == 0:
        return torch.linspace(1, 0, steps + 1)
    slope = threshold / linear
    left = torch.arange(linear) * slope
    i = torch.arange(steps - linear + 1, dtype=torch.float64)
    rest = steps - linear
    quadratic = (1 - threshold - slope * rest) / rest**2
    right = threshold + slope * i + quadratic * i**2
    return (1 - torch.cat([left.double(), right])).float()


def levels(steps: int, multipliers_F: Tensor) -> Tensor:
    """Return levels (N + 1, F): every frame follows the schedule, scaled by its own multiplier."""
    return sigmas(steps)[:, None] * multipliers_F


def density(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw levels as published Pusa V0.5 does: an index ~ U{0..998} into the schedule of 1000 steps."""
    return sigmas(GRID)[torch.randint(0, GRID - 1, shape, generator=generator)]
